"""The time of a run over sessions and rollbacks."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmkit.config.training import TrainConfig
from lmkit.timing import Timing
from lmkit.train import StepReport, TrainState
from lmkit.window import Window


def timing_of(state: TrainState) -> Timing:
    task = SimpleNamespace(batches=SimpleNamespace(steps_per_epoch=10), pace_changes_at=[])
    trainer: Any = SimpleNamespace(state=state, task=task, frozen_until={})
    return Timing(trainer=trainer, train=TrainConfig(max_steps=20), started=100.0)


def test_time_counts_on_through_sessions_and_a_rollback_gives_none_of_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = timing_of(TrainState(step=4, elapsed_s=50.0))
    monkeypatch.setattr(time, "monotonic", lambda: 107.0)
    timing.follow()
    assert timing.state.elapsed_s == 57.0
    timing.trainer.state = TrainState(step=2, elapsed_s=45.0)  # that of a checkpoint from before
    monkeypatch.setattr(time, "monotonic", lambda: 109.0)
    timing.restart()
    assert timing.state.elapsed_s == 59.0
    assert timing.state.horizon.progress(2) == pytest.approx(0.1)
    monkeypatch.setattr(time, "monotonic", lambda: 110.0)
    timing.follow()
    assert timing.last_step_s == 1.0


def test_the_speed_after_a_rollback_is_that_of_the_steps_behind_it() -> None:
    report = StepReport(3, 100, 0.1, 0.5, torch.zeros(2), torch.zeros((), dtype=torch.bool))
    window = Window([report], started=10.0)
    window.clear(50.0)
    window.reports.append(report)
    assert window.close(60.0)["tokens_per_s"] == 10.0
