"""Parameters of which each process holds a piece: torch's FSDP2 (``fully_shard``), and the ways there and back.

A tensor in pieces is a DTensor, cut along its first dimension; optimizers and averages work on their pieces. Everything
here leaves whole tensors and models as they are, so that callers need not ask. torch.distributed is imported when there
is something in pieces: that takes a second.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def shard(model: nn.Module, device: torch.device) -> None:
    """Leave each process of the job with its piece of every parameter; the model moves to the device.

    The members of each list called ``blocks`` are gathered one at a time, for their forward pass and again for their
    backward pass; what is outside of them (tables, norms, head) is whole from the model's forward pass to the end of
    the backward pass, so that a loss may use the head on its own. Gradients are summed, not averaged, over processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    keep_in_place(model)
    # outputs of recurrent models are views; the warning is of changes in place, and no output is changed in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "blocks" and isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for part in _parts(model):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)


def keep_in_place(model: nn.Module) -> None:
    """Keep torch's recurrent layers from moving their parameters into one piece of memory for cuDNN.

    They do that where they find other parameters than before. fully_shard gathers into the memory that it knows, so
    that they would go on computing with the first parameters that they saw.
    """
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters = lambda: None  # type: ignore[method-assign]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds a piece of the tensor only."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, in every process; called in all of them at once."""
    own: Any = tensor
    return own.full_tensor() if is_sharded(tensor) else tensor


def own_piece(tensor: Tensor) -> Tensor:
    """This process's piece of a tensor, as a plain tensor of the same memory."""
    own: Any = tensor
    return own.to_local() if is_sharded(tensor) else tensor


def pieced(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's piece of a whole tensor that all of them have, in the pieces and on the device of ``like``."""
    if not is_sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    own: Any = like
    return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """The tensors without gradient; those in pieces whole and in main memory, where ``keep`` is true, else left out.

    Called in all processes at once. What was one memory under two names still is.
    """
    if not any(map(is_sharded, tensors.values())):
        return {name: tensor.detach() if tensor.requires_grad else tensor for name, tensor in tensors.items()}
    distinct = {id(tensor): tensor for tensor in tensors.values()}
    found: dict[int, Tensor] = {}
    for key, tensor in distinct.items():
        if not is_sharded(tensor):
            found[key] = tensor.detach()
            continue
        entire = whole(tensor.detach())
        if keep:
            found[key] = entire.cpu()
    return {name: found[id(tensor)] for name, tensor in tensors.items() if id(tensor) in found}


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Context in which every process has the whole model, so that one of them can run it alone, without gradient.

    Entered in all processes at once. A change of the parameters inside of it is lost.
    """
    parts = list(_parts(model)) if any(is_sharded(p) for p in model.parameters()) else []
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)


def _parts(model: nn.Module) -> Iterator[Any]:
    """The modules whose parameters are gathered together, the model itself first."""
    from torch.distributed.fsdp import FSDPModule

    return (module for module in model.modules() if isinstance(module, FSDPModule))
