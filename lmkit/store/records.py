"""Small files of JSON records that a run writes about itself: NaN is kept, and a log never stops the training."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmkit.errors import CheckpointError
from lmkit.store import storage
from lmkit.store.manifest import parse_json, read_small_file, unreadable

_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class LineFile:
    """A file of JSON lines that is only appended to. The first failure is a warning; training never stops for a log."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path = path
        self._warn = warn
        self._warned = False
        self._torn = False
        self._descriptor: int | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one line with a single write, so that lines of several threads or processes never mix."""
        line = (json.dumps(encode(row), ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")
        try:
            if self._descriptor is None:
                self._descriptor = storage.open_to_append(self._path)
                self._torn = _ends_torn(self._descriptor)
            data = b"\n" + line if self._torn else line
            self._torn = os.write(self._descriptor, data) < len(data)  # known only then: another thread may write, too
            if self._torn:
                raise OSError(None, "the disk is full")
        except OSError as error:
            if not self._warned:
                self._warned = True
                self._warn(f"cannot write {self._path}: {error.strerror or error}; going on without some of its lines")

    def sync(self) -> None:
        """Wait until its lines are on the disk, if the disk takes them."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                storage.sync_file(self._descriptor)

    def close(self) -> None:
        """Close the file; a later append opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _ends_torn(descriptor: int) -> bool:
    """Whether a file ends within a line, as the log of a process does that found the disk full and then ended."""
    if os.lseek(descriptor, 0, os.SEEK_END) == 0:
        return False
    os.lseek(descriptor, -1, os.SEEK_END)
    return os.read(descriptor, 1) != b"\n"


def encode(value: Any) -> Any:
    """JSON data in which NaN and infinity are the texts NaN, Infinity and -Infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def decode(value: Any) -> Any:
    """The inverse of ``encode``."""
    if isinstance(value, str):
        return _NONFINITE.get(value, value)
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return value


def to_json(value: Mapping[str, Any]) -> bytes:
    """The object as UTF-8. Half characters, as in the name of a file that is not UTF-8, become JSON's \\udce9."""
    text = json.dumps(encode(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def read_object(path: Path, remedy: str = "mend it, or remove it") -> dict[str, Any] | None:
    """A JSON object, None if the file is missing. Raises CheckpointError naming the file if it cannot be read.

    remedy: what to do if it is damaged.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(path, error) from None
    raw = read_small_file(path)
    try:
        value = decode(parse_json(raw, path))
    except CheckpointError as error:
        raise CheckpointError(error.problem, remedy) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}", remedy)
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file of JSON lines; torn lines are left out, and no readable file is no line."""
    try:
        lines = storage.read_regular(path).splitlines()
    except OSError:
        return []
    return [row for line in lines if (row := parse_row(line)) is not None]


def parse_row(line: bytes) -> dict[str, Any] | None:
    """One line of such a file, or None if it is torn or no object."""
    try:
        row = decode(json.loads(line))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
