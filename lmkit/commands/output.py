"""What a command leaves for other programs: text on standard output, and a JSON file."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmkit.errors import ConfigError, ResourceError
from lmkit.store import storage
from lmkit.store.records import to_json


def write_text(text: str) -> None:
    """Write to standard output as UTF-8, whatever the locale says, and at once. May raise BrokenPipeError."""
    buffer = getattr(sys.stdout, "buffer", None)
    if buffer is None:
        sys.stdout.write(text)
    else:
        sys.stdout.flush()
        buffer.write(text.encode("utf-8", "replace"))
    sys.stdout.flush()


def output_path(name: str, key: str = "output") -> Path:
    """The resolved path of a file to write; ConfigError, naming the key, before any work if none can be made there."""
    path = Path(os.path.realpath(os.path.expanduser(name)))  # Path.resolve raises for links in a ring
    if path.exists() and not path.is_file():
        raise ConfigError(f"{key}={path} is not a regular file", "name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{key}={path}: the directory {path.parent} does not exist", "make it, or name another file")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{key}={path}: {path.parent} is not writable", "name a file elsewhere")
    return path


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write an object whole or not at all; infinity and NaN become texts. Raises ResourceError."""
    write_file(path, to_json(data), "output")


def write_file(path: Path, data: bytes, key: str) -> None:
    """Write a file whole or not at all. Raises ResourceError that names the key."""
    try:
        storage.replace_file(path, data)
    except OSError as error:
        raise ResourceError(f"cannot write {key}={path}: {error.strerror or error}", "name another file") from error
