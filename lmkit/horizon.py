"""How far a run has come and when it ends: after a number of steps, or when its time is over."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lmkit.config.training import TrainConfig

NUM_EVALS = 10
"""Evaluations over a run where eval.every_steps is null."""
EVAL_SHARE = 0.03
"""Under a time budget, validation before the final one may take this share of the time."""
EVAL_RESERVE = 1.25
"""Under a time budget, the last evaluation may take this many times as long as the one before it."""
EXIT_RESERVE_S = 5.0
"""Under a time budget, kept back for what the clock does not see (loading torch) and for the final plot."""
SETTLING_STEPS = 3
"""Steps after the first one of a session, before which the time of a step says little."""


@dataclass
class Horizon:
    """How far the run has come, as a function of the step: a straight line that may be re-fitted to the clock.

    With a number of steps the line is step / max_steps. With a time budget the slope is fitted, again and again, to the
    time that is left, so that progress reaches 1 when the budget ends; it never jumps, so neither does the rate.
    """

    per_step: float
    fit_step: int = 0
    fit_progress: float = 0.0

    def progress(self, step: int) -> float:
        """Share of the run (0 to 1) done after ``step`` updates."""
        done = self.fit_progress + (step - self.fit_step) * self.per_step
        return 1.0 if done > 1.0 - 1e-9 else max(0.0, done)

    def refit(self, step: int, steps_left: float) -> None:
        """From ``step`` on, reach 1 after ``steps_left`` more updates."""
        self.fit_progress, self.fit_step = self.progress(step), step
        self.per_step = (1.0 - self.fit_progress) / max(steps_left, 1.0)


@dataclass
class Budget:
    """A run's time, and what it still allows. The time of a step is the mean of this session's, all else included."""

    seconds: float
    """Wall-clock time of the whole run, preparation and final evaluation included."""
    max_steps: int | None
    """Steps after which the run ends even if there is time left."""
    eval_s: float = 0.0
    """How long an evaluation takes, as far as is known."""
    save_s: float = 0.0
    """How long the saves at the end take, as far as is known."""
    _first: tuple[int, float] | None = None
    """Step and time when the first update was done."""

    def refit(self, horizon: Horizon, step: int, elapsed_s: float, now: float) -> Horizon:
        """The horizon that ends with the time, after ``step`` steps and ``elapsed_s`` of it.

        now: time.monotonic().
        """
        if self._first is None:
            self._first = (step, now)
        first_step, first_now = self._first
        step_s = (now - first_now) / max(step - first_step, 1)
        left_s = self.seconds - elapsed_s - EVAL_RESERVE * self.eval_s - self.save_s - EXIT_RESERVE_S
        steps_left = left_s / max(step_s, 1e-6)
        if self.max_steps is not None:
            steps_left = min(steps_left, self.max_steps - step)
        if steps_left < 1.0:
            return Horizon(0.0, step, 1.0)
        if step >= first_step + SETTLING_STEPS:
            horizon.refit(step, steps_left)
        return horizon

    def allows_eval(self, progress: float, num_evals: int, eval_s: float, elapsed_s: float) -> bool:
        """Whether to evaluate now, after ``num_evals`` evaluations, which took ``eval_s`` of ``elapsed_s``."""
        if not (num_evals + 1) / NUM_EVALS <= progress <= 1.0 - 0.5 / NUM_EVALS:
            return False
        return eval_s + self.eval_s <= EVAL_SHARE * elapsed_s

    def restart(self) -> None:
        """Measure the time of a step anew, since the run has gone back to an earlier one."""
        self._first = None


def last_step(train: TrainConfig, steps_per_epoch: int) -> int | None:
    """Batches after which a run ends at the latest; None if only the clock ends it."""
    limits = [] if train.max_steps is None else [train.max_steps]
    epochs = train.epochs_limit
    if epochs is not None:
        limits.append(max(1, math.ceil(epochs * steps_per_epoch)))
    return min(limits) if limits else None
