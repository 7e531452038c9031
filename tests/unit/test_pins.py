"""Pinned checkpoints, and those of every M-th step, outlive retention."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from storing import ByteTokenizer, open_run

from lmkit.config.training import SaveConfig
from lmkit.errors import CheckpointError, ConfigError
from lmkit.store.checkpoint import Snapshot
from lmkit.store.checkpoint_writer import CheckpointWriter
from lmkit.store.listing import list_checkpoints
from lmkit.store.manifest import step_of, verify_checkpoint
from lmkit.store.pins import read_pins, write_pins
from lmkit.store.runs import Run


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with open_run(tmp_path / "run") as made:
        yield made


def save(run: Run, steps: list[int], *, warnings: list[str] | None = None, keep_every: int | None = None) -> list[int]:
    """Save these steps in this order, keeping one, and return the steps that are left."""
    warn = pytest.fail if warnings is None else warnings.append
    writer = CheckpointWriter(run, ByteTokenizer(), keep=1, keep_every=keep_every, warn=warn)
    with writer:
        for step in steps:
            loss = 1.0 if step == 1 else 9.0  # the first is the best, and so kept
            state = {"valid_nats_per_token": loss}
            writer.submit(Snapshot(step, {"weight": torch.full((3,), float(step))}, {}, state, {}))
    return [step_of(path.name) or 0 for path in list_checkpoints(run.path)]


def test_pins_come_back_and_none_is_no_pin(run: Run) -> None:
    assert read_pins(run.path) == set()
    write_pins(run.path, {30, 2})
    assert read_pins(run.path) == {2, 30}
    assert not [p for p in run.path.iterdir() if p.name.startswith(".tmp-")]


def test_a_pinned_checkpoint_is_never_retired_and_goes_once_it_is_unpinned(run: Run) -> None:
    assert save(run, [1, 2, 3]) == [1, 3]
    write_pins(run.path, {3})
    assert save(run, [4, 5, 6]) == [1, 3, 6]
    verify_checkpoint(list_checkpoints(run.path)[1])
    write_pins(run.path, set())
    assert save(run, [7]) == [1, 7]


def test_a_pin_counts_while_the_same_writer_goes_on(run: Run) -> None:
    with CheckpointWriter(run, ByteTokenizer(), keep=1, warn=pytest.fail) as writer:
        for step in range(1, 6):
            writer.submit(Snapshot(step, {"weight": torch.ones(2)}, {}, {}, {}))
            if step == 2:
                write_pins(run.path, {2})
    assert [path.name for path in list_checkpoints(run.path)] == ["step-000000000002", "step-000000000005"]


@pytest.mark.parametrize("raw", [b'{"steps": [1', b'{"steps": 1}', b'{"steps": ["1"]}', b'{"steps": [true]}', b"[]"])
def test_nothing_is_retired_while_the_pins_cannot_be_read(run: Run, raw: bytes) -> None:
    save(run, [1, 2])
    (run.path / "pinned.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"pinned\.json"):
        read_pins(run.path)
    warnings: list[str] = []
    assert save(run, [3, 4], warnings=warnings) == [1, 2, 3, 4]
    assert all("no checkpoint is retired" in warning for warning in warnings)
    assert len(warnings) == 2


def test_every_mth_checkpoint_is_kept_beside_the_newest_and_the_best(run: Run) -> None:
    assert save(run, list(range(1, 12)), keep_every=4) == [1, 4, 8, 11]


def test_keep_every_is_off_by_default_and_must_be_positive() -> None:
    assert SaveConfig().keep_every is None
    with pytest.raises(ConfigError, match=r"save\.keep_every=0"):
        SaveConfig(keep_every=0)
