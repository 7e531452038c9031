"""What the fault tests share: lmkit in this process or in a child, a small corpus, and a finished run to damage."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import children
import pytest
import torch
from harness import Lmkit, Outcome, Start
from storing import open_run

from lmkit import cli
from lmkit.store.runs import Run


@pytest.fixture
def lmkit(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Lmkit]:
    """``lmkit(*words)`` runs a command line in this process, in an empty folder of its own."""
    monkeypatch.delenv("LMKIT_DATA", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    threads = torch.get_num_threads()

    def run(*words: str | Path) -> Outcome:
        capfd.readouterr()
        code = cli.main([str(word) for word in words])
        return Outcome(code, *capfd.readouterr())

    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 small texts."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    words = ["the", "cat", "dog", "bird", "sat", "ran", "flew", "on", "under", "a", "mat", "tree", "and", "über"]
    for number in range(24):
        lines = [" ".join(draw.choice(words) for _ in range(8)) + ".\n" for _ in range(8)]
        (folder / f"{number:02d}.txt").write_text("".join(lines), encoding="utf-8", newline="\n")
    return folder


@pytest.fixture(scope="session")
def small(corpus: Path) -> list[str]:
    """The words of a command line that trains a small model in a second: 12 steps, a checkpoint every 4."""
    return [
        "pretrain", "dataset=text", f"dataset.path={corpus}", "tokenizer=byte", "model=lstm", "model.d_embed=16",
        "model.d_hidden=24", "model.num_layers=1", "train.batch_size=4", "train.seq_len=16", "train.max_steps=12",
        "eval.every_steps=4", "log.every_steps=1", "device=cpu", "device.threads=1",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def _trained(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> Path:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main([*small, f"run.dir={run_dir}"]) == 0
    return run_dir


@pytest.fixture
def trained(_trained: Path, tmp_path: Path) -> Path:
    """A finished run of ``small``, to be damaged."""
    return Path(shutil.copytree(_trained, tmp_path / "trained"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """``start(*words, setup=[...])`` runs a command line in a child process, killed in the end at the latest."""
    if sys.platform == "win32":
        pytest.skip("needs fork")
    started: list[children.Child] = []

    def begin(
        *words: str | Path, setup: Sequence[children.Setup] = (), after: Sequence[children.Setup] = ()
    ) -> children.Child:
        before = [children.environment(LMKIT_DATA=None), *setup]
        started.append(children.Child(words, tmp_path / f"output{len(started)}", before, after))
        return started[-1]

    yield begin
    for child in started:
        child.process.kill()
        child.process.join()


@pytest.fixture
def ended(start: Start) -> Lmkit:
    """``ended(*words, setup=[...])`` does the same and waits for the end."""

    def run(*words: str | Path, setup: Sequence[children.Setup] = (), after: Sequence[children.Setup] = ()) -> Outcome:
        child = start(*words, setup=setup, after=after)
        return Outcome(child.wait(), child.text, child.text)

    return run


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run that has just begun, to save ``snapshots`` in."""
    with open_run(tmp_path / "run") as made:
        made.begin(seed=1, command=["pretrain"], digests={})
        yield made
