"""The training loop: one generator of steps, for every model family and every command that trains."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lmkit.averaging import WeightAverage
from lmkit.config.training import OptimizerConfig, Precision, ScheduleConfig
from lmkit.data.batches import Batch
from lmkit.device import Device
from lmkit.errors import DivergedError
from lmkit.models.base import IGNORE, LanguageModel, State
from lmkit.objectives import Objective
from lmkit.optim import set_lr
from lmkit.rng import derive_key
from lmkit.schedules import lr_factor


class Batches(Protocol):
    """Training data as a function of the step."""

    steps_per_epoch: int

    def __getitem__(self, step: int) -> Batch: ...


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
class TrainState:
    """Everything beside tensors that a run needs to go on. Plain JSON values."""

    step: int = 0
    """Updates done."""
    num_targets: int = 0
    """Targets trained on, repeats counted."""
    elapsed_s: float = 0.0
    """Wall-clock time spent by the run, over all its sessions."""
    eval_s: float = 0.0
    """Part of it spent in validation."""
    horizon: Horizon = field(default_factory=lambda: Horizon(0.0))
    valid_losses: list[float] = field(default_factory=list)
    """Validation losses so far, nats per token, oldest first."""
    valid_steps: list[int] = field(default_factory=list)
    """The steps they belong to."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the fp16 gradient scaler."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainState:
        return cls(**{**data, "horizon": Horizon(**data["horizon"])})


@dataclass(frozen=True)
class StepReport:
    """What one update did."""

    step: int
    """Updates done, this one included."""
    nats: float
    """Loss per target of this batch, nats."""
    num_targets: int
    grad_norm: float
    """Global norm of the gradient before clipping; NaN where a scaled fp16 step was skipped."""
    lr: float
    """Learning rate of the first parameter group."""
    progress: float


@dataclass
class Trainer:
    """The parts of a run that change while it trains, and the step that changes them."""

    model: LanguageModel
    optimizer: Optimizer
    optimizer_config: OptimizerConfig
    schedule: ScheduleConfig
    objective: Objective
    device: Device
    seed: int
    micro_batch_size: int
    state: TrainState
    average: WeightAverage | None = None
    carry: list[State | None] = field(default_factory=list)
    """Carried model state of each micro-batch; empty for models without one."""

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        fp16 = self.device.precision is Precision.fp16
        self.scaler = torch.amp.GradScaler(self.device.torch_device.type, enabled=fp16)
        if self.state.scaler:
            self.scaler.load_state_dict(self.state.scaler)
        self.forward: nn.Module = self.model
        if self.device.compile:
            self.forward = torch.compile(self.model)  # type: ignore[assignment]

    def train_step(self, batch: Batch) -> StepReport:
        """One update from one global batch, cut into micro-batches.

        The gradient is that of the summed loss divided by the number of targets of the whole batch, so it does not
        depend on how the batch is cut. Dropout is keyed by (seed, step, micro-batch). Raises DivergedError before the
        update if loss or gradient is not finite; parameters and optimizer state are then those of the step before.
        """
        self.model.train()
        state, step = self.state, self.state.step
        progress = state.horizon.progress(step)
        factor = lr_factor(self.schedule, step, progress, state.valid_losses)
        set_lr(self.optimizer, factor)
        num_targets = int((batch.targets_BT != IGNORE).sum())
        nats, carry = self._accumulate(batch, num_targets)
        self.scaler.unscale_(self.optimizer)
        limit = self.optimizer_config.clip_norm
        norm = float(nn.utils.clip_grad_norm_(self.parameters, math.inf if limit is None else limit))
        skipped_fp16 = self.scaler.is_enabled() and not math.isfinite(norm)
        if not math.isfinite(nats) or not (math.isfinite(norm) or skipped_fp16):
            what = f"loss {nats:.4g} nats, gradient norm {norm:.4g}"
            raise DivergedError(
                f"step {step + 1} is not finite ({what}) at learning rate {self.lr():.3g}",
                "the update was not made; lower optimizer.lr, lengthen the warm-up or clip with optimizer.clip_norm",
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.carry = carry
        state.step, state.num_targets = step + 1, state.num_targets + num_targets
        if self.average is not None:
            self.average.update(self.model, state.step)
        return StepReport(state.step, nats, num_targets, norm, self.lr(), state.horizon.progress(state.step))

    def _accumulate(self, batch: Batch, num_targets: int) -> tuple[float, list[State | None]]:
        """Add up the gradients of the micro-batches; return the loss per target and the new carried states."""
        size, target_device = self.micro_batch_size, self.device.torch_device
        total: Tensor | float = 0.0
        carry: list[State | None] = []
        for micro, start in enumerate(range(0, batch.inputs_BT.shape[0], size)):
            torch.manual_seed(derive_key(self.seed, "dropout", self.state.step, micro))
            inputs_BT = batch.inputs_BT[start : start + size].to(target_device, non_blocking=True)
            targets_N = batch.targets_BT[start : start + size].to(target_device, non_blocking=True).reshape(-1)
            fresh = batch.starts_text or micro >= len(self.carry)
            with self.device.autocast():
                hidden_BTD, new_state = self.forward(inputs_BT, None if fresh else self.carry[micro])
                loss = self.objective(self.model.head, hidden_BTD.flatten(0, 1), targets_N)
            self.scaler.scale(loss / max(num_targets, 1)).backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
            carry.append(None if new_state is None else new_state.detach())
        if all(state is None for state in carry):
            carry = []
        return float(total) / max(num_targets, 1), carry

    def lr(self) -> float:
        """Learning rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])


def fit(trainer: Trainer, batches: Batches) -> Iterator[StepReport]:
    """Train until the horizon is reached, one StepReport per update. The caller decides when to log, evaluate, save."""
    while trainer.state.horizon.progress(trainer.state.step) < 1.0:
        yield trainer.train_step(batches[trainer.state.step])
