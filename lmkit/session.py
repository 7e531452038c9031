"""A training run from start to end: when to log, evaluate, save and stop. All commands that train call it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmkit.config.training import EvalConfig, LogConfig, NonFinite, SaveConfig, TrainConfig
from lmkit.console import Console, Progress, format_duration, format_number, plural
from lmkit.data.batches import Ahead
from lmkit.device import give_back_freed_memory
from lmkit.due import ANOTHER, Due
from lmkit.errors import DivergedError, StoppedError, is_out_of_memory, undetermined
from lmkit.judging import Interrupted, judge
from lmkit.signals import StopRequests
from lmkit.snapshots import restore_trainer, snapshot_of, state_in
from lmkit.store.checkpoint import Snapshot, list_checkpoints, load_latest
from lmkit.store.incidents import out_of_memory, record_batch, resume_command
from lmkit.store.runs import Run
from lmkit.store.saving import NoSaves, Saves
from lmkit.tasks import Task, Validation
from lmkit.timing import Timing
from lmkit.train import StepReport, Trainer, TrainState, fit
from lmkit.window import Window

OFFER_EVERY_S = 600.0
"""Where save.every_steps is null: a state is offered to be saved after an evaluation, and after so long without one."""


@dataclass
class Session:
    """One process's part of a run: the trainer, its data and the policy.

    Of several processes that train together the first one watches the clock, validates, saves and says what happens;
    the others do as it decides, at the same step.
    """

    run: Run
    trainer: Trainer
    timing: Timing
    stored_config: dict[str, Any]
    train: TrainConfig
    log: LogConfig
    eval: EvalConfig
    save: SaveConfig
    console: Console
    stop: StopRequests
    command: Sequence[str]
    """The command line, for the advice on how to go on."""
    _window: Window = field(default_factory=Window)
    _last: Validation | None = None
    _shown: dict[str, str] = field(default_factory=dict)
    """What was logged last, for people."""
    _last_save_s: float = field(default_factory=time.monotonic)
    """When a state was last saved or offered."""

    def __post_init__(self) -> None:
        self.task: Task = self.trainer.task
        self.world = self.trainer.world
        self.batches = Ahead(self.task.batches, self.train.workers)
        self._first_step = self.state.step

    @property
    def state(self) -> TrainState:
        """The trainer's; a rollback puts another one in its place."""
        return self.trainer.state

    def execute(self) -> Validation:
        """Train to the end, saving on the way; returns the last validation.

        Raises StoppedError after saving if a signal or a time limit asked to stop; DivergedError with the last
        checkpoint untouched; ResourceError if memory ran out or the last state could not be saved.
        """
        give_back_freed_memory()
        self.timing.measure_validation()
        with self._saves() as saves, self._bar() as bar, self.batches, self._saved_without_memory(saves, bar):
            self.stop.deferring = True
            if self.train.nonfinite is NonFinite.rollback and not list_checkpoints(self.run.path):
                saves.save(self._snapshot())  # so that there is a place to go back to
            state = self.state
            if state.data_changes[-1:] == [state.step] and state.horizon.progress(state.step) < 1.0:
                state.eval_pending = False  # it was to be of the data before
            due_now = self.timing.has_run_out() or state.eval_pending
            over = due_now and self._finish_step(self._due(saves), saves, bar)
            if over or self._out_of_patience():
                return self._last_validation()
            self._window.started = time.monotonic()
            self.timing.count(self._window.started)  # what has come before is no part of the first step
            for report in fit(self.trainer, self.batches):
                self._window.reports.append(report)
                self.timing.follow()
                saves.poll()
                due = self._due(saves)
                if (due.anything or not self.trainer.reads_late) and not self._all_good(saves, bar):
                    continue
                if self._finish_step(due, saves, bar):
                    break
            self._say_if_too_short()
            return self._last_validation()

    def _finish_step(self, due: Due, saves: Saves, bar: Progress) -> bool:
        """Log, evaluate, save, stop, as it is due; True if the run has come to its end."""
        done, state = due.done, self.state
        if due.log and self._window.reports:
            self._log(bar)
        if due.evaluate:
            state.eval_pending = True
            if due.stop is None and self._evaluate():
                self._show(bar)
                done = done or self._out_of_patience()
        stop = due.stop or (self._stop_requested() if due.evaluate else None)
        if stop is not None and not (done and not state.eval_pending):
            since = time.monotonic()
            saves.finish(self._snapshot(), best=self._is_best())
            self._window.started += time.monotonic() - since
            if self._window.reports:
                self._log(bar)  # of these steps nothing else would ever be logged
            self._raise_stopped(stop)
        if done:
            saves.finish(self._snapshot(), best=self._is_best())
            return True
        asked = due.asked
        if due.save or asked is not None:
            saves.save(self._snapshot(), best=self._is_best())
        elif due.offer:
            saves.offer(self._snapshot(), best=self._is_best())
        if due.save or due.offer:
            self._last_save_s = time.monotonic()
        if asked is not None:
            self.run.journal("signal", {"signal": asked, "step": state.step})
            self.console.say(f"saving step {state.step} because of {asked}; training goes on")
        return False

    # When

    def _due(self, saves: Saves) -> Due:
        step = self.state.step
        done = self.state.horizon.progress(step) >= 1.0
        evaluate = done or self.state.eval_pending or self.timing.eval_due(self.eval.every_steps)
        wanted = self.save.every_steps
        offer = wanted is None and (evaluate or time.monotonic() - self._last_save_s >= OFFER_EVERY_S)
        every = self.save.keep_every if wanted is None else wanted
        save = saves.retry_due or (every is not None and step % every == 0)
        two_saves_s = 2 * saves.last_s  # one in flight or waiting, and the last one
        self.stop.notice_s = self.timing.last_step_s + two_saves_s
        if self.timing.budget is not None:
            self.timing.budget.save_s = two_saves_s
        log, asked = done or step % self.log.every_steps == 0, self.stop.take_save_request()
        due = Due(done, log, evaluate, save, offer, self.stop.requested, asked)
        due, self.state.horizon = due.agreed(self.world, self.state.horizon)
        return due

    def _stop_requested(self) -> str | None:
        """What asks any of the processes to stop."""
        requested = self.stop.requested
        _, (anywhere,) = self.world.agree([], [requested is not None])
        return (requested or ANOTHER) if anywhere else None

    def _say_if_too_short(self) -> None:
        """Tell people of a time budget that was over before the learning rate could be fitted to it."""
        if not self.timing.was_too_short():
            return
        steps = plural(self.state.step, "step")
        self.console.warn(
            f"train.budget={self.train.budget} was over after {steps}, too soon to fit the learning rate to it (the run"
            f" has taken {format_duration(self.state.elapsed_s)} so far): give it more time"
        )

    def _out_of_patience(self) -> bool:
        losses = self.state.losses_by_data()[-1]
        patience = self.train.patience
        out = patience is not None and bool(losses) and len(losses) - 1 - int(np.argmin(losses)) >= patience
        if out:
            self.console.say(f"stopping early: no better validation loss in {patience} evaluations")
        return out

    # What

    def _bar(self) -> Progress:
        if self.timing.budget is None:
            return self.console.progress(self.timing.max_steps, "training")
        return self.console.progress(round(self.timing.budget.seconds), "training (s)")

    def _saves(self) -> Saves:
        if not self.world.is_first:
            return NoSaves()
        on_cpu = self.trainer.device.torch_device.type == "cpu"
        return Saves(self.run, self.task.tokenizer, self.save, self.console.warn, shares_cores=on_cpu)

    def _log(self, bar: Progress) -> None:
        """Write the means of the steps since the last line to metrics.jsonl and show them."""
        state, memory = self.state, self.trainer.device.peak_bytes()
        row = self._window.close(time.monotonic())
        row |= {
            "epoch": row["step"] / self.batches.steps_per_epoch,
            "num_targets": state.num_targets,
            "elapsed_s": state.elapsed_s,
            "skipped": len(state.skipped_steps),
            "memory_bytes": memory,
        }
        self.run.log_metrics(row)
        self._shown = {
            "step": str(row["step"]),
            "loss": f"{row['loss']:.3f}",
            **dict([self.task.shown(row["loss"])]),
            f"{self.task.unit}s/s": format_number(row["tokens_per_s"]),
            "lr": f"{row['lr']:.2g}",
            "mem": f"{memory / 2**20:.0f}M",
        }
        if state.skipped_steps:
            self._shown["skipped"] = str(len(state.skipped_steps))
        self._show(bar)

    def _show(self, bar: Progress) -> None:
        """What was logged last, beside the newest validation, which may be of a later moment."""
        state, fields = self.state, dict(self._shown)
        if not fields:
            return
        if state.valid_losses:
            name, value = self.task.shown_valid(state.valid_losses[-1])
            fields[name] = value
        if self.timing.budget is None:
            bar.update(state.step, **fields)
        else:
            left_s = max(0.0, self.timing.budget.seconds - state.elapsed_s)
            bar.update(round(state.elapsed_s), **fields, eta=format_duration(left_s))

    def _evaluate(self) -> bool:
        """Validate; False if the run is to stop instead. What was done so far is then done again after resuming."""
        try:
            self._validate()
        except Interrupted:
            return False
        self.state.eval_pending = False
        return True

    def _last_validation(self) -> Validation:
        """The validation of the last step, which may have been done before this session."""
        if self._last is None and not self._evaluate():
            self._raise_stopped(self.stop.requested or "")
        return self._last or self._validate()

    def _validate(self) -> Validation:
        """Judge the model and record it. Raises Interrupted if the run is to stop."""
        found, sample, took_s = judge(self.trainer, self.stop, self.run, sample_tokens=self.eval.sample_tokens)
        state = self.state
        self.timing.count_validation(took_s)
        if state.valid_steps[-1:] != [state.step]:  # else it is done again, for the result of a run that was at its end
            state.valid_losses.append(found.loss)
            state.valid_steps.append(state.step)
            row: dict[str, Any] = {"step": state.step, "valid_loss": found.loss, **found.metrics}
            if sample is not None:
                row["sample"] = sample
            self.run.log_metrics({**row, "elapsed_s": state.elapsed_s})
        self.console.say(f"step {state.step}  {found.text}  ({format_duration(took_s)})")
        self._window.started += took_s
        self._last = found
        return found

    def _is_best(self) -> bool:
        """Whether the last validation was of this step, and none on these data was better."""
        state, losses = self.state, self.state.losses_by_data()[-1]
        return bool(losses) and state.valid_steps[-1:] == [state.step] and losses[-1] == min(losses)

    def _snapshot(self) -> Snapshot:
        """What there is to save; taken in all processes at once."""
        return snapshot_of(self.trainer, self.stored_config)

    def _raise_stopped(self, name: str) -> None:
        self.run.journal("stopped", {"signal": name, "step": self.state.step})
        raise StoppedError(
            f"stopped by {name} after step {self.state.step}; everything is saved in {self.run.path}",
            f"go on with: {resume_command(self.command, self.run.path)}",
        )

    # What goes wrong

    def _all_good(self, saves: Saves, bar: Progress) -> bool:
        """Look at the reports that were not read yet; False if the run has gone back to a checkpoint."""
        for report in self._window.unread():
            if report.left_out and not self._leave_out(report, saves, bar):
                return False
        return True

    def _leave_out(self, report: StepReport, saves: Saves, bar: Progress) -> bool:
        """Deal with a batch that changed nothing since it was not finite, as configured; False after a rollback."""
        state, policy = self.state, self.train.nonfinite
        state.skipped_steps.append(report.step)
        state.num_targets -= report.num_targets
        file = self._record_batch(report)
        self.run.journal("nonfinite", {"step": report.step, "policy": policy.name, "file": file})
        finite = math.isfinite(report.loss) and math.isfinite(report.grad_norm)
        what = (
            f"step {report.step} is {'a spike' if finite else 'not finite'} (loss {report.loss:.4g}, gradient norm"
            f" {report.grad_norm:.4g}, learning rate {report.lr:.3g}); its batch is in {file}"
        )
        if policy is NonFinite.stop or len(state.skipped_steps) > self.train.max_skips:
            self._window.drop_unread()
            self._log(bar)
            if policy is not NonFinite.stop:
                what += f"; more than train.max_skips={self.train.max_skips} batches were left out"
            raise DivergedError(
                f"{what}; the update was not made",
                "lower optimizer.lr, lengthen the warm-up, clip with optimizer.clip_norm, or set train.nonfinite=skip",
            )
        if policy is NonFinite.skip:
            self.console.warn(f"{what}; skipped")
            return True
        self._roll_back(saves)
        self.console.warn(f"{what}; back to step {self.state.step}, to go on without it")
        return False

    def _record_batch(self, report: StepReport) -> str:
        """Write the batch of a step as ids and text into the run directory; returns the file's name."""
        if not self.world.is_first:
            return ""
        numbers = {"step": report.step, "loss": report.loss, "grad_norm": report.grad_norm, "lr": report.lr}
        rows = self.batches[report.step - 1].rows(self.task.tokenizer.decode)
        try:
            return record_batch(self.run.path, {**numbers, "rows": rows, "config": self.stored_config}).name
        except OSError as error:
            self.console.warn(f"the batch of step {report.step} is not recorded: {error.strerror or error}")
            return "no file"

    def _roll_back(self, saves: Saves) -> None:
        """Go back to the newest checkpoint, keeping the list of the batches to leave out."""
        saves.flush()
        self.world.wait()
        found = load_latest(self.run.path, self.console.warn, shared=self.world.local_size > 1)
        if found is None:
            raise DivergedError("there is no checkpoint to go back to", "set train.nonfinite=skip")
        before, self.trainer.state = self.state, state_in(found[1])
        state = self.state
        state.skipped_steps = sorted({*state.skipped_steps, *before.skipped_steps})
        state.eval_s, state.data_changes = before.eval_s, before.data_changes
        if state.data_changes[-1:] == [state.step]:
            state.eval_pending = False  # it was to be of the data before
        if state.eval_pending and state.step in before.valid_steps:  # the run was stopped before it, and has done it
            known = before.valid_steps.index(state.step) + 1
            state.valid_steps, state.valid_losses = before.valid_steps[:known], before.valid_losses[:known]
            state.eval_pending = False
        restore_trainer(self.trainer, found[1].model, found[1].optimizer)
        self.run.cut_metrics(self.state.step)
        self.run.journal("rollback", {"step": self.state.step, "skipped": self.state.skipped_steps})
        saves.step = None
        self.timing.restart()
        self._window.clear(time.monotonic())

    @contextlib.contextmanager
    def _saved_without_memory(self, saves: Saves, bar: Progress) -> Iterator[None]:
        """Where memory runs out, save the last whole step and say what would fit; save it, too, where torch refuses an
        operation under device.deterministic."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            refused = undetermined(error)
            if refused is None and not is_out_of_memory(error):
                raise
            trainer, state = self.trainer, self.state
            trainer.optimizer.zero_grad(set_to_none=True)
            swapping = state.eval_pending and trainer.average is not None
            alone = self.world.size == 1  # others wait elsewhere
            if alone and not trainer.updating and not swapping and self._all_good(saves, bar):
                saves.finish(self._snapshot(), best=self._is_best())
            else:
                saves.flush()
            if refused is not None:
                raise refused from error
            where = f"the validation after step {state.step}" if state.eval_pending else f"step {state.step + 1}"
            batch_size = self.train.batch_size
            shape = (batch_size, batch_size // self.world.size, trainer.micro_batch_size)
            length = self.task.length_limit(self.train)
            path, saved = self.run.path, self._first_step if saves.step is None else saves.step
            raise out_of_memory(
                error, self.command, path, where=where, shape=shape, length=length, saved=saved
            ) from error
