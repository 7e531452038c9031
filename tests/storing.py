"""What the tests of runs and checkpoints share: a run, a tokenizer that stands for any, a save that is waited for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lmkit.store.checkpoint import Snapshot
from lmkit.store.checkpoint_writer import CheckpointWriter, SavableTokenizer
from lmkit.store.found import CHECKPOINTS
from lmkit.store.manifest import step_directory
from lmkit.store.runs import Run


class ByteTokenizer:
    """The smallest tokenizer that can be saved."""

    digest = "ab" * 32

    def save(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text('{"kind": "byte"}', encoding="utf-8")


def open_run(path: Path, *, resume: bool = False, warn: Callable[[str], None] = pytest.fail) -> Run:
    """A run in a given directory, new or gone on with."""
    return Run.create(path, root=path.parent, dataset="d", model="m", resume=resume, warn=warn)


def save_checkpoint(run: Run, snapshot: Snapshot, tokenizer: SavableTokenizer | None = None, *, keep: int) -> Path:
    """Save one snapshot now and return its directory."""
    made = ByteTokenizer() if tokenizer is None else tokenizer
    with CheckpointWriter(run, made, keep=keep, warn=print) as writer:
        writer.submit(snapshot)
    return run.path / CHECKPOINTS / step_directory(snapshot.step)
