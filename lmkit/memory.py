"""The memory that a training takes, before it runs.

At the peak of a step, in bytes, for micro-batches of B rows and P trainable parameters in fp32:

    process + copy + 4 P + s 4 P + a 4 P + max(A(B) + working(B), 4 P)    [+ 4 P where micro-batches add up gradients]

with s tensors of optimizer state for each parameter (two of Adam), a = 1 with an average of the weights beside them and
A(B) what autograd keeps for the backward pass. That is linear in B and is counted, not modelled: one row and two rows
of a long batch go through the loss under ``saved_tensors_hooks``, and each storage that is kept is counted once,
parameters left out. While the backward pass runs, the gradients of what it has kept are made on the way: about two and
a half times the largest of it. Gradients of the parameters fill up as A is freed, hence the maximum, which also has
what an optimizer needs beside them in its step. ``copy`` is what checkpoints are written from, in main memory.

The memory of a validation, which keeps nothing for a backward pass, is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import psutil
import torch
from torch import Tensor

from lmkit import products
from lmkit.averaging import ScheduleFreeAverage
from lmkit.config.optimization import (
    AdadeltaConfig,
    AdagradConfig,
    AdamConfig,
    OptimizerConfig,
    RmspropConfig,
    ScheduleFreeConfig,
    SgdConfig,
)
from lmkit.data.batches import Batch
from lmkit.device import Device
from lmkit.heads import SoftmaxHead, rows_per_chunk
from lmkit.models.adaptive import AdaptiveHead, Tail
from lmkit.models.base import LanguageModel
from lmkit.models.mixture import MixtureHead
from lmkit.train import Trainer

WORKING_SHARE = 2.5
"""Working memory of the backward pass, by the largest tensor that is kept."""
HEAP_SHARE = 0.1
"""What the heap of a CPU process holds beyond what is in use, by what autograd keeps."""
TOUCHED_SHARE = 0.35
"""Part of the workspace of oneDNN's LSTM (the only bytes that autograd keeps) that is ever written."""
MOST_LOOKED = 50
"""Batches of which the longest is counted, where their lengths differ."""


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
    update: int
    """What the optimizer's step needs beside the gradients."""
    copy: int
    """The copy that checkpoints are written from, where it lies in the memory that is trained in."""

    def activations(self, rows: int) -> int:
        """Kept for the backward pass of a micro-batch."""
        return self.fixed + rows * self.per_row

    def working(self, rows: int) -> int:
        """What comes and goes in the backward pass."""
        return self.working_fixed + rows * self.working_per_row

    def peak(self, rows: int) -> int:
        """In all, for micro-batches of so many rows."""
        backward = max(self.activations(rows) + self.working(rows), self.gradients)
        backward += self.gradients if self.accumulates else 0
        steady = self.process + self.copy + self.weights + self.optimizer + self.average
        return steady + max(backward, self.gradients + self.update)


def estimate_memory(trainer: Trainer, progress: float = 0.0) -> Memory:
    """Count what one and two rows keep where this share of the run is done (0 to 1), and add up the rest."""
    device = trainer.device
    is_cpu = device.torch_device.type == "cpu"
    weights = _weight_bytes(trainer)
    one, two = (_kept(trainer, rows, progress) for rows in (1, 2))
    resident = device.peak_bytes() if is_cpu else weights  # now that what is loaded when it is first used is there
    growth = [more - less for less, more in zip(one, two, strict=False)]
    per_row = max(sum(two) - sum(one), 0)
    heap = 1.0 + HEAP_SHARE if is_cpu else 1.0
    gradients = sum(p.numel() * p.element_size() for p in trainer.parameters)
    return Memory(
        weights=weights,
        optimizer=optimizer_bytes(trainer.optimizer_config, trainer.optimizer),
        average=gradients if _keeps_average(trainer) else 0,
        gradients=gradients,
        accumulates=trainer.num_micro_batches(trainer.task.batches[0]) > 1,
        fixed=int(max(sum(one) - per_row, 0) * heap),
        per_row=int(per_row * heap),
        working_per_row=int(WORKING_SHARE * max(growth, default=0)),
        working_fixed=_head_bytes(trainer),
        process=resident - weights if is_cpu else 0,
        update=update_bytes(trainer.optimizer_config, trainer.optimizer),
        copy=0 if device.torch_device.type == "cuda" else checkpoint_bytes(trainer),
    )


def _weight_bytes(trainer: Trainer) -> int:
    return sum(_storage_sizes([*trainer.model.parameters(), *trainer.model.buffers()]).values())


def _keeps_average(trainer: Trainer) -> bool:
    """Whether an average of the weights lies beside them; that of schedule-free training is made when it is used."""
    return trainer.average is not None and not isinstance(trainer.average, ScheduleFreeAverage)


def checkpoint_bytes(trainer: Trainer) -> int:
    """What a checkpoint holds: the weights, those that are trained where they are not the ones to use, the state."""
    trained = 0 if trainer.average is None else sum(p.numel() * p.element_size() for p in trainer.parameters)
    return _weight_bytes(trainer) + trained + optimizer_bytes(trainer.optimizer_config, trainer.optimizer)


def _head_bytes(trainer: Trainer) -> int:
    """The gradient of the output layer on its way, chunks of logits, and the matrix in oneDNN's order, both ways; of an
    adaptive softmax those of its largest part."""
    head = trainer.model.head if isinstance(trainer.model, LanguageModel) else None
    if isinstance(head, AdaptiveHead):
        tails = [tail.weight for tail in head.tails if isinstance(tail, Tail)]
        return max(map(_softmax_bytes, [head.weight, *tails]))
    if isinstance(head, MixtureHead):
        return _softmax_bytes(head.weight, head.num_softmaxes)
    return _softmax_bytes(head.weight) if isinstance(head, SoftmaxHead) else 0


def _softmax_bytes(table: Tensor, num_softmaxes: int = 1) -> int:
    num_tables = 3 if products.by_onednn(table, products.MIN_ROWS) else 1
    num_logits = num_softmaxes * len(table)
    num_chunks = 1 if num_softmaxes == 1 else 2  # the logits are not overwritten by the probabilities of a mixture
    chunks = num_chunks * rows_per_chunk(num_logits, table.device) * num_logits
    return (num_tables * table.numel() + chunks) * table.element_size()


def _long_batch(trainer: Trainer) -> Batch:
    """One of the first batches that no other one is longer than: sentences are of many lengths. Its only row twice
    where it has one, as what a row takes shows in two."""
    batches = trainer.task.batches
    first = (cast(Batch, batches[step]) for step in range(min(batches.steps_per_epoch, MOST_LOOKED)))
    longest = max(first, key=lambda batch: batch.inputs_BT.shape[1])
    if longest.num_rows > 1:
        return longest
    return Batch(longest.inputs_BT.repeat(2, 1), longest.targets_BT.repeat(2, 1), longest.starts_text)


def _kept(trainer: Trainer, rows: int, progress: float = 0.0) -> list[int]:
    """Bytes of each storage that autograd keeps of so many rows of a long batch, in the order of the forward pass;
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
    part = _long_batch(trainer).cut(slice(0, rows), trainer.device.torch_device)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, trainer.device.autocast():
        trainer.task.loss(trainer.model, part, None, progress)
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


def update_bytes(config: OptimizerConfig, optimizer: torch.optim.Optimizer) -> int:
    """What a step of the optimizer needs beside the gradients: schedule-free AdamW makes the denominators of all
    parameters of a group at once."""
    if not isinstance(config, ScheduleFreeConfig):
        return 0
    of_groups: list[int] = [sum(p.numel() * p.element_size() for p in g["params"]) for g in optimizer.param_groups]
    return max(of_groups)


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
    return replace(memory, accumulates=memory.accumulates or rows < batch_size).peak(rows)
