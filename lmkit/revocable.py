"""Updates that a flag on the device can call off, so that the host need not wait for it before each of them.

What the check for numbers that are not finite finds is known on the device only, and a host that reads it in each step
cannot prepare the next one meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from lmkit.optim import GROUP_SLOTS, is_on_host
from lmkit.sharding import is_sharded, own_piece

PutBack = Callable[[], object]


PART_BYTES = 64 << 20
"""Parameters that are updated at a time where copies are made: a copy of all would be as large as the model, and two or
three times that with the optimizer's state."""


class RevocableSteps:
    """The steps of an optimizer that has made one for each of its parameters that has a gradient.

    torch's fused kernels read such a flag themselves. For all others, what a step changes on the device is copied
    before it and put back there, some parameters at a time. Numbers that the host counts (``step`` and the like) are
    put back before they are needed again: the flag of the step before is known by then.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        fused = all(group.get("fused") for group in optimizer.param_groups)
        self._kernels_read_flag = fused and not any(map(is_sharded, _parameters(optimizer)))
        self._was_called_off: Callable[[], bool] = lambda: False
        self._put_back: list[PutBack] = []

    @torch.no_grad()
    def step(self, stay: Tensor) -> None:
        """Make a step; if ``stay`` (bool, on the device, no dimension) is true, everything stays as it was."""
        if self._kernels_read_flag:
            self._optimizer.found_inf = stay.float()  # type: ignore[attr-defined]
            self._optimizer.step()
            self._optimizer.found_inf = None  # type: ignore[attr-defined]
            return
        self.settle()
        put_back = list(self._changed_on_host())
        groups = self._optimizer.param_groups
        try:
            for group in groups:
                changed = group
                for params in _in_parts(group["params"]):
                    changed = {**group, "params": params}
                    self._optimizer.param_groups = [changed]
                    with unchanged_if(stay, self._changed_on_device(params)):
                        self._optimizer.step()
                group.update({**changed, "params": group["params"]})
        finally:
            self._optimizer.param_groups = groups
        if put_back:
            self._was_called_off, self._put_back = read_later(stay), put_back

    def settle(self) -> None:
        """Put back what the host counts, if the last step was called off; call it before the state is used or kept."""
        if self._put_back and self._was_called_off():
            for put_back in self._put_back:
                put_back()
        self._put_back = []

    def _changed_on_device(self, params: Iterable[Tensor]) -> Iterator[Tensor]:
        for p in params:
            if p.grad is not None:
                yield p
                for slot, value in self._optimizer.state[p].items():
                    if isinstance(value, Tensor) and not is_on_host(self._optimizer, slot):
                        yield value

    def _changed_on_host(self) -> Iterator[PutBack]:
        for p in _parameters(self._optimizer):
            for slot, value in self._optimizer.state[p].items() if p.grad is not None else ():
                if is_on_host(self._optimizer, slot):
                    yield partial(value.copy_, value.clone())
        for group in self._optimizer.param_groups:
            numbers = {slot: group[slot] for slot in GROUP_SLOTS if slot in group}
            if numbers:
                yield partial(group.update, numbers)


@contextlib.contextmanager
def unchanged_if(stay: Tensor, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Context after which the tensors are what they were before it, if ``stay`` is true; the host does not wait.

    stay: bool, on the device of the tensors, no dimension.
    """
    pieces = [own_piece(tensor.detach()) for tensor in tensors]
    before = [piece.clone() for piece in pieces]
    yield
    for piece, old in zip(pieces, before, strict=True):
        torch.where(stay, old, piece, out=piece)


def read_later(flag: Tensor) -> Callable[[], bool]:
    """What reads a bool that lies on a device, waiting for nothing that the device is given from now on."""
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    on_host, copied = flag.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def read() -> bool:
        copied.synchronize()
        return bool(on_host)

    return read


def _in_parts(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters, so many at a time that a part reaches PART_BYTES."""
    part: list[Tensor] = []
    num_bytes = 0
    for p in params:
        part.append(p)
        num_bytes += own_piece(p.detach()).nbytes
        if num_bytes >= PART_BYTES:
            yield part
            part, num_bytes = [], 0
    if part:
        yield part


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
