"""The time of a run over sessions and rollbacks."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmkit.config.training import TrainConfig
from lmkit.horizon import Horizon
from lmkit.timing import Timing
from lmkit.train import StepReport, TrainState
from lmkit.window import Window


def timing_of(state: TrainState, budget: str | None = None, *, longer: bool = False) -> Timing:
    task = SimpleNamespace(batches=SimpleNamespace(steps_per_epoch=10), pace_changes_at=[])
    trainer: Any = SimpleNamespace(state=state, task=task, frozen_until={})
    train = TrainConfig(max_steps=20) if budget is None else TrainConfig(budget=budget)
    return Timing(trainer=trainer, train=train, started=100.0, longer=longer)


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


@pytest.mark.parametrize(("num_evals", "stopped_at"), [(10, 100), (3, 100), (10, 75)])
def test_a_run_that_gets_more_time_after_its_end_is_validated_at_each_tenth_of_what_is_left(
    num_evals: int, stopped_at: int
) -> None:
    """It had 1180 s, is at its end there, and gets 2400: each step is a hundredth of them. It may be stopped on the
    way."""
    state = TrainState(step=49, elapsed_s=1180.0, horizon=Horizon(0.0, 49, 1.0), valid_losses=[3.0] * num_evals)
    timing, found = timing_of(state, "40m", longer=True), list[int]()
    assert state.horizon.progress(49) == pytest.approx(1180 / 2400)
    for step in range(50, 100):
        if step == stopped_at:
            timing = timing_of(TrainState.from_json(timing.state.to_json()), "40m")
        timing.state.step, timing.state.horizon = step, Horizon(0.01)
        if timing.eval_due(None):
            found.append(step)
            timing.state.valid_losses.append(3.0)
    assert found == [60, 70, 80, 90]


def test_a_validation_that_waited_for_its_time_is_not_followed_by_another_at_once() -> None:
    """Of 1800 s it was believed to take 38; it takes 10, and twice as long is still within its share of the time."""
    timing, found = timing_of(TrainState(), "30m"), list[int]()
    assert timing.budget is not None
    timing.budget.eval_s, state = 38.0, timing.state
    for step in range(1, 101):
        state.step, state.elapsed_s, state.horizon = step, 18.0 * step, Horizon(0.01)
        if timing.eval_due(None):
            found.append(step)
            timing.count_validation(10.0)
            state.valid_steps.append(step)
            state.valid_losses.append(3.0)
    assert found == [71, 80, 90]


def test_the_speed_after_a_rollback_is_that_of_the_steps_behind_it() -> None:
    report = StepReport(3, 100, 0.1, 0.5, torch.zeros(2), torch.zeros((), dtype=torch.bool))
    window = Window([report], started=10.0)
    window.clear(50.0)
    window.reports.append(report)
    assert window.close(60.0)["tokens_per_s"] == 10.0
