"""How far a run has come and when it ends: after a number of steps, or when its time is over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from lmkit.config.training import Average, TrainConfig

NUM_EVALS = 10
"""Evaluations over a run where eval.every_steps is null."""
MIN_STEPS_BETWEEN_EVALS = 20
"""Short runs evaluate less often than that."""
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
        """Share of the run (0 to 1) done after ``step`` updates.

        To 12 digits, so that a share like 0.8 is reached by the very step: 28 times 1/35 is 0.7999999999999999.
        """
        done = round(self.fit_progress + (step - self.fit_step) * self.per_step, 12)
        return 1.0 if done > 1.0 - 1e-9 else max(0.0, done)

    def refit(self, step: int, steps_left: float) -> None:
        """From ``step`` on, reach 1 after ``steps_left`` more updates."""
        self.fit_progress, self.fit_step = self.progress(step), step
        self.per_step = (1.0 - self.fit_progress) / max(steps_left, 1.0)


@dataclass
class Budget:
    """A run's time, and what it still allows.

    The time of a step is the mean of this session's, all else included, from the last of ``changes_at`` on.
    """

    seconds: float
    """Wall-clock time of the whole run, preparation and final evaluation included."""
    max_steps: int | None
    """Steps after which the run ends even if there is time left."""
    eval_s: float = 0.0
    """How long an evaluation takes, as far as is known."""
    save_s: float = 0.0
    """How long the saves at the end take, as far as is known."""
    reserve_s: float = 0.0
    """What else is kept back for the end."""
    changes_at: Sequence[float] = ()
    """Shares of the run from which on a step takes another time."""
    step_s: float = 0.0
    """The time of a step as it was last known, in a session before this one at first; 0: not known."""
    _first: tuple[int, float] | None = None
    """Step and time when the time of a step began to be measured."""
    _progress: float = 0.0
    """The share of the run that was done when it was last fitted."""

    def refit(self, horizon: Horizon, step: int, elapsed_s: float, now: float) -> Horizon:
        """The horizon that ends with the time, after ``step`` steps and ``elapsed_s`` of it.

        now: time.monotonic().
        """
        progress = horizon.progress(step)
        if self._first is None or any(self._progress < at <= progress for at in self.changes_at):
            self._first = (step, now)
        self._progress = progress
        first_step, first_now = self._first
        if step > first_step:
            self.step_s = (now - first_now) / (step - first_step)
        steps_left = self.left_s(elapsed_s) / max(self.step_s, 1e-6)
        if self.max_steps is not None:
            steps_left = min(steps_left, self.max_steps - step)
        if steps_left < 1.0:
            return Horizon(0.0, step, 1.0)
        if step >= first_step + SETTLING_STEPS:
            horizon.refit(step, steps_left)
        return horizon

    def left_s(self, elapsed_s: float) -> float:
        """Seconds left for training after ``elapsed_s`` of the run."""
        return self.seconds - elapsed_s - EVAL_RESERVE * self.eval_s - self.save_s - self.reserve_s - EXIT_RESERVE_S

    def is_over(self, elapsed_s: float) -> bool:
        """Whether there is no time for another step after ``elapsed_s`` of the run."""
        return self.left_s(elapsed_s) < self.step_s

    def was_too_short(self, step: int) -> bool:
        """Whether time has ended a run of ``step`` steps, of which a new one makes one in any case, before any step
        was made by a horizon that was fitted to it: the learning rate has not come down."""
        return step <= 2 + SETTLING_STEPS and (self.max_steps is None or step < self.max_steps)

    def prolonged(self, step: int, elapsed_s: float) -> Horizon:
        """The horizon of a run that had come to its end and has got more time: what was done is that share of it.

        It stays at its end if there is no time left.
        """
        share = elapsed_s / self.seconds
        return Horizon(1e-9, step, share) if self.left_s(elapsed_s) > 0 else Horizon(0.0, step, 1.0)

    def allows_eval(self, progress: float, num_evals: int, eval_s: float, elapsed_s: float) -> bool:
        """Whether to evaluate now, after ``num_evals`` evaluations, which took ``eval_s`` of ``elapsed_s``."""
        if not (num_evals + 1) / NUM_EVALS <= progress <= 1.0 - 0.5 / NUM_EVALS:
            return False
        return eval_s + self.eval_s <= EVAL_SHARE * elapsed_s

    def restart(self) -> None:
        """Measure the time of a step anew, since the run has gone back to an earlier one."""
        self._first = None


def steps_between_evals(train: TrainConfig, max_steps: int | None, steps_per_epoch: int) -> int:
    """Where eval.every_steps is null and there is no time budget: ten evaluations a run; at least one an epoch for
    NT-ASGD, whose trigger looks back a number of evaluations."""
    every = math.ceil((max_steps or 1) / NUM_EVALS)
    if train.average is Average.nt_asgd:
        every = min(every, steps_per_epoch)
    return max(MIN_STEPS_BETWEEN_EVALS, every)


def last_step(train: TrainConfig, steps_per_epoch: int) -> int | None:
    """Batches after which a run ends at the latest; None if only the clock ends it."""
    limits = [] if train.max_steps is None else [train.max_steps]
    epochs = train.epochs_limit
    if epochs is not None:
        limits.append(max(1, math.ceil(Fraction(str(epochs)) * steps_per_epoch)))  # as floats 1.1 x 10 is above 11
    return min(limits) if limits else None
