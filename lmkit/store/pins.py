"""Pinned checkpoints: their steps are named in ``<run>/pinned.json`` and retention never deletes them.

The file stands beside the checkpoints, which are immutable, and may be changed while the run is training.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lmkit.errors import CheckpointError
from lmkit.store import storage
from lmkit.store.records import read_object, to_json

PINNED = "pinned.json"


def read_pins(run_dir: Path) -> frozenset[int]:
    """Steps of the pinned checkpoints. Raises CheckpointError if the file is damaged."""
    path = run_dir / PINNED
    value = read_object(path)
    steps = [] if value is None else value.get("steps")
    if not isinstance(steps, list) or not all(type(step) is int and step >= 0 for step in steps):
        raise CheckpointError(
            f'{path} must hold steps, as in {{"steps": [120]}}', "mend it, or remove it and pin again"
        )
    return frozenset(steps)


def write_pins(run_dir: Path, steps: Iterable[int]) -> None:
    """Replace the pinned steps atomically. Raises ResourceError."""
    path = run_dir / PINNED
    with storage.resource_errors("write", path):
        storage.replace_file(path, to_json({"steps": sorted(steps)}))
