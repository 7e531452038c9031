"""Small checkpoints whose whole content is known by their step, saved without training."""

from __future__ import annotations

from pathlib import Path

import torch
from storing import save_checkpoint

from lmkit.store.checkpoint import Snapshot, load_checkpoint
from lmkit.store.runs import Run


def snapshot(step: int, loss: float | None = None) -> Snapshot:
    weights = torch.arange(400, dtype=torch.float32).reshape(20, 20) + step
    return Snapshot(
        step=step,
        model={"weight": weights, "bias": weights[0] * 0.1},
        optimizer={"weight/momentum": weights * 2},
        state={"valid_nats_per_token": loss, "tokens": step * 1000},
        config={"model": {"kind": "tiny"}},
    )


def save(run: Run, step: int, loss: float | None = None, *, keep: int = 2) -> Path:
    return save_checkpoint(run, snapshot(step, loss), keep=keep)


def assert_is_snapshot(path: Path) -> None:
    """Everything in the checkpoint is what ``snapshot`` of its step gives."""
    loaded = load_checkpoint(path, with_optimizer=True)
    expected = snapshot(loaded.step)
    assert all(torch.equal(loaded.model[name], tensor) for name, tensor in expected.model.items())
    assert all(torch.equal(loaded.optimizer[name], tensor) for name, tensor in expected.optimizer.items())
    assert loaded.state["tokens"] == loaded.step * 1000
