"""The training loop: one generator of steps, for every model family and every command that trains."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lmkit.averaging import WeightAverage
from lmkit.config.machine import Precision
from lmkit.config.optimization import OptimizerConfig, ScheduleConfig
from lmkit.config.plain import refuse_unknown
from lmkit.data.batches import Batches, TrainingBatch
from lmkit.device import Device
from lmkit.distributed import SINGLE, World
from lmkit.heads import SoftmaxHead
from lmkit.horizon import Horizon
from lmkit.models.base import State
from lmkit.optim import set_lr
from lmkit.revocable import RevocableSteps
from lmkit.rng import derive_key
from lmkit.schedules import lr_factor
from lmkit.sharding import whole
from lmkit.tasks.base import Task

SPIKE_MEAN_WEIGHT = 0.02
"""Share of a new batch in the running mean of the loss: a memory of about 50 batches."""


@dataclass
class TrainState:
    """Everything beside tensors that a run needs to go on. Plain JSON values."""

    step: int = 0
    """Batches done, those that were left out included."""
    num_targets: int = 0
    """Targets (tokens, examples or pairs) trained on, repeats counted."""
    elapsed_s: float = 0.0
    """Wall-clock time spent by the run, over all its sessions."""
    eval_s: float = 0.0
    """Part of it spent in validation."""
    horizon: Horizon = field(default_factory=lambda: Horizon(0.0))
    valid_losses: list[float] = field(default_factory=list)
    """``Validation.loss`` of each validation so far, oldest first: nats per token, where the task has no other loss."""
    valid_steps: list[int] = field(default_factory=list)
    """The steps they belong to."""
    data_changes: list[int] = field(default_factory=list)
    """The steps behind which the data were others than before, in order."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the fp16 gradient scaler."""
    averaged_since: int | None = None
    """The step with which a uniform average of the weights began; None: it did not yet."""
    skipped_steps: list[int] = field(default_factory=list)
    """The batches, by the step they belong to, that changed nothing because of train.nonfinite, in order."""
    step_s: float = 0.0
    """Under a time budget, the time of a step as it was last known; 0: not known."""
    evals_ahead: int = 0
    """Under a time budget, validations beyond one for each tenth of the run that was done at the last one."""
    eval_pending: bool = False
    """Whether validation is due at this step but was not done: the run was stopped before or during it."""

    def losses_by_data(self) -> list[list[float]]:
        """The validation losses, oldest first, apart by the data they are of: those of the present ones are the last.

        Losses of different texts are not to be compared.
        """
        edges = [0, *(bisect_right(self.valid_steps, step) for step in self.data_changes), len(self.valid_losses)]
        return [self.valid_losses[begin:end] for begin, end in pairwise(edges)]

    def to_json(self) -> dict[str, Any]:
        """JSON data for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainState:
        """The inverse of ``to_json``. Raises ConfigError for keys that this version does not know."""
        refuse_unknown(cls, data, "state")
        if "horizon" in data:  # a model that counts has none
            refuse_unknown(Horizon, data["horizon"], "state.horizon")
            data = {**data, "horizon": Horizon(**data["horizon"])}
        return cls(**data)


@dataclass(frozen=True)
class StepReport:
    """What one update did. The numbers stay on the device until one of them is asked for, which waits for it."""

    step: int
    """Batches done, this one included."""
    num_targets: int
    """Targets of the batch; 0 if it was passed over."""
    lr: float
    """Learning rate of the first parameter group."""
    progress: float
    numbers: Tensor
    """(2,) float32: summed loss, norm of the gradient."""
    bad: Tensor
    """Bool: whether the batch was not to change anything."""

    @cached_property
    def _read(self) -> list[float]:
        return self.numbers.tolist()

    @property
    def loss(self) -> float:
        """Loss per target; nats where it is a likelihood."""
        return self._read[0] / max(self.num_targets, 1)

    @property
    def grad_norm(self) -> float:
        """Global norm of the gradient before clipping; not finite where a scaled fp16 step was too large."""
        return self._read[1]

    @property
    def left_out(self) -> bool:
        """Whether loss or gradient were not finite (or the loss a spike), so that nothing was changed."""
        return bool(self.bad)


@dataclass
class Trainer:
    """The parts of a run that change while it trains, and the step that changes them."""

    task: Task
    model: nn.Module
    optimizer: Optimizer
    optimizer_config: OptimizerConfig
    schedule: ScheduleConfig
    device: Device
    seed: int
    micro_batch_size: int
    state: TrainState
    average: WeightAverage | None = None
    average_begins: Callable[[TrainState], bool] | None = None
    """Whether a uniform average begins with the step that follows this state; None: never."""
    carry: list[State | None] = field(default_factory=list)
    """Carried model state of each micro-batch; empty for models without one."""
    max_skips: int = 0
    """Once more updates than this were left out, no further one is made."""
    spike_nats: float | None = None
    """Leave out batches whose loss is this far above its running mean (nats per target); None: none."""
    frozen_until: Mapping[str, float] = field(default_factory=dict)
    """Share of the run (0 to 1) before which a parameter, by its name, stays as it is; gradual unfreezing."""
    world: World = SINGLE
    """The processes that train together; each has all of this, and takes every ``world.size``-th micro-batch."""
    reads_late: bool = False
    """Decide on the device, so that no step waits for it (see ``pays_to_read_late``); reports may be read later."""

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        fp16 = self.device.precision is Precision.fp16
        self.scaler = torch.amp.GradScaler(self.device.torch_device.type, enabled=fp16)
        if self.state.scaler:
            self.scaler.load_state_dict(self.state.scaler)
        self.forward: nn.Module = self.model
        if self.device.compile:
            self.forward = torch.compile(self.model)  # type: ignore[assignment]
            for module in self.model.modules():
                if isinstance(module, SoftmaxHead):
                    module.compiled = True
        self.mean_nats = torch.full((), math.inf, device=self.device.torch_device)
        """Running mean of the loss per target, for ``spike_nats``; infinite before the first batch."""
        self.updating = False
        """True while an update is under way, so that the parameters may be of two steps."""
        self.trust()

    def trust(self) -> None:
        """Begin to count the updates that are left out; call it after the state was replaced."""
        self._num_left_out = torch.zeros((), device=self.device.torch_device)
        self._skips_left = max(0, self.max_skips - len(self.state.skipped_steps))
        self.steps = RevocableSteps(self.optimizer)
        self._updated: set[int] = set()
        """The parameters, by id, that the optimizer has updated once, so that it has a state to put back."""

    def train_step(self, batch: TrainingBatch) -> StepReport:
        """One update from one global batch, cut into micro-batches.

        The gradient is that of the summed loss divided by the number of targets of the whole batch, so it does not
        depend on how the batch is cut. Dropout is keyed by (seed, step, micro-batch). If loss or gradient is not finite
        the update is not made: parameters and optimizer state stay those of the step before, an average takes these
        parameters in once more, the carried state begins anew, and the report says ``left_out``.
        """
        self.model.train()
        state, step = self.state, self.state.step
        progress = state.horizon.progress(step)
        self._see_if_averaged()
        factor = lr_factor(self.schedule, step, progress, state.losses_by_data())
        set_lr(self.optimizer, factor * self.task.lr_scale(batch, progress))
        num_targets = batch.num_targets
        total, carry = self._accumulate(batch, num_targets, progress)
        self._drop_frozen(progress)
        self.scaler.unscale_(self.optimizer)
        limit = self.optimizer_config.clip_norm
        norm = whole(nn.utils.clip_grad_norm_(self.parameters, math.inf if limit is None else limit))
        numbers = torch.stack((total.float(), norm.to(total.device).float()))
        bad = self._is_bad(numbers, num_targets)
        self.updating = True
        self.carry = self._update(bad, norm, carry)
        self.optimizer.zero_grad(set_to_none=True)
        state.step, state.num_targets = step + 1, state.num_targets + num_targets
        self._take_into_average()
        self.updating = False
        return StepReport(state.step, num_targets, self.lr(), state.horizon.progress(state.step), numbers, bad)

    def _see_if_averaged(self) -> None:
        """Begin a uniform average with the next step, if it is time for one."""
        state = self.state
        if self.average_begins is None or not self.average_begins(state):
            state.averaged_since = None  # a run that got longer has its beginning before it again
        elif state.averaged_since is None:
            state.averaged_since = state.step

    def _take_into_average(self) -> None:
        """Fold the parameters after the step that is done into the average, if there is one."""
        if self.average is not None:
            self.average.update(self.model, self.state.step, self.state.averaged_since)

    def _drop_frozen(self, progress: float) -> None:
        """Drop the gradients of what is frozen until later, so that clipping and optimizer pass over it."""
        for name, p in self.model.named_parameters() if self.frozen_until else ():
            if progress < self.frozen_until.get(name, 0.0):
                p.grad = None

    def _is_bad(self, numbers: Tensor, num_targets: int) -> Tensor:
        """Whether this batch must not change anything, as a bool on the device; keeps the mean for spikes."""
        judged = numbers[:1] if self.scaler.is_enabled() else numbers  # large fp16 steps are left to the scaler
        bad = ~judged.isfinite().all()
        if self.spike_nats is not None:
            nats = numbers[0] / max(num_targets, 1)
            bad = bad | (nats > self.mean_nats + self.spike_nats)
            moved = torch.where(torch.isinf(self.mean_nats), nats, torch.lerp(self.mean_nats, nats, SPIKE_MEAN_WEIGHT))
            self.mean_nats = torch.where(bad, self.mean_nats, moved)
        return bad

    def _update(self, bad: Tensor, norm: Tensor, carry: list[State | None]) -> list[State | None]:
        """Let the optimizer step unless the batch is bad; returns the state to carry on."""
        self._num_left_out += bad
        stay = bad | (self._num_left_out > self._skips_left)
        if self.scaler.is_enabled():
            stay = stay | ~norm.isfinite()  # too large a step in fp16 is no fault of the batch
        self.scaler.update()
        updated = {id(p) for p in self.parameters if p.grad is not None}
        if self.reads_late and updated <= self._updated:
            self.steps.step(stay)
            return [None if c is None else self._zeroed(c, bad) for c in carry]
        self.steps.settle()
        if not stay:
            self.optimizer.step()
            self._updated |= updated
        return [] if bad else carry

    def _zeroed(self, carried: State, bad: Tensor) -> State:
        """The carried state, or zeros, with which a text begins, after a bad batch."""
        zeroed = {name: torch.where(bad, 0.0, t) for name, t in carried.tensors().items()}
        return self.task.state_from_tensors(zeroed)

    def pass_over(self) -> StepReport:
        """Go on to the next batch without looking at this one, which was found bad before.

        All is as after the ``train_step`` that left it out: an average takes the parameters in once more.
        """
        self._see_if_averaged()
        self.state.step += 1
        self.carry = []
        self._take_into_average()
        progress = self.state.horizon.progress(self.state.step)
        unknown = torch.full((2,), torch.nan)
        return StepReport(self.state.step, 0, self.lr(), progress, unknown, torch.zeros((), dtype=torch.bool))

    def _accumulate(self, batch: TrainingBatch, num_targets: int, progress: float) -> tuple[Tensor, list[State | None]]:
        """Add up the gradients of the micro-batches; return their summed loss and the new carried states.

        Where parameters lie in pieces, all processes have to compute at once: one that is left without a micro-batch
        computes the last one again, which counts nothing.
        """
        world = self.world
        total = torch.zeros((), device=self.device.torch_device)
        number = self.num_micro_batches(batch)
        carry: list[State | None] = [None] * number
        for micro in range(world.rank, number + (-number % world.size if world.shards else 0), world.size):
            loss, new_state = self.run_micro_batch(batch, min(micro, number - 1), progress)
            if micro >= number:
                (loss * 0.0).backward()  # type: ignore[no-untyped-call]
                continue
            self.scaler.scale(loss / max(num_targets, 1)).backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
            carry[micro] = None if new_state is None else new_state.detach()
        world.sum_gradients(self.parameters, total)
        if all(state is None for state in carry):
            carry = []
        return total, carry

    def num_micro_batches(self, batch: TrainingBatch) -> int:
        """Forward passes that a batch takes."""
        return -(-batch.num_rows // self.micro_batch_size)

    def run_micro_batch(self, batch: TrainingBatch, micro: int, progress: float) -> tuple[Tensor, State | None]:
        """Summed loss and new state of one micro-batch of the next step, with its dropout."""
        part, state = self.micro_batch(batch, micro)
        with self.device.autocast():
            loss, state = self.task.loss(self.forward, part, state, progress)
        return loss * self.task.loss_scale(batch, progress), state

    def micro_batch(self, batch: TrainingBatch, micro: int) -> tuple[TrainingBatch, State | None]:
        """One micro-batch of the next step and the state before it; sets torch's generator for its dropout."""
        rows = slice(micro * self.micro_batch_size, (micro + 1) * self.micro_batch_size)
        torch.manual_seed(derive_key(self.seed, "dropout", self.state.step, micro))
        fresh = batch.starts_text or micro >= len(self.carry)
        return batch.cut(rows, self.device.torch_device), None if fresh else self.carry[micro]

    def lr(self) -> float:
        """Learning rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])


def fit(trainer: Trainer, batches: Batches) -> Iterator[StepReport]:
    """Train until the horizon is reached, one StepReport per batch. The caller decides when to log, evaluate, save."""
    while trainer.state.horizon.progress(trainer.state.step) < 1.0:
        step = trainer.state.step
        if step + 1 in trainer.state.skipped_steps:
            yield trainer.pass_over()
        else:
            yield trainer.train_step(batches[step])


def pays_to_read_late(device: Device) -> bool:
    """Whether reading the loss in each step would make the processor wait for a card that computes by itself."""
    return device.torch_device.type == "cuda"
