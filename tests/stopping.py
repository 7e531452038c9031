"""What the tests of stopping and going on share: a signal after a step, and what a run has left, bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmkit.store.checkpoint import latest_checkpoint, load_checkpoint
from lmkit.store.manifest import step_directory
from lmkit.timing import Timing


def signal_after(patch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send a signal to this process when a step is done, as a scheduler or a terminal would."""
    original = Timing.follow

    def follow(self: Timing) -> None:
        original(self)
        if self.state.step == step:
            signal.raise_signal(number)

    patch.setattr(Timing, "follow", follow)


def tensors_in(run: Path, step: int | None = None, *, with_optimizer: bool = True) -> dict[str, Tensor]:
    """All tensors in the newest checkpoint of a run, which must be whole, or in that of a step."""
    path = latest_checkpoint(run, pytest.fail) if step is None else run / "checkpoints" / step_directory(step)
    assert path is not None
    snapshot = load_checkpoint(path, with_optimizer=with_optimizer)
    return {**snapshot.model, **snapshot.optimizer}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """The same names, and under each the same bits."""
    assert first.keys() == second.keys()
    assert [name for name, tensor in first.items() if not torch.equal(tensor, second[name])] == []
