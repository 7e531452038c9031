"""Memory straight from the system, in large pages where it has them.

With a page for each 4 KiB, getting the memory of large tensors and finding one's way in it take long.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def memory(num_bytes: int, *, shared: bool = False) -> mmap.mmap:
    """Whole pages of zeros, large ones if they are not ``shared`` with forked processes. Raises MemoryError."""
    flags = mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
    try:
        room = mmap.mmap(-1, in_whole_pages(num_bytes), flags=flags)
    except OSError as error:
        raise MemoryError(f"the system gives no {num_bytes / 1e6:.1f} MB of memory") from error
    if not shared and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            room.madvise(mmap.MADV_HUGEPAGE)
    return room


def in_whole_pages(num_bytes: int) -> int:
    """The size in bytes of the pages that hold so many."""
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


class Shelf:
    """Room for tensors of fp32 on the CPU that lie one after the other."""

    MIN_BYTES = 32 << 20
    """Is got from the system at once; what is not written to takes no memory."""

    def __init__(self) -> None:
        import torch  # here, since commands that only look at runs use this module and not torch

        self.free = torch.empty(0)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy in the room that is left, or in new room."""
        import torch

        number = tensor.numel()
        if number > len(self.free):
            self.free = torch.frombuffer(memory(max(4 * number, self.MIN_BYTES)), dtype=torch.float32)
        copy = self.free[:number].view(tensor.shape)
        self.free = self.free[number:]
        return copy.copy_(tensor)
