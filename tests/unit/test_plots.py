"""Curves that runs may have, drawn."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest

from lmkit.plots import plot_curves, plot_run

CURVES = {
    "a run": {
        "train loss": (range(1, 300), [9 - 5 * i / 300 for i in range(1, 300)]),
        "valid loss": ([100, 200, 300], [7.0, 5.5, 5.2]),
        "learning rate": (range(1, 300), [1e-3] * 299),
    },
    "single points": {"train loss": ([1], [4.0]), "valid loss": ([1], [4.1]), "learning rate": ([1], [0.0])},
    "one point": {"valid loss": ([7], [0.0])},
    "not UTF-8": {"train caf\udce9": ([1, 2], [4.0, 3.0]), "valid caf\udce9": ([1, 2], [4.0, 3.0])},
    "nothing": {},
    "empty": {"train loss": ([], []), "learning rate": ([], [])},
    "not finite": {"train loss": ([1, 2, 3], [math.nan, math.inf, 3.0]), "valid loss": ([1], [math.nan])},
    "huge": {"train loss": ([1, 2], [900.0, -50.0]), "valid loss": ([1, 2], [900.0, 1e9])},
    "flat": {"valid loss": ([1, 2], [3.0, 3.0])},
    "many": {f"valid {i}": ([1, 2], [i, i + 1.0]) for i in range(9)},
}


@pytest.mark.parametrize("name", CURVES)
def test_any_curves_can_be_plotted(name: str, tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    plot_curves(path, CURVES[name], title="a $title_ with % caf\udce9", per_token=True, apart=False)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights on Windows")
def test_a_plot_follows_no_link_that_waits_for_it(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious", encoding="utf-8")
    path = tmp_path / "loss.png"
    for name in (path.name, f".loss.png.{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to(victim)
    plot_curves(path, CURVES["flat"], title="", per_token=True, apart=False)
    assert victim.read_text(encoding="utf-8") == "precious"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("unit", ["token", "pair", "example"])
def test_only_losses_of_tokens_have_perplexities(unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes._base import _AxesBase

    labels: list[str] = []
    monkeypatch.setattr(_AxesBase, "set_ylabel", lambda axes, text, **_: labels.append(text))
    rows = ({"step": 1, "loss": 0.7, "lr": 0.1}, {"step": 1, "valid_loss": 0.25})
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    plot_run(tmp_path, pytest.fail, unit)
    losses = {
        "token": ["loss (nats per token)", "perplexity"],
        "pair": ["loss"],
        "example": ["loss in training", "valid loss (task.metric)"],  # of other units: each has an axis
    }
    assert labels == ["learning rate", *losses[unit]]
    assert (tmp_path / "loss.png").is_file()


def test_nothing_that_goes_wrong_with_a_plot_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    (tmp_path / "metrics.jsonl").mkdir()
    plot_run(tmp_path, warnings.append, "token")
    (tmp_path / "metrics.jsonl").rmdir()
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)  # as where numpy is too new for it
    plot_run(tmp_path, warnings.append, "token")
    assert [text.startswith("no plot: ") for text in warnings] == [True, True], warnings
