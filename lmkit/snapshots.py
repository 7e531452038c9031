"""A trainer as what a checkpoint holds, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from lmkit.config.plain import NEWER
from lmkit.errors import CheckpointError
from lmkit.models.base import State
from lmkit.optim import load_optimizer_tensors, optimizer_tensors
from lmkit.sharding import gathered, pieced
from lmkit.store.checkpoint import VALID_LOSS, Snapshot
from lmkit.train import Trainer, TrainState


def snapshot_of(trainer: Trainer, config: dict[str, Any]) -> Snapshot:
    """What there is to save, in the first process, when all have given what they have of it and agree about it.

    config: as it is stored with the run.
    """
    state = trainer.state
    state.scaler = trainer.scaler.state_dict()
    data = state.to_json()
    if state.valid_steps and state.valid_steps[-1] == state.step:
        data[VALID_LOSS] = state.valid_losses[-1]
    model, extra = trainer_tensors(trainer)
    trainer.world.check_step(state.step)
    trainer.world.check_same(dict(trainer.model.named_parameters()))
    return Snapshot(step=state.step, model=model, optimizer=extra, state=data, config=config)


def state_in(snapshot: Snapshot) -> TrainState:
    """The state of the trainer that a snapshot was taken of."""
    return TrainState.from_json({key: value for key, value in snapshot.state.items() if key != VALID_LOSS})


def trainer_tensors(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a trainer: the weights to use (averaged if there is an average), and the rest for resuming.

    Called in all processes at once; what lies in pieces is put together for the first one, and left out in the others.
    """
    trainer.steps.settle()
    model: dict[str, Tensor] = dict(trainer.model.state_dict(keep_vars=True))
    extra = {f"optimizer/{k}": v for k, v in optimizer_tensors(trainer.optimizer, model).items()}
    for micro, carried in enumerate(_gathered_carry(trainer)):
        if carried is not None:
            extra.update({f"carry/{micro}/{name}": t for name, t in carried.tensors().items()})
    if trainer.spike_nats is not None:
        extra["guard/mean_nats"] = trainer.mean_nats
    if trainer.average is not None:
        extra.update({f"raw/{name}": p.detach() for name, p in trainer.model.named_parameters()})
        average = trainer.average.tensors()
        average_of = {id(p): average[name] for name, p in trainer.model.named_parameters()}
        model = {name: average_of.get(id(t), t) for name, t in model.items()}
    keep = trainer.world.is_first
    return gathered(model, keep=keep), gathered(extra, keep=keep)


def _gathered_carry(trainer: Trainer) -> list[State | None]:
    """The carried state of each micro-batch, from the process that has it; called in all of them at once."""
    world, carry = trainer.world, list(trainer.carry)
    own = [c.tensors() for c in carry[world.rank :: world.size] if c is not None]
    if world.size == 1 or not own:
        return carry
    stacked = {name: torch.stack([tensors[name] for tensors in own]) for name in sorted(own[0])}
    of_rank = {name: world.gather(tensor) for name, tensor in stacked.items()}
    for micro in range(len(carry)):
        turn, rank = divmod(micro, world.size)
        tensors = {name: gathered[rank][turn] for name, gathered in of_rank.items()}
        carry[micro] = trainer.task.state_from_tensors(tensors)
    return carry


def restore_trainer(trainer: Trainer, model: Mapping[str, Tensor], extra: Mapping[str, Tensor]) -> None:
    """Put back what ``trainer_tensors`` gave, into a trainer of the same configuration whose state is already set.

    The micro-batch size may be another one: the carried state is cut anew.
    """
    device = trainer.device.torch_device
    own = trainer.model.state_dict()
    trainer.model.load_state_dict({name: pieced(t, own.get(name, t)) for name, t in model.items()})
    parameters: dict[str, Tensor] = dict(trainer.model.named_parameters())
    if trainer.average is not None:
        trainer.average = trainer.average.restarted(trainer.model)
    optimizer: dict[str, Tensor] = {}
    carried: dict[str, list[tuple[int, Tensor]]] = {}
    for key, tensor in extra.items():
        part, _, name = key.partition("/")
        if part == "optimizer":
            optimizer[name] = tensor
        elif part == "carry":
            micro, _, slot = name.partition("/")
            carried.setdefault(slot, []).append((int(micro), tensor))
        elif part == "raw":
            parameters[name].data.copy_(pieced(tensor, parameters[name]))
        elif key == "guard/mean_nats":
            of_other_data = trainer.state.data_changes[-1:] == [trainer.state.step]
            trainer.mean_nats = torch.full_like(tensor, math.inf, device=device) if of_other_data else tensor.to(device)
        else:
            raise CheckpointError(f"step {trainer.state.step} has saved {key!r}, which this lmkit does not know", NEWER)
    trainer.optimizer.state.clear()
    load_optimizer_tensors(trainer.optimizer, parameters, optimizer)
    trainer.carry = _cut_carry(trainer, carried)
    trainer.trust()


def _cut_carry(trainer: Trainer, carried: Mapping[str, list[tuple[int, Tensor]]]) -> list[State | None]:
    """The carried state of each micro-batch, from (number of the micro-batch, rows) of each of its tensors."""
    rows_of = {
        slot: torch.cat([t for _, t in sorted(parts, key=itemgetter(0))]).to(trainer.device.torch_device)
        for slot, parts in carried.items()
    }
    size = trainer.micro_batch_size
    starts = range(0, len(next(iter(rows_of.values()), ())), size)
    return [
        trainer.task.state_from_tensors({slot: rows[start : start + size].clone() for slot, rows in rows_of.items()})
        for start in starts
    ]
