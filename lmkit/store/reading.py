"""Large files read in pieces: while one is hashed, the next ones are on their way.

What is read once, a checkpoint to continue from or one that has just been written, comes straight from the disk where
the system offers that (``O_DIRECT`` of Linux): no second copy of it is made, and it pushes nothing out of the cache.
What is likely to be read again, such as weights to evaluate or to generate with, goes through the cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedReader, FileIO
from typing import TYPE_CHECKING, TypeVar

from lmkit import pages
from lmkit.store.storage import drop_cache

if TYPE_CHECKING:
    from torch import Tensor

PIECE_BYTES = 2 << 20
"""A multiple of every block size."""
AHEAD = 4
"""Pieces on their way from the disk."""

T = TypeVar("T")
Use = Callable[[memoryview], object]
Job = Generator[float, None, T]
"""Work in small parts: after each of them it yields which share of it is done, and in the end it returns something."""


def read_start(file: BufferedReader, num_bytes: int) -> bytes:
    """The first bytes of a file, which is left at its beginning. Raises OSError."""
    with _nothing_ahead(file):
        start = file.read(num_bytes)
    file.seek(0)
    return start


def side_by_side(jobs: Sequence[Job[T]]) -> list[T]:
    """What the jobs return; the one that is least far goes on, so that all end at about the same time.

    An error in one of them ends all.
    """
    shares = dict.fromkeys(range(len(jobs)), 0.0)
    results: dict[int, T] = {}
    try:
        while shares:
            number = min(shares, key=shares.__getitem__)
            try:
                shares[number] = next(jobs[number])
            except StopIteration as end:
                results[number] = end.value
                del shares[number]
    finally:
        for job in jobs:
            job.close()
    return [results[number] for number in range(len(jobs))]


def read_whole(file: BufferedReader, num_bytes: int, use: Use, *, once: bool) -> Job[Tensor]:
    """The first ``num_bytes`` of a file, (num_bytes,) uint8, fewer where it ends early; ``use`` gets piece after piece.

    The pieces are parts of the result and stay. ``once`` says that nobody is expected to read it again: what is not in
    the cache yet is not put there. Raises OSError, and MemoryError (of torch: RuntimeError) if there is no memory.
    """
    import torch  # here, since commands that only look at runs have no need of it

    is_large = num_bytes > PIECE_BYTES
    direct = _open_direct(file) if once and is_large and not _is_cached(file, num_bytes) else None
    if direct is None:
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        num_read = yield from _read_cached(file, num_bytes, use, lambda number: _part(memory.numpy().data, number))
        return memory[:num_read]
    with direct:
        room = pages.memory(num_bytes)
        view = memoryview(room)
        num_read = yield from _read_direct(direct, file, num_bytes, use, lambda number: _part(view, number))
    drop_cache(file)  # the few pages that reading its start has brought in, or else the next look would be misled
    return torch.frombuffer(room, dtype=torch.uint8)[:num_read]


def read_through(file: BufferedReader, num_bytes: int, use: Use, *, from_disk: bool) -> int:
    """Give the first ``num_bytes`` of a file to ``use``, piece after piece; the number of bytes that there were.

    A piece is valid only while it is used. ``from_disk``: what the cache holds does not count. Raises OSError.
    """
    direct = _open_direct(file) if from_disk and num_bytes > PIECE_BYTES else None
    if direct is None:
        if from_disk:
            drop_cache(file)
        piece = memoryview(bytearray(min(num_bytes, PIECE_BYTES)))
        return side_by_side([_read_cached(file, num_bytes, use, lambda number: piece)])[0]
    with direct:
        # shared memory: with O_DIRECT a fork meanwhile would let bytes go astray in private memory (open(2), "NOTES")
        rooms = [memoryview(pages.memory(PIECE_BYTES, shared=True)) for _ in range(AHEAD + 1)]
        return side_by_side([_read_direct(direct, file, num_bytes, use, lambda number: rooms[number % len(rooms)])])[0]


def _part(memory: memoryview, number: int) -> memoryview:
    return memory[number * PIECE_BYTES : (number + 1) * PIECE_BYTES]


def _read_cached(file: BufferedReader, num_bytes: int, use: Use, room: Callable[[int], memoryview]) -> Job[int]:
    done = 0
    while done < num_bytes:
        wanted = min(PIECE_BYTES, num_bytes - done)
        piece = room(done // PIECE_BYTES)[:wanted]
        num_read = file.readinto(piece)
        use(piece[:num_read])
        done += num_read
        yield done / num_bytes
        if num_read < wanted:
            break
    return done


def _read_direct(
    direct: FileIO, file: BufferedReader, num_bytes: int, use: Use, room: Callable[[int], memoryview]
) -> Job[int]:
    """As _read_cached, by threads that read past the cache; where the system gives none, through it, emptied."""
    done = 0
    num_pieces = -(-num_bytes // PIECE_BYTES)
    with ThreadPoolExecutor(AHEAD, "read-ahead") as readers:
        coming: deque[Future[memoryview]] = deque()
        for number in range(num_pieces + AHEAD):
            if number < num_pieces:
                start = number * PIECE_BYTES
                wanted = min(PIECE_BYTES, num_bytes - start)
                try:
                    coming.append(readers.submit(_read_at, direct.fileno(), file.fileno(), room(number), start, wanted))
                except RuntimeError:  # the system gives no more threads
                    if number >= AHEAD:
                        raise
                    break  # nothing has been used yet
            if number >= AHEAD:
                piece = coming.popleft().result()
                use(piece)
                done += len(piece)
                yield done / num_bytes
        else:
            return done
    drop_cache(file)
    return (yield from _read_cached(file, num_bytes, use, room))


def _read_at(direct: int, other: int, room: memoryview, start: int, wanted: int) -> memoryview:
    """``wanted`` bytes from ``start`` on, fewer at the end of the file. What ``direct`` cannot do, ``other`` does."""
    done = 0
    try:
        done = min(wanted, os.preadv(direct, [room[: pages.in_whole_pages(wanted)]], start))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    while done < wanted and (num_read := os.preadv(other, [room[done:wanted]], start + done)) > 0:
        done += num_read
    return room[:done]


def _open_direct(file: BufferedReader) -> FileIO | None:
    """The same file, opened to be read past the cache; None where there is no such thing."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # file systems without it refuse
            return os.fdopen(os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_DIRECT), "rb", 0)
    return None


def _is_cached(file: BufferedReader, num_bytes: int) -> bool:
    """Whether a file's beginning, middle and end are in memory already; true where the system does not say.

    By mincore(2), which brings nothing in. A read that must not wait (``RWF_NOWAIT``) does, and may find it then. Of a
    file that one may neither own nor write Linux says that all of it is in memory.
    """
    import numpy as np  # here, since commands that only look at runs have no need of it

    try:
        mincore = getattr(ctypes.CDLL(None), "mincore", None) if sys.platform == "linux" else None
        if mincore is None:
            return True
        view = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # not a file that can be mapped, or shorter than it is said to be
        return True
    with view:
        start, found = np.frombuffer(view, np.uint8).ctypes.data, ctypes.c_ubyte()
        for place in (0, num_bytes // 2, num_bytes - 1):
            page = start + place // mmap.PAGESIZE * mmap.PAGESIZE
            failed = mincore(ctypes.c_void_p(page), ctypes.c_size_t(1), ctypes.byref(found))
            if failed or found.value & 1 == 0:
                return bool(failed)
    return True


@contextlib.contextmanager
def _nothing_ahead(file: BufferedReader) -> Iterator[None]:
    """Context in which a file's read bytes alone come into the cache, not the megabytes behind them."""
    if sys.platform != "linux":
        yield
        return
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    try:
        yield
    finally:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_NORMAL)
