"""Several processes that train one model: what they add up, agree on and hand around.

torchrun starts the processes and ends all of them when one dies. gloo carries what lies in main memory, decisions
among it, so that no card is waited for; nccl carries what lies on cards.

The sum of the gradients is taken here, after the last micro-batch, and not by DistributedDataParallel: that one counts
on every process running the wrapped ``forward`` before each backward pass, and on the same parameters having a gradient
everywhere. Tasks call other methods of the model too, and have phases in which parts of it get none.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from lmkit.config.parallel import DdpConfig, FsdpConfig, ParallelConfig
from lmkit.config.plain import kind_of
from lmkit.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    LmkitError,
    ResourceError,
    StoppedError,
    is_out_of_memory,
)

T = TypeVar("T")

BUCKET_BYTES = 32 << 20
"""Gradients are copied together into buffers of about this size, each of which is summed at once."""

JOIN_S = 300.0
"""So long a process looks for the address that torchrun gave it."""
LEAVE_S = 30.0
"""So long a process that met an error waits for the first one to have met it too."""
ANSWER_S = 5.0
"""So long a process that has lost the others waits for those that are left to say so, too."""
_LEFT = "left"
_turns = count()


class LostError(ResourceError):
    """Another process of the job has ended or cannot be reached."""

    def __init__(self, what: str, reason: str, silent: Sequence[int] = ()) -> None:
        """silent: ranks of the processes that do not answer, as far as that is known."""
        names = f"process{'es' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
        which = f": no answer from {names}" if silent else ""
        super().__init__(
            f"the processes {what}{which} ({reason})",
            "see what the others said; resume=true goes on from the last checkpoint",
        )
        self.what, self.reason = what, reason


@dataclass(frozen=True)
class World:
    """The processes of a job and this one's place among them. In a world of one nothing is ever sent or waited for."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Place among the processes on this machine."""
    local_size: int = 1
    shards: bool = False
    """Whether each process holds a piece of the parameters only."""
    turn: int = 0
    """Jobs of a multirun that were before this one, begun or not: whoever could not begin one must not meet the others
    of that one in the next."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes, prints and decides."""
        return self.rank == 0

    @property
    def description(self) -> str:
        """For people, as the end of a line about the device."""
        return "" if self.size == 1 else f"; {self.size} processes{', the model in pieces' if self.shards else ''}"

    @contextlib.contextmanager
    def joined(self, device: torch.device, config: ParallelConfig) -> Iterator[None]:
        """Context in which the processes can reach each other.

        What ends all of them alike is said by the first one: the others leave in silence, with the same exit code, and
        after it, since torchrun ends what is left. Raises ResourceError if they do not find each other.
        """
        if self.size == 1 or not isinstance(config, DdpConfig):
            yield
            return
        timeout = timedelta(seconds=config.timeout_s)
        if _is_joined():
            dist.destroy_process_group()  # of the job before in a multirun, which an error has ended
        with _lost("do not find each other"):
            store, rank, size = next(rendezvous("env://", timeout=min(timeout, timedelta(seconds=JOIN_S))))
            store = PrefixStore(f"lmkit-{self.turn}", store)
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        try:
            with _lost(mixed=True):  # FSDP sends what it needs on its own
                yield
        except LostError as error:
            raise LostError(error.what, error.reason, self._silent(store)) from error
        except SystemExit:  # the first one has met an error, and may have something to save yet
            with contextlib.suppress(RuntimeError):
                store.wait([_LEFT], timeout)
            raise
        except LmkitError as error:
            if isinstance(error, StoppedError):
                dist.destroy_process_group()
            if self.is_first or isinstance(error, ResourceError):
                raise
            agreed = isinstance(error, StoppedError | DivergedError)
            try:
                store.wait([_LEFT], timeout if agreed else timedelta(seconds=LEAVE_S))
            except RuntimeError:
                raise error from None  # it was this process only
            raise SystemExit(error.exit_code) from None
        else:
            dist.destroy_process_group()
        finally:
            if self.is_first:
                with contextlib.suppress(RuntimeError):
                    store.set(_LEFT, "")

    def _silent(self, store: PrefixStore) -> list[int]:
        """Ranks of the processes that do not say within ANSWER_S that they have lost others, too; called by those that
        have. Empty where nobody can tell: the store is gone with the process that had it."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        if len(others) == 1:
            return others
        if dist.get_backend() == "gloo":  # so that those who wait for this process lose it; nccl might wait itself
            dist.destroy_process_group()
        silent, until = [], time.monotonic() + ANSWER_S
        try:
            store.set(f"lost-{self.rank}", "")
            for rank in others:
                left_s = max(until - time.monotonic(), 0.01)
                try:
                    store.wait([f"lost-{rank}"], timedelta(seconds=left_s))
                except dist.DistStoreError:
                    silent.append(rank)
        except RuntimeError:
            return []
        return silent

    @property
    def launcher(self) -> list[str]:
        """The words that start the command line anew, in as many processes, for people."""
        if self.size == 1:
            return ["lmkit"]
        place = [f"--nproc-per-node={self.local_size}"]
        if self.size > self.local_size:
            place = [f"--nnodes={self.size // self.local_size}", *place, "..."]
        return ["torchrun", *place, "--module", "lmkit"]

    def agree(self, decision: Sequence[float], requests: Sequence[bool] = ()) -> tuple[list[float], list[bool]]:
        """The first process's ``decision``, and which of the ``requests`` any process makes."""
        if self.size == 1:
            return list(decision), list(requests)
        own = decision if self.is_first else [0.0] * len(decision)
        numbers = torch.tensor([*own, *requests], dtype=torch.float64)
        with _lost():
            dist.all_reduce(numbers)
        agreed = numbers.tolist()
        return agreed[: len(own)], [value > 0 for value in agreed[len(own) :]]

    def tell(self, make: Callable[[], str]) -> str:
        """The text that ``make`` gives in the first process, told to all. Where it raises, the others leave, with the
        exit code of its error."""
        if self.size == 1:
            return make()
        text = b""
        if self.is_first:
            try:
                text = make().encode("utf-8")
            except BaseException as error:
                no_room = isinstance(error, OSError) or is_out_of_memory(error)
                code = ResourceError.exit_code if no_room else getattr(error, "exit_code", LmkitError.exit_code)
                with contextlib.suppress(LostError):  # they may have given up waiting
                    self.agree([0.0, float(code)])
                raise
        (made, length), _ = self.agree([1.0, float(len(text))])
        if not made:
            raise SystemExit(int(length))
        data = torch.tensor(list(text) or [0] * int(length), dtype=torch.uint8)
        with _lost():
            dist.broadcast(data, 0)
        return bytes(data.tolist()).decode("utf-8")

    def first_alone(self, action: Callable[[], T]) -> T:
        """``action`` in the first process, and when that has ended well, in the others: they find its files."""
        if self.size == 1:
            return action()
        made: list[T] = []

        def act() -> str:
            made.append(action())
            return ""

        self.tell(act)
        return made[0] if self.is_first else action()

    def wait(self) -> None:
        """Go on when all have come here."""
        self.agree([0.0])

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Make these tensors what they are in the first process."""
        if self.size == 1:
            return
        with _lost():
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, 0)
                tensor.detach().copy_(whole)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, which have the same shape, in the order of their ranks."""
        if self.size == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        with _lost():
            dist.all_gather(found, tensor.contiguous())
        return found

    def check_step(self, step: int) -> None:
        """Raise CheckpointError unless all processes, which call this at once, have completed the same step."""
        steps = [int(found) for found in self.gather(torch.tensor([step]))]
        others = [f"process {rank} is at step {found}" for rank, found in enumerate(steps) if found != steps[0]]
        if others:
            raise CheckpointError(
                f"the processes do not agree on the step to save: process 0 is at step {steps[0]}, {', '.join(others)};"
                " nothing is saved",
                "go on from the last checkpoint with resume=true",
            )

    def check_same(self, weights: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError unless all processes, which call this at once, hold the same bits of these weights.

        By the sum of the bits of each: one that was flipped in memory changes it. Pieces are not compared.
        """
        if self.size == 1 or self.shards:
            return
        sums = self.gather(torch.stack([_sum_of_bits(weight) for weight in weights.values()]).cpu())
        for rank, found in enumerate(sums):
            differing = (found != sums[0]).nonzero()
            if len(differing):
                raise CheckpointError(
                    f"process {rank} holds other weights than process 0, the first of them"
                    f" {list(weights)[int(differing[0])]!r}; nothing is saved",
                    "go on from the last checkpoint with resume=true, and have the memory of its machine tested",
                )

    def sum_gradients(self, parameters: Sequence[nn.Parameter], total: Tensor) -> None:
        """Replace ``total`` and the gradients by their sums over the processes, the same bits in all of them.

        A parameter without a gradient counts as zero, and stays without one if it has none in any process. Gradients of
        parameters in pieces were summed in the backward pass.
        """
        if self.size == 1:
            return
        if self.shards:
            with _lost():
                dist.all_reduce(total)
            return
        _, present = self.agree([], [p.grad is not None for p in parameters])
        grads = []
        for p in (p for p, somewhere in zip(parameters, present, strict=True) if somewhere):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            grads.append(p.grad)
        with _lost():
            dist.all_reduce(total)
            for bucket in _buckets(grads):
                flat = torch.cat([grad.reshape(-1) for grad in bucket])
                dist.all_reduce(flat)
                parts = torch.split(flat, [grad.numel() for grad in bucket])
                torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])


SINGLE = World()
"""A process on its own."""


def leave(code: int) -> None:
    """End a process that an error has left joined to others on the spot, with this exit code; else do nothing.

    What connects it to them runs in threads, which would now and then abort it while Python shuts down.
    """
    if _is_joined():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def has_joined(error: BaseException) -> bool:
    """Whether this process had joined others when it met the error, which some of them may not have met."""
    return isinstance(error, StoppedError | LostError) or _is_joined()


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def find_world(config: ParallelConfig) -> World:
    """This process's place, as torchrun's environment tells it.

    Raises ConfigError if torchrun did not start the process though ``parallel`` needs it, or did though it is none.
    """
    keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [key for key in keys if key not in os.environ]
    if isinstance(config, DdpConfig):
        kind = kind_of(config)
        if missing:
            raise ConfigError(
                f"parallel={kind} needs to be started by torchrun ({', '.join(missing)} not set)",
                f"for two processes: torchrun --nproc-per-node 2 -m lmkit COMMAND parallel={kind} ...",
            )
        if not dist.is_available():
            raise ConfigError(f"parallel={kind}: this build of torch has no torch.distributed", "use parallel=none")
        own_rank, num_processes, local_rank, local_size = (int(os.environ[key]) for key in keys[:4])
        shards = isinstance(config, FsdpConfig)
        return World(own_rank, num_processes, local_rank, local_size, shards, turn=next(_turns))
    if not missing and int(os.environ["WORLD_SIZE"]) > 1:
        size = os.environ["WORLD_SIZE"]
        raise ConfigError(f"torchrun has started {size} processes, but parallel=none", "add parallel=ddp or fsdp")
    return SINGLE


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """The sum of the elements of a tensor, read as integers; int64, no dimension."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integers).sum(dtype=torch.int64)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one type that are about BUCKET_BYTES together."""
    bucket: list[Tensor] = []
    num_bytes = 0
    for tensor in tensors:
        if bucket and (num_bytes >= BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append(tensor)
        num_bytes += tensor.numel() * tensor.element_size()
    if bucket:
        yield bucket


@contextlib.contextmanager
def _lost(what: str = "lost each other", *, mixed: bool = False) -> Iterator[None]:
    """Say in one short line that another process has ended or cannot be reached.

    mixed: other things are done inside, too, so that only errors count which name what carries the messages.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        if mixed and not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        reason = re.sub(r"^\[\S*\] ", "", str(error)).partition(". ")[0].partition("\n")[0] or type(error).__name__
        raise LostError(what, reason) from error
