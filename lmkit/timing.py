"""The time of a run: what it has taken over all its sessions, and the end that it comes to by steps or by the clock."""

from __future__ import annotations

import time
from dataclasses import dataclass

from lmkit.config.training import TrainConfig
from lmkit.horizon import NUM_EVALS, Budget, Horizon, last_step, steps_between_evals
from lmkit.sharding import unsharded
from lmkit.train import Trainer, TrainState


@dataclass
class Timing:
    """Keeps the times and the horizon of a trainer's state up to date.

    ``started`` is the time.monotonic() at which the command began; a time budget counts from there.
    """

    trainer: Trainer
    train: TrainConfig
    started: float
    longer: bool = False
    """Whether the run goes on with another length than it had, so that its end may not be the end any more."""
    reserve_s: float = 0.0
    """What a time budget keeps back for the end, beside what validation and saving take."""
    last_step_s: float = 0.0
    """What the last step took, all else included."""

    def __post_init__(self) -> None:
        task = self.trainer.task
        self.steps_per_epoch, self._before_s = task.batches.steps_per_epoch, self.state.elapsed_s
        self.max_steps, budget_s = last_step(self.train, self.steps_per_epoch), self.train.budget_s
        self.budget = None
        if budget_s is not None:
            changes_at = {*task.pace_changes_at, *self.trainer.frozen_until.values()}
            self.budget = Budget(budget_s, self.max_steps, reserve_s=self.reserve_s, changes_at=sorted(changes_at))
            self.budget.step_s = self.state.step_s
        self._set_horizon()

    @property
    def state(self) -> TrainState:
        """The trainer's; a rollback puts another one in its place."""
        return self.trainer.state

    def _set_horizon(self) -> None:
        """A run by the clock keeps the horizon of its state, unless that was at its end and the run has got longer;
        another one ends with its last step."""
        state = self.state
        if self.budget is None:
            state.horizon = Horizon(1.0 / (self.max_steps or 1))
        elif state.step == 0:
            state.horizon = Horizon(1e-9)
        elif self.longer and state.horizon.progress(state.step) >= 1.0:
            state.horizon = self.budget.prolonged(state.step, state.elapsed_s)
            self._spread_evals(len(state.valid_losses))

    def _spread_evals(self, num_evals: int) -> None:
        """Take ``num_evals`` validations as one for each tenth of the run so far, however many those are."""
        self.state.evals_ahead = num_evals - round(NUM_EVALS * self.state.horizon.progress(self.state.step))

    def measure_validation(self) -> None:
        """Under a time budget, find out how long a validation takes; called in all processes at once."""
        if self.budget is not None:
            with unsharded(self.trainer.model):
                self.budget.eval_s = self.trainer.task.validation_s(
                    device=self.trainer.device, micro_batch_size=self.trainer.micro_batch_size
                )

    def count(self, now: float) -> float:
        """Bring the time of the run up to ``now`` (time.monotonic()); returns the seconds that were not counted yet."""
        before, self.state.elapsed_s = self.state.elapsed_s, self._before_s + now - self.started
        return self.state.elapsed_s - before

    def follow(self) -> None:
        """Count the time of a step and, under a time budget, fit the horizon to the time that is left."""
        now, state = time.monotonic(), self.state
        self.last_step_s = self.count(now)
        if self.budget is not None:
            state.horizon = self.budget.refit(state.horizon, state.step, state.elapsed_s, now)
            state.step_s = self.budget.step_s

    def count_validation(self, took_s: float) -> None:
        """Note what a validation of this step took.

        One that had to wait for its time is not followed by another at once: the next one is half a tenth away or more.
        """
        state = self.state
        state.eval_s += took_s
        state.elapsed_s += took_s
        if self.budget is not None:
            self.budget.eval_s = took_s
            self._spread_evals(len(state.valid_losses) + (state.step not in state.valid_steps[-1:]))

    def has_run_out(self) -> bool:
        """Whether a run that goes on has no time for another step; it is at its end then."""
        state = self.state
        if self.budget is None or state.step == 0 or state.horizon.progress(state.step) >= 1.0:
            return False
        self.count(time.monotonic())
        (over,), _ = self.trainer.world.agree([self.budget.is_over(state.elapsed_s)])
        if over:
            state.horizon = Horizon(0.0, state.step, 1.0)
        return bool(over)

    def was_too_short(self) -> bool:
        """Whether a time budget was over before the learning rate could be fitted to it."""
        step = self.state.step
        return self.budget is not None and self.state.horizon.progress(step) >= 1.0 and self.budget.was_too_short(step)

    def eval_due(self, every_steps: int | None) -> bool:
        """Whether to evaluate after the step that is done; every_steps: eval.every_steps."""
        state = self.state
        if every_steps is not None:
            return state.step % every_steps == 0
        if self.budget is None:
            return state.step % steps_between_evals(self.train, self.max_steps, self.steps_per_epoch) == 0
        progress, num_evals = state.horizon.progress(state.step), len(state.valid_losses) - state.evals_ahead
        return self.budget.allows_eval(progress, num_evals, state.eval_s, state.elapsed_s)

    def restart(self) -> None:
        """Go on after the trainer has been put back to an earlier step."""
        self._set_horizon()
        if self.budget is not None:
            self.budget.restart()
        self.count(time.monotonic())  # since that checkpoint more than a step has passed
