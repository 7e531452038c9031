"""Where a text file is cut in three, so that its end can be held out for valid and test."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from lmkit.data.textfiles import Part, chunks, is_compressed, readable

VERSION = 2
"""Raised when the same file is cut at other places."""

Finder = Callable[[int], int]
"""The last place at or before a position where the text may be cut."""

_SMALL_BYTES = 1024
"""A text of fewer is cut at line ends wherever these are."""


def cut_by_lines(path: Path, fractions: tuple[float, float]) -> tuple[int, int, int]:
    """Byte offsets (begin of the second part, begin of the third part, size) that cut a text in three.

    The last two parts get the given shares of the bytes, and at least one line each where their share is not 0. Where
    lines are so long that the first part would have less than half of its share, the text is cut at blanks, and where
    these are too far apart, too, between characters. The offsets count decompressed bytes. Raises DataError for a file
    that cannot be read.
    """
    with readable(path):
        return _cut(path, fractions)


def _cut(path: Path, fractions: tuple[float, float]) -> tuple[int, int, int]:
    size, start_of_line = _starts(path, b"\n")
    ends = (1 - fractions[0] - fractions[1], 1 - fractions[1])
    finders: tuple[Callable[[], Finder], ...] = (
        lambda: start_of_line,
        lambda: _starts(path, b" ")[1],
        lambda: partial(_start_of_character, path),
    )
    for finder in finders:
        start_before = finder()
        third = start_before(min(int(size * ends[1]), size - 1)) if fractions[1] and size else size
        second = start_before(min(int(size * ends[0]), third - 1)) if fractions[0] and third else third
        if 2 * second > int(size * ends[0]) or size < _SMALL_BYTES:
            break
    return second, third, size


def _starts(path: Path, separator: bytes) -> tuple[int, Finder]:
    """The size of a file, and what finds the starts of its lines (or words)."""
    if not is_compressed(path):
        return path.stat().st_size, partial(_start_before, path, separator)
    size, starts = _line_starts(path, separator)
    return size, lambda position: starts[bisect_right(starts, position) - 1]


def _start_before(path: Path, separator: bytes, position: int) -> int:
    """The last start of a line (or word) at or before ``position`` in a plain file."""
    with path.open("rb") as file:
        end = position
        while end > 0:
            begin = max(0, end - 65536)
            file.seek(begin)
            found = file.read(end - begin).rfind(separator)
            if found >= 0:
                return begin + found + 1
            end = begin
    return 0


def _start_of_character(path: Path, position: int) -> int:
    """The last start of a character of UTF-8 at or before ``position``."""
    begin = max(0, position - 3)
    data = b"".join(chunks(Part(path, begin, position + 1)))
    return begin + max((i for i, byte in enumerate(data) if byte & 0xC0 != 0x80), default=0)


def _line_starts(path: Path, separator: bytes) -> tuple[int, list[int]]:
    """Size and starts of lines (or words) of a compressed file; thinned evenly so that at most a million are kept."""
    starts, position, step, seen = [0], 0, 1, 0
    for chunk in chunks(Part(path)):
        found = np.flatnonzero(np.frombuffer(chunk, np.uint8) == separator[0]) + (position + 1)
        keep = found[(-seen - 1) % step :: step]
        starts.extend(keep.tolist())
        seen += len(found)
        position += len(chunk)
        while len(starts) > 1_000_000:
            starts, step = starts[::2], step * 2
    if starts[-1] == position and position:
        starts.pop()
    return position, starts
