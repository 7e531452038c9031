"""What a training will take, before it runs: memory, time, disk; ``pretrain plan=true``.

Memory at the peak of a step, in bytes, for micro-batches of B rows and P trainable parameters in fp32:

    process + 4 P + s 4 P + a 4 P + max(A(B) + working(B), 4 P)    [+ 4 P where micro-batches add up their gradients]

with s tensors of optimizer state for each parameter (two of Adam), a = 1 with an average of the weights, and A(B) what
autograd keeps for the backward pass. That is linear in B and is counted, not modelled: one row and two rows go through
the loss under ``saved_tensors_hooks``, and each storage that is kept is counted once, parameters left out. While the
backward pass runs, the gradients of what it has kept are made on the way: about two and a half times the largest of it.
Gradients of the parameters fill up as A is freed, hence the maximum.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median

import psutil
import torch
from torch import Tensor

from lmkit.averaging import WeightAverage
from lmkit.config.optimization import (
    AdadeltaConfig,
    AdagradConfig,
    AdamConfig,
    OptimizerConfig,
    RmspropConfig,
    SgdConfig,
)
from lmkit.config.training import EvalConfig, SaveConfig, TrainConfig
from lmkit.console import format_count, format_duration
from lmkit.device import Device
from lmkit.heads import SoftmaxHead, rows_per_chunk
from lmkit.horizon import EVAL_SHARE, NUM_EVALS, Budget, last_step, steps_between_evals
from lmkit.models.base import LanguageModel
from lmkit.train import Trainer

WORKING_SHARE = 2.5
"""Working memory of the backward pass, by the largest tensor that is kept."""
HEAP_SHARE = 0.1
"""What the heap of a CPU process holds beyond what is in use, by what autograd keeps."""
TOUCHED_SHARE = 0.35
"""Part of the workspace of oneDNN's LSTM (the only bytes that autograd keeps) that is ever written."""
ROOM_SHARE = 0.9
"""Part of the free memory that a plan fills."""
MOST_STEPS, MOST_S = 5, 20.0
"""Steps that are timed, after one to warm up; fewer if they take long."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step."""

    weights: int
    optimizer: int
    average: int
    gradients: int
    accumulates: bool
    """Whether a batch is several micro-batches, so that gradients are there throughout."""
    fixed: int
    """Kept by autograd whatever the number of rows."""
    per_row: int
    """Kept by autograd for each row of a micro-batch."""
    working_per_row: int
    working_fixed: int
    process: int
    """What the process holds beside all this: libraries, data (CPU only)."""

    def activations(self, rows: int) -> int:
        """Kept for the backward pass of a micro-batch."""
        return self.fixed + rows * self.per_row

    def working(self, rows: int) -> int:
        """What comes and goes in the backward pass."""
        return self.working_fixed + rows * self.working_per_row

    def peak(self, rows: int) -> int:
        """In all, for micro-batches of so many rows."""
        moving = max(self.activations(rows) + self.working(rows), self.gradients)
        steady = self.process + self.weights + self.optimizer + self.average
        return steady + moving + (self.gradients if self.accumulates else 0)


@dataclass(frozen=True)
class Plan:
    """What a training will take."""

    num_parameters: int
    memory: Memory
    micro_batch_size: int
    batch_size: int
    room_bytes: int
    """What the device has for this process."""
    largest_fitting: int
    """Largest micro-batch that fits (0: not even one row)."""
    tokens_per_epoch: int
    unit: str
    steps: int | None
    """None: only the clock ends the run, and no step was timed."""
    steps_per_epoch: int
    checkpoint_bytes: int
    num_checkpoints: int
    step_s: float | None
    """Median of the timed steps; None: not timed since it would not fit."""
    validation_s: float | None
    num_validations: int

    @property
    def fits(self) -> bool:
        return self.micro_batch_size <= self.largest_fitting

    @property
    def total_s(self) -> float | None:
        """Training and validation; None if not known."""
        if self.step_s is None or self.steps is None:
            return None
        return self.steps * self.step_s + self.num_validations * (self.validation_s or 0.0)

    def rows(self) -> Iterator[tuple[str, str]]:
        """Name and value of everything, for people."""
        memory = self.memory
        yield "parameters", format_count(self.num_parameters)
        yield "memory at the peak", f"{_bytes(memory.peak(self.micro_batch_size))} of {_bytes(self.room_bytes)}"
        yield "  weights", _bytes(memory.weights + memory.average)
        yield "  gradients", _bytes(memory.gradients)
        yield "  optimizer", _bytes(memory.optimizer)
        yield f"  activations of {self.micro_batch_size} rows", _bytes(memory.activations(self.micro_batch_size))
        yield "  backward pass", _bytes(memory.working(self.micro_batch_size))
        if memory.process:
            yield "  the process itself", _bytes(memory.process)
        yield "fits", self._fits_text()
        yield f"{self.unit}s an epoch", format_count(self.tokens_per_epoch)
        yield "steps an epoch", format_count(self.steps_per_epoch)
        if self.steps is not None:
            epochs = self.steps / self.steps_per_epoch
            yield "steps", f"{format_count(self.steps)}, {epochs:.2f} epochs"
        yield (
            "disk",
            (
                f"{_bytes(self.checkpoint_bytes * self.num_checkpoints)}: {self.num_checkpoints} checkpoints of "
                f"{_bytes(self.checkpoint_bytes)}"
            ),
        )
        if self.step_s is not None:
            yield "a step", format_duration(self.step_s)
        if self.validation_s is not None:
            yield "a validation", f"{format_duration(self.validation_s)}, {self.num_validations} of them"
        if self.total_s is not None:
            yield "time", format_duration(self.total_s)

    def _fits_text(self) -> str:
        if self.fits:
            return f"yes; train.micro_batch_size up to {self.largest_fitting} would"
        if self.largest_fitting == 0:
            return "no, not even one row: use a smaller model or train.seq_len, or another device"
        return f"no: train.micro_batch_size={self.largest_fitting} would, with the same updates"


def plan(
    trainer: Trainer,
    train: TrainConfig,
    evaluation: EvalConfig,
    save: SaveConfig,
    *,
    num_processes: int = 1,
    timed: bool = True,
) -> Plan:
    """What the run of a trainer that has done no step will take. It is of no further use: its weights change here.

    num_processes: so many share the micro-batches of a step, each with the whole model; the memory is that of one of
    them, and the time is without the sums of the gradients.

    Nothing larger than two rows is tried before it is known that a step fits; ``timed=False`` tries nothing larger.
    """
    memory = estimate_memory(trainer)
    if num_processes > 1:
        several = trainer.num_micro_batches(trainer.task.batches[0]) > num_processes
        memory = replace(memory, accumulates=several)
    room = room_bytes(trainer.device)
    largest = largest_fitting(memory, train.batch_size // num_processes, int(ROOM_SHARE * room))
    step_s, validation_s = None, None
    if timed and trainer.micro_batch_size <= largest:
        step_s = time_steps(trainer) / num_processes  # here it makes the micro-batches of all
        validation_s = trainer.task.validation_s(device=trainer.device, micro_batch_size=trainer.micro_batch_size)
    steps_per_epoch = trainer.task.batches.steps_per_epoch
    times = None if step_s is None or validation_s is None else (step_s, validation_s)
    steps, num_validations = _length(train, evaluation, steps_per_epoch, times)
    return Plan(
        num_parameters=sum(p.numel() for p in trainer.parameters),
        memory=memory,
        micro_batch_size=trainer.micro_batch_size,
        batch_size=train.batch_size,
        room_bytes=room,
        largest_fitting=largest,
        tokens_per_epoch=trainer.task.num_targets,
        unit=trainer.task.unit,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        checkpoint_bytes=memory.weights + memory.average + memory.optimizer,
        num_checkpoints=save.keep + 2,  # the best one, and one that is being written
        step_s=step_s,
        validation_s=validation_s,
        num_validations=num_validations,
    )


def _length(
    train: TrainConfig, evaluation: EvalConfig, steps_per_epoch: int, times: tuple[float, float] | None
) -> tuple[int | None, int]:
    """Steps and validations of a run; times: seconds of a step and of a validation, by which a time budget goes."""
    steps, every = last_step(train, steps_per_epoch), evaluation.every_steps
    if train.budget_s is None:
        every = every or steps_between_evals(train, steps, steps_per_epoch)
        return steps, NUM_EVALS if steps is None else -(-steps // every)
    if times is None:
        return steps, NUM_EVALS
    step_s, validation_s = times
    left_s = Budget(train.budget_s, None, eval_s=validation_s).left_s(0.0)
    if every is None:
        num_early = min(NUM_EVALS - 1, int(EVAL_SHARE * train.budget_s / max(validation_s, 1e-6)))
        by_clock = max(1, int((left_s - num_early * validation_s) / step_s))
    else:
        by_clock = max(1, int(left_s / (step_s + validation_s / every)))
        num_early = by_clock // every
    return by_clock if steps is None else min(steps, by_clock), num_early + 1


def estimate_memory(trainer: Trainer) -> Memory:
    """Count what one and two rows keep, and add up the rest."""
    device, task = trainer.device, trainer.task
    is_cpu = device.torch_device.type == "cpu"
    weights = sum(_storage_sizes([*trainer.model.parameters(), *trainer.model.buffers()]).values())
    one, two = (_kept(trainer, rows) for rows in (1, 2))
    resident = device.peak_bytes() if is_cpu else weights  # now that what is loaded when it is first used is there
    growth = [more - less for less, more in zip(one, two, strict=False)]
    per_row = max(sum(two) - sum(one), 0)
    heap = 1.0 + HEAP_SHARE if is_cpu else 1.0
    gradients = sum(p.numel() * p.element_size() for p in trainer.parameters)
    return Memory(
        weights=weights,
        optimizer=optimizer_bytes(trainer.optimizer_config, trainer.optimizer),
        average=gradients if isinstance(trainer.average, WeightAverage) else 0,
        gradients=gradients,
        accumulates=trainer.num_micro_batches(task.batches[0]) > 1,
        fixed=int(max(sum(one) - per_row, 0) * heap),
        per_row=int(per_row * heap),
        working_per_row=int(WORKING_SHARE * max(growth, default=0)),
        working_fixed=_head_bytes(trainer),
        process=resident - weights if is_cpu else 0,
    )


def _head_bytes(trainer: Trainer) -> int:
    """The gradient of the output layer on its way, and a chunk of logits."""
    model = trainer.model
    if not isinstance(model, LanguageModel) or not isinstance(model.head, SoftmaxHead):
        return 0
    table = model.head.weight
    return (table.numel() + rows_per_chunk(len(table), table.device) * len(table)) * table.element_size()


def _kept(trainer: Trainer, rows: int) -> list[int]:
    """Bytes of each storage that autograd keeps of so many rows of the first batch, in the order of the forward pass;
    parameters and buffers are left out."""
    own = set(_storage_sizes([*trainer.model.parameters(), *trainer.model.buffers()]))
    kept: dict[int, float] = {}
    alive: list[Tensor] = []  # so that no storage is freed and its address taken again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            is_workspace = tensor.dtype is torch.uint8 and tensor.device.type == "cpu"
            kept[storage.data_ptr()] = storage.nbytes() * (TOUCHED_SHARE if is_workspace else 1.0)
            alive.append(tensor.detach())
        return tensor

    trainer.model.train()
    part = trainer.task.batches[0].cut(slice(0, rows), trainer.device.torch_device)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, trainer.device.autocast():
        trainer.task.loss(trainer.model, part, None, 0.0)
    return [int(size) for size in kept.values()]


def _storage_sizes(tensors: list[Tensor]) -> dict[int, int]:
    """Address -> bytes of each storage once: tied weights share theirs."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def optimizer_bytes(config: OptimizerConfig, optimizer: torch.optim.Optimizer) -> int:
    """What the state will hold once the first step was made, single numbers left out."""
    total = 0
    for group in optimizer.param_groups:
        num_slots = 1 if group.get("kind") == "muon" else 2 if group.get("kind") == "adam" else _slots(config)
        total += num_slots * sum(p.numel() * p.element_size() for p in group["params"])
    return total


def _slots(config: OptimizerConfig) -> int:
    """Tensors of state for each parameter."""
    if isinstance(config, AdamConfig | AdadeltaConfig):
        return 2
    if isinstance(config, AdagradConfig):
        return 1
    num_moments = int(isinstance(config, SgdConfig | RmspropConfig) and config.momentum > 0)
    return num_moments + int(isinstance(config, RmspropConfig))


def room_bytes(device: Device) -> int:
    """Memory for this process: what it has, and what is free."""
    if device.torch_device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device.torch_device)
        return int(free + torch.cuda.memory_allocated(device.torch_device))
    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def largest_fitting(memory: Memory, batch_size: int, limit: int) -> int:
    """Largest divisor of the batch size whose micro-batches stay below a limit in bytes; 0 if none does."""
    fitting = [
        m for m in range(1, batch_size + 1) if batch_size % m == 0 and _peak_in_parts(memory, m, batch_size) <= limit
    ]
    return max(fitting, default=0)


def _peak_in_parts(memory: Memory, rows: int, batch_size: int) -> int:
    extra = memory.gradients if rows < batch_size and not memory.accumulates else 0
    return memory.peak(rows) + extra


def time_steps(trainer: Trainer) -> float:
    """Median seconds of a few training steps, after one that warms up."""
    times: list[float] = []
    batches, begin = trainer.task.batches, time.monotonic()
    for number in range(MOST_STEPS + 1):
        start = time.monotonic()
        trainer.train_step(batches[number % batches.steps_per_epoch])
        trainer.device.synchronize()
        times.append(time.monotonic() - start)
        if number > 0 and time.monotonic() - begin > MOST_S:
            break
    return median(times[1:])


def _bytes(number: float) -> str:
    if number <= 0:
        return "0 B"
    power = min(int(math.log(number, 1000)), 4)
    return f"{number / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
