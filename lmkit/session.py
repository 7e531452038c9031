"""A training run from start to end: when to log, evaluate, save and stop. All commands that train call it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmkit.averaging import WeightAverage
from lmkit.config.training import EvalConfig, LogConfig, Order, SaveConfig, TrainConfig
from lmkit.console import Console, Progress, format_duration, format_number, plot_curves
from lmkit.data.batches import Lanes, Windows
from lmkit.data.prepared import PreparedData
from lmkit.errors import ConfigError, StoppedError
from lmkit.evaluation import Tally, perplexity
from lmkit.optim import load_optimizer_tensors, optimizer_tensors
from lmkit.signals import StopRequests
from lmkit.store.checkpoint import VALID_LOSS, Snapshot
from lmkit.store.checkpoint_writer import CheckpointWriter
from lmkit.store.runs import Run, read_metrics
from lmkit.train import Batches, Horizon, StepReport, Trainer, TrainState, fit

BUDGET_EVAL_SHARE = 0.06
"""Under a time budget, validation before the final one may take this share of the time."""
NUM_EVALS = 10
"""Evaluations over a run where eval.every_steps is null."""
MIN_STEPS_BETWEEN_EVALS = 20
"""Short runs evaluate less often than that."""
EXIT_RESERVE_S = 5.0
"""Under a time budget, kept back for what the clock does not see (loading torch) and for the final save and plot."""
CARRIED_SEGMENT = 1024
"""Tokens per forward pass in the validation of models with carried state; changes the speed only."""
PROBE_TOKENS = 4096
"""Under a time budget, validation is timed on this many tokens before the first step."""

IMMUTABLE = ("model", "tokenizer", "seed", "optimizer.kind", "train.batch_size", "train.seq_len", "train.order")
"""Keys that decide what a run computes: a run cannot be resumed with another value. The rest may change."""


@dataclass
class Session:
    """One process's part of a run: the trainer, its data and the policy.

    ``started`` is the time.monotonic() at which the command began; a time budget counts from there.
    """

    run: Run
    trainer: Trainer
    prepared: PreparedData
    stored_config: dict[str, Any]
    train: TrainConfig
    log: LogConfig
    eval: EvalConfig
    save: SaveConfig
    carries_state: bool
    console: Console
    started: float
    _eval_estimate_s: float = 0.0
    _first: tuple[int, float] | None = None
    """Step and time when this session's first update was done."""
    _window: list[StepReport] = field(default_factory=list)
    _window_start: float = 0.0
    _last_tally: Tally | None = None

    def __post_init__(self) -> None:
        self.state = self.trainer.state
        self.elapsed_before_s = self.state.elapsed_s
        self.batches = build_batches(self.prepared, self.train, self.trainer.seed, carries_state=self.carries_state)
        self.max_steps = self._max_steps()
        if self.train.budget_s is not None:
            self.state.horizon = self.state.horizon if self.state.step else Horizon(1e-9)
        else:
            self.state.horizon = Horizon(1.0 / (self.max_steps or 1))

    def _max_steps(self) -> int | None:
        """Updates after which the run ends at the latest; None if only the clock ends it."""
        limits = [] if self.train.max_steps is None else [self.train.max_steps]
        epochs = self.train.epochs_limit
        if epochs is not None:
            limits.append(max(1, math.ceil(epochs * self.batches.steps_per_epoch)))
        return min(limits) if limits else None

    def execute(self) -> Tally:
        """Train to the end, saving on the way; returns the last validation.

        Raises StoppedError after saving if a signal asked to stop, DivergedError with the last checkpoint untouched.
        """
        state = self.state
        self._window_start = time.monotonic()
        if self.train.budget_s is not None:
            self._eval_estimate_s = self._probe_validation()
        with self._writer() as writer, StopRequests() as stop, self._bar() as bar:
            for report in fit(self.trainer, self.batches):
                self._window.append(report)
                self._follow_clock()
                done = state.horizon.progress(report.step) >= 1.0
                if done or report.step % self.log.every_steps == 0:
                    self._log(bar)
                evaluate = done or self._eval_due(report.step)
                if evaluate:
                    self._validate()
                    done = done or self._out_of_patience()
                if done or stop.requested or self._save_due(report.step, evaluated=evaluate):
                    writer.submit(self._snapshot())
                if done:
                    break
                if stop.requested:
                    writer.close()
                    self._raise_stopped(stop.requested)
        return self._last_tally or self._validate()

    # When

    def _follow_clock(self) -> None:
        """Under a time budget, re-fit the horizon to the time that is left.

        The time of a step is the mean since the first one, saving and validation included.
        """
        now = time.monotonic()
        self.state.elapsed_s = self.elapsed_before_s + now - self.started
        if self.train.budget_s is None:
            return
        if self._first is None:
            self._first = (self.state.step, now)
        first_step, first_now = self._first
        step_s = (now - first_now) / max(self.state.step - first_step, 1)
        left_s = self.train.budget_s - self.state.elapsed_s - 1.1 * self._eval_estimate_s - EXIT_RESERVE_S
        steps_left = left_s / max(step_s, 1e-6)
        if self.max_steps is not None:
            steps_left = min(steps_left, self.max_steps - self.state.step)
        if steps_left < 1.0:
            self.state.horizon = Horizon(0.0, self.state.step, 1.0)
        elif self.state.step >= first_step + 3:
            self.state.horizon.refit(self.state.step, steps_left)

    def _eval_due(self, step: int) -> bool:
        if self.eval.every_steps is not None:
            return step % self.eval.every_steps == 0
        if self.train.budget_s is None:
            return step % max(MIN_STEPS_BETWEEN_EVALS, math.ceil((self.max_steps or 1) / NUM_EVALS)) == 0
        progress = self.state.horizon.progress(step)
        if not (len(self.state.valid_losses) + 1) / NUM_EVALS <= progress <= 1.0 - 0.5 / NUM_EVALS:
            return False
        return self.state.eval_s + self._eval_estimate_s <= BUDGET_EVAL_SHARE * self.state.elapsed_s

    def _save_due(self, step: int, *, evaluated: bool) -> bool:
        return evaluated if self.save.every_steps is None else step % self.save.every_steps == 0

    def _out_of_patience(self) -> bool:
        losses = self.state.valid_losses
        patience = self.train.patience
        out = patience is not None and len(losses) - 1 - int(np.argmin(losses)) >= patience
        if out:
            self.console.say(f"stopping early: no better validation loss in {patience} evaluations")
        return out

    # What

    def _bar(self) -> Progress:
        budget_s = self.train.budget_s
        total = self.max_steps if budget_s is None else round(budget_s)
        return self.console.progress(total, "training" if budget_s is None else "training (s)")

    def _writer(self) -> CheckpointWriter:
        return CheckpointWriter(self.run, self.prepared.tokenizer, keep=self.save.keep, warn=self.console.warn)

    def _log(self, bar: Progress) -> None:
        """Write the means of the steps since the last line to metrics.jsonl and show them."""
        window, self._window = self._window, []
        now = time.monotonic()
        num_targets = sum(r.num_targets for r in window)
        loss = sum(r.nats * r.num_targets for r in window) / max(num_targets, 1)
        tokens_per_s = num_targets / max(now - self._window_start, 1e-9)
        self._window_start = now
        state, last = self.state, window[-1]
        memory = self.trainer.device.peak_bytes()
        row = {
            "step": state.step,
            "epoch": state.step / self.batches.steps_per_epoch,
            "loss": loss,
            "lr": last.lr,
            "grad_norm": last.grad_norm,
            "num_targets": state.num_targets,
            "tokens_per_s": tokens_per_s,
            "elapsed_s": state.elapsed_s,
            "progress": last.progress,
            "memory_bytes": memory,
        }
        self.run.log_metrics(row)
        fields = {
            "step": str(state.step),
            "loss": f"{loss:.3f}",
            "ppl": format_number(_exp(loss)),
            "tok/s": format_number(tokens_per_s),
            "lr": f"{last.lr:.2g}",
            "mem": f"{memory / 2**20:.0f}M",
        }
        if state.valid_losses:
            fields["valid ppl"] = format_number(_exp(state.valid_losses[-1]))
        if self.train.budget_s is None:
            bar.update(state.step, **fields)
        else:
            left_s = max(0.0, self.train.budget_s - state.elapsed_s)
            bar.update(round(state.elapsed_s), **fields, eta=format_duration(left_s))

    def _validate(self) -> Tally:
        """Score the whole valid split and record it."""
        start = time.monotonic()
        with self._averaged():
            tally = self._score(self.prepared.splits["valid"].tokens)
        took_s = time.monotonic() - start
        loss = tally.nats / tally.num_tokens
        state = self.state
        state.eval_s += took_s
        state.elapsed_s += took_s
        self._eval_estimate_s = took_s
        state.valid_losses.append(loss)
        state.valid_steps.append(state.step)
        accuracy = tally.num_correct / tally.num_tokens
        row = {"step": state.step, "valid_loss": loss, "valid_ppl": _exp(loss), "valid_accuracy": accuracy}
        self.run.log_metrics({**row, "elapsed_s": state.elapsed_s})
        self.console.say(
            f"step {state.step}  valid loss {loss:.4f} nats/token  ppl {format_number(_exp(loss))} per token"
            f"  accuracy {100 * accuracy:.1f} %  ({format_duration(took_s)})"
        )
        self._window_start += took_s
        self._last_tally = tally
        return tally

    def _score(self, tokens: np.ndarray[Any, Any]) -> Tally:
        return perplexity(
            self.trainer.model,
            tokens,
            self.prepared.tokenizer.eos_id,
            carries_state=self.carries_state,
            context=self.train.seq_len,
            stride=self.train.seq_len,
            seq_len=max(self.train.seq_len, CARRIED_SEGMENT),
            batch_size=self.train.batch_size,
            device=self.trainer.device,
        )

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        average = self.trainer.average
        return contextlib.nullcontext() if average is None else average.applied(self.trainer.model)

    def _probe_validation(self) -> float:
        """Seconds that validation will take, from timing its first tokens."""
        tokens = self.prepared.splits["valid"].tokens
        probe = tokens[:PROBE_TOKENS]
        self._score(probe[:256])
        start = time.monotonic()
        self._score(probe)
        return (time.monotonic() - start) * len(tokens) / len(probe)

    def _snapshot(self) -> Snapshot:
        state = self.state
        state.scaler = self.trainer.scaler.state_dict()
        data = state.to_json()
        if state.valid_steps and state.valid_steps[-1] == state.step:
            data[VALID_LOSS] = state.valid_losses[-1]
        model, extra = trainer_tensors(self.trainer)
        return Snapshot(step=state.step, model=model, optimizer=extra, state=data, config=self.stored_config)

    def _raise_stopped(self, signal_name: str) -> None:
        self.run.journal("stopped", {"signal": signal_name, "step": self.state.step})
        raise StoppedError(
            f"stopped by {signal_name} after step {self.state.step}; everything is saved in {self.run.path}",
            f"the same command with run.dir={self.run.path} resume=true continues",
        )

    def plot(self) -> None:
        """Draw the curves of metrics.jsonl into loss.png; a failure is only a warning."""
        rows = read_metrics(self.run.path)
        curves = {
            name: ([r["step"] for r in rows if key in r], [r[key] for r in rows if key in r])
            for name, key in (("train loss", "loss"), ("valid loss", "valid_loss"), ("learning rate", "lr"))
        }
        try:
            plot_curves(self.run.path / "loss.png", curves, title=self.run.path.name)
        except (OSError, ValueError) as error:
            self.console.warn(f"no plot: {error}")


def build_batches(prepared: PreparedData, train: TrainConfig, seed: int, *, carries_state: bool) -> Batches:
    """Training batches in the configured order."""
    tokens, eos_id = prepared.splits["train"].tokens, prepared.tokenizer.eos_id
    lanes = train.order is Order.lanes or (train.order is Order.auto and carries_state)
    if lanes and not carries_state:
        raise ConfigError("train.order=lanes needs a model with carried state (lstm, gru)", "use train.order=windows")
    if lanes:
        return Lanes(tokens, eos_id, train.batch_size, train.seq_len)
    return Windows(tokens, eos_id, train.batch_size, train.seq_len, seed)


def trainer_tensors(trainer: Trainer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of a trainer: the weights to use (averaged if there is an average), and the rest for resuming."""
    model = dict(trainer.model.state_dict())
    extra = {f"optimizer/{k}": v for k, v in optimizer_tensors(trainer.optimizer, trainer.model).items()}
    for micro, carried in enumerate(trainer.carry):
        if carried is not None:
            extra.update({f"carry/{micro}/{name}": t for name, t in carried.tensors().items()})
    if trainer.average is not None:
        extra.update({f"raw/{name}": p.detach() for name, p in trainer.model.named_parameters()})
        average = trainer.average.tensors()
        storage_of = {p.data_ptr(): average[name] for name, p in trainer.model.named_parameters()}
        model = {name: storage_of.get(t.data_ptr(), t) for name, t in model.items()}
    return model, extra


def restore_trainer(trainer: Trainer, snapshot: Snapshot) -> None:
    """Put a snapshot back into a trainer that was built from the same configuration; the inverse of trainer_tensors."""
    device = trainer.device.torch_device
    trainer.model.load_state_dict(snapshot.model)
    parameters = dict(trainer.model.named_parameters())
    if trainer.average is not None:
        trainer.average = WeightAverage(trainer.model, trainer.average.decay)
    optimizer: dict[str, Any] = {}
    carried: dict[int, dict[str, Any]] = {}
    for key, tensor in snapshot.optimizer.items():
        part, _, name = key.partition("/")
        if part == "optimizer":
            optimizer[name] = tensor
        elif part == "carry":
            micro, _, slot = name.partition("/")
            carried.setdefault(int(micro), {})[slot] = tensor.to(device)
        elif part == "raw":
            parameters[name].data.copy_(tensor)
    load_optimizer_tensors(trainer.optimizer, trainer.model, optimizer)
    trainer.carry = [trainer.model.state_from_tensors(carried[micro]) for micro in sorted(carried)]


def check_resumable(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Differences between a stored and a new configuration that are allowed, as text.

    Raises ConfigError listing old and new value of every key that must not change.
    """
    before, after = dict(_flat(old)), dict(_flat(new))
    changed = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    fatal = [key for key in changed if any(key == k or key.startswith(f"{k}.") for k in IMMUTABLE)]
    if fatal:
        pairs = ", ".join(f"{key}: {before.get(key)} -> {after.get(key)}" for key in fatal)
        raise ConfigError(f"the run cannot be resumed with other values ({pairs})", "start a new run, or use finetune")
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in changed]


def _flat(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _exp(nats: float) -> float:
    """exp without overflow."""
    return math.exp(nats) if nats < 700 else math.inf


__all__ = ["Session", "TrainState", "build_batches", "check_resumable", "restore_trainer", "trainer_tensors"]
