"""A run under a time budget ends annealed and within it, whatever the speed does."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from lmkit.horizon import EVAL_RESERVE, EXIT_RESERVE_S, SETTLING_STEPS, Budget, Horizon

EVAL_S = 8.0


def train_to_the_end(budget: Budget, step_s: Callable[[int], float]) -> tuple[list[float], float]:
    """The progress after each step, and the time at the end."""
    horizon, now, progress = Horizon(1e-9), 50.0, []
    for step in range(1, 100_000):
        now += step_s(step)
        horizon = budget.refit(horizon, step, now - 50.0, now)
        progress.append(horizon.progress(step))
        if progress[-1] >= 1.0:
            return progress, now - 50.0
    raise AssertionError("it never ends")


@pytest.mark.parametrize("save_s", [0.0, 7.0])
@pytest.mark.parametrize(
    "step_s",
    [lambda step: 0.5, lambda step: 0.2 if step < 200 else 1.0, lambda step: 2.0 if step < 20 else 0.1],
    ids=["steady", "slower later", "faster later"],
)
def test_a_run_ends_annealed_with_just_the_time_that_is_kept_back(
    step_s: Callable[[int], float], save_s: float
) -> None:
    progress, elapsed_s = train_to_the_end(Budget(300.0, None, eval_s=EVAL_S, save_s=save_s), step_s)
    kept_back_s = EVAL_RESERVE * EVAL_S + save_s + EXIT_RESERVE_S
    assert 300.0 - kept_back_s - 4.0 <= elapsed_s <= 300.0 - kept_back_s + 0.5
    assert progress == sorted(progress)
    assert max(b - a for a, b in itertools.pairwise(progress)) < 0.05  # never jumps, not to the end either


def test_a_number_of_steps_ends_a_run_that_has_time_left() -> None:
    progress, elapsed_s = train_to_the_end(Budget(1e6, 40), lambda step: 0.5)
    assert len(progress) == 40
    assert elapsed_s == 20.0


def test_a_run_without_time_ends_after_its_first_step() -> None:
    progress, _ = train_to_the_end(Budget(1.0, None), lambda step: 0.5)
    assert progress == [1.0]


def test_time_before_a_restart_says_nothing_about_a_step() -> None:
    budget = Budget(1000.0, None)
    budget.refit(Horizon(1e-9), 1, 0.0, 0.0)
    budget.restart()
    horizon = Horizon(1e-9)
    for step, now in ((1, 500.0), (2, 501.0), (3, 502.0), (4, 503.0)):
        horizon = budget.refit(horizon, step, now, now)
    last = 4 + (1000 - 503 - int(EXIT_RESERVE_S))
    assert horizon.progress(last - 1) < 1.0 == pytest.approx(horizon.progress(last))


def test_the_first_steps_which_are_slower_than_others_decide_nothing() -> None:
    budget, horizon = Budget(1000.0, None), Horizon(1e-9)
    for step in range(1, SETTLING_STEPS + 1):
        horizon = budget.refit(horizon, step, 100.0 * step, 100.0 * step)
    assert horizon == Horizon(1e-9)


def test_validation_takes_its_share_of_the_time_and_is_spread_over_the_run() -> None:
    budget = Budget(600.0, None, eval_s=3.0)
    assert budget.allows_eval(0.1, 0, 0.0, 100.0)
    assert not budget.allows_eval(0.1, 0, 0.0, 99.0)  # 3 % of it are less than 3 s
    assert not budget.allows_eval(0.1, 1, 3.0, 500.0)  # the second one is due at a fifth
    assert budget.allows_eval(0.2, 1, 3.0, 200.0)
    assert not budget.allows_eval(0.96, 3, 0.0, 570.0)  # the final one is near
