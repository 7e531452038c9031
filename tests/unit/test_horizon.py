"""A run under a time budget ends annealed and within it, whatever the speed does."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from lmkit.config.training import Average, TrainConfig
from lmkit.horizon import (
    EVAL_RESERVE,
    EXIT_RESERVE_S,
    MIN_STEPS_BETWEEN_EVALS,
    SETTLING_STEPS,
    Budget,
    Horizon,
    last_step,
    steps_between_evals,
)

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


def test_a_run_whose_last_part_is_slower_is_annealed_to_its_end() -> None:
    """As with softmax.exact_from; by the mean of the whole run it would come to its end with 3 % left to anneal."""
    budget, horizon, now, progress = Budget(3000.0, None, changes_at=[0.9]), Horizon(1e-9), 0.0, [0.0]
    while progress[-1] < 1.0:
        now += 0.5 if progress[-1] < 0.9 else 3.0
        horizon = budget.refit(horizon, len(progress), now, now)
        progress.append(horizon.progress(len(progress)))
    assert now <= 3000.0
    assert progress[-2] > 0.99
    last = [b - a for a, b in itertools.pairwise(progress[:-1]) if a > 0.95]
    assert max(last) < 1.5 * min(last)


def test_what_is_kept_back_for_the_end_is_not_trained_away() -> None:
    _, elapsed_s = train_to_the_end(Budget(300.0, None, reserve_s=40.0), lambda step: 0.5)
    assert 300.0 - 40.0 - EXIT_RESERVE_S - 2.0 <= elapsed_s <= 300.0 - 40.0 - EXIT_RESERVE_S


def test_a_run_that_gets_more_time_goes_on_from_its_share_of_it_or_stays_at_its_end() -> None:
    assert Budget(1200.0, None).prolonged(70, 590.0).progress(70) == pytest.approx(590 / 1200)
    assert Budget(500.0, None).prolonged(70, 590.0).progress(70) == 1.0
    assert Budget(600.0, None, reserve_s=20.0).prolonged(70, 590.0).progress(70) == 1.0


def test_nt_asgd_is_looked_after_each_epoch() -> None:
    plain, asgd = TrainConfig(), TrainConfig(average=Average.nt_asgd)
    assert steps_between_evals(plain, 332_000, 664) == 33_200
    assert steps_between_evals(asgd, 332_000, 664) == 664
    assert steps_between_evals(asgd, 1_000, 664) == 100
    assert steps_between_evals(asgd, 1_000, 5) == MIN_STEPS_BETWEEN_EVALS


def test_a_number_of_steps_ends_a_run_that_has_time_left() -> None:
    progress, elapsed_s = train_to_the_end(Budget(1e6, 40), lambda step: 0.5)
    assert len(progress) == 40
    assert elapsed_s == 20.0


def test_a_run_without_time_ends_after_its_first_step() -> None:
    progress, _ = train_to_the_end(Budget(1.0, None), lambda step: 0.5)
    assert progress == [1.0]


def test_a_budget_was_too_short_if_it_ended_the_run_before_a_step_was_made_by_a_fitted_horizon() -> None:
    for step_s, num_steps, too_short in ((10.0, 1, True), (3.0, 2, True), (1.2, 5, True), (1.0, 7, False)):
        budget = Budget(10.0 + EXIT_RESERVE_S, None)
        progress, _ = train_to_the_end(budget, lambda step, step_s=step_s: step_s + (3.0 if step == 1 else 0.0))
        assert len(progress) == num_steps
        assert budget.was_too_short(num_steps) is too_short
        assert (progress[-2] < 0.01 if num_steps > 1 else True) is too_short
    assert not Budget(10.0, max_steps=1).was_too_short(1)


def test_a_session_that_knows_the_time_of_a_step_makes_none_for_which_there_is_no_time() -> None:
    budget = Budget(100.0, None, step_s=20.0)
    assert budget.is_over(75.1)  # 5 s are kept back for the end
    assert not budget.is_over(74.9)
    assert budget.refit(Horizon(0.01, 30, 0.5), 31, 75.1, 0.0).progress(31) == 1.0  # and no second one
    assert budget.refit(Horizon(0.01, 30, 0.5), 31, 74.9, 0.0).progress(31) == pytest.approx(0.51)
    assert not Budget(100.0, None).is_over(94.9)  # not known
    assert Budget(100.0, None).is_over(95.1)


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


@pytest.mark.parametrize(
    ("epochs", "steps_per_epoch", "steps"),
    [(1.1, 10, 11), (0.07, 100, 7), (0.55, 100, 55), (2.2, 25, 55), (13.0, 2324, 30212), (0.5, 47, 24), (1e-7, 10, 1)],
)
def test_a_run_of_some_epochs_makes_no_step_more_because_of_rounding(
    epochs: float, steps_per_epoch: int, steps: int
) -> None:
    assert last_step(TrainConfig(max_epochs=epochs), steps_per_epoch) == steps
