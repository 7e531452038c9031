"""Checkpoints of older formats, brought to today's in memory, one version at a time; nothing on the disk changes.

When the format changes: raise VERSION, add the step from the version before to STEPS, and keep the golden checkpoints
of the version before in tests/golden as they are. For ever the same: the names of the files, and in MANIFEST.json the
fields ``format``, ``version`` and ``self`` (the SHA-256 of the canonical JSON of all the rest), so that a newer format
can be told from a damaged file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmkit.errors import CheckpointError

VERSION = 1
"""The format that this lmkit writes."""

Content = dict[str, Any]
"""What a file holds: its JSON object, or name -> tensor."""

STEPS: dict[int, Mapping[str, Callable[[Content], Content]]] = {}
"""Version -> name of a file -> function that gives the file's content as the next version would have written it.

Files that the next version did not change are not listed. The table of tensors in MANIFEST.json describes the file on
the disk: tensors get new names in the step of their file only.
"""


class NewerFormatError(CheckpointError):
    """A whole checkpoint that a newer lmkit wrote: no older checkpoint is taken in its place."""


def check_version(version: Any, manifest: Path, environment: Any) -> None:
    """Raises CheckpointError unless STEPS leads from ``version`` to today's.

    ``environment``: that of the manifest, which names the lmkit that wrote it.
    """
    if type(version) is int and version > VERSION:
        writer = environment.get("lmkit") if isinstance(environment, dict) else None
        known = isinstance(writer, str) and re.fullmatch(r"[0-9][0-9A-Za-z.+-]{0,40}", writer)
        needed = f"update lmkit to {writer} or newer" if known else "update lmkit to read it"
        raise NewerFormatError(f"{manifest} has format version {version}, newer than {VERSION}", needed)
    if type(version) is not int or (version != VERSION and version not in STEPS):
        raise CheckpointError(f"{manifest} has the unknown format version {version!r}")


def migrate(path: Path, content: Content, version: int) -> Content:
    """The content of a file of a checkpoint of ``version``, as today's version would have written it.

    Raises CheckpointError naming the file if its content is not one of that version.
    """
    for older in range(version, VERSION):
        change = STEPS[older].get(path.name)
        try:
            content = content if change is None else change(content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} does not fit format version {older}: {error!r}") from None
    return content
