"""Which checkpoints a run has and how good they are, without loading torch or any tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmkit.errors import CheckpointError
from lmkit.store import manifest as mf
from lmkit.store.found import CHECKPOINTS
from lmkit.store.manifest import read_manifest
from lmkit.store.migrations import migrate

VALID_LOSS = "valid_nats_per_token"
"""Key of ``Snapshot.state``: validation loss of exactly these weights, absent or null if not evaluated. A
task may have another loss than nats per token, whatever the name says."""


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run by step, oldest first; not verified."""
    folder = run_dir / CHECKPOINTS
    try:
        entries = [p for p in folder.iterdir() if mf.step_of(p.name) is not None and p.is_dir() and not p.is_symlink()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise mf.unreadable(folder, error) from None
    return sorted(entries, key=lambda p: p.name)


def refuse_links(run_dir: Path) -> None:
    """Raise CheckpointError if a run that is to go on has links in place of checkpoints, which are never followed."""
    for path in (run_dir / CHECKPOINTS).glob("step-*"):
        if path.is_symlink() and mf.step_of(path.name) is not None:
            raise CheckpointError(f"{path} is a symbolic link", "put the checkpoint itself there")


def best_first(newest_first: list[Path], losses: Mapping[str, float | None]) -> list[Path]:
    """Checkpoints by validation loss, the lowest first, then those without one; of equals the newest first.

    losses: directory name -> loss.
    """

    def key(path: Path) -> float:
        loss = losses.get(path.name)
        return math.inf if loss is None else loss

    return sorted(newest_first, key=key)


def comparable(
    newest_first: list[Path], found: Mapping[str, tuple[float | None, str | None]]
) -> dict[str, float | None]:
    """The losses of those checkpoints that are of the data of the newest one, and None for all others.

    A run may go on with other data, and losses of different texts say nothing about which weights are better. found:
    directory name -> ``loss_and_data``; a checkpoint that names no data is of any.
    """
    digests = (found[path.name][1] for path in newest_first if path.name in found)
    present = next((digest for digest in digests if digest is not None), None)
    return {name: loss if digest in (None, present) else None for name, (loss, digest) in found.items()}


def loss_and_data(path: Path) -> tuple[float | None, str | None]:
    """The validation loss that a checkpoint records, and the digest of its data. Raises CheckpointError."""
    return valid_loss(path), read_manifest(path).digests.get("data")


def valid_loss(path: Path) -> float | None:
    """The validation loss that a checkpoint records, if it was evaluated. Raises CheckpointError."""
    value = read_json_entry(path, mf.STATE).get(VALID_LOSS)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def read_json_entry(path: Path, name: str) -> dict[str, Any]:
    """A JSON file of a checkpoint, such as config.json, verified by its SHA-256. Raises CheckpointError."""
    manifest = read_manifest(path)
    entry = manifest.file(name)
    return {} if entry is None else json_object(mf.read_entry(path, entry), path / name, manifest.version)


def json_object(raw: bytes, where: Path, version: int) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint of a format version, as today's. Raises CheckpointError naming it."""
    value = mf.parse_json(raw, where)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must hold a JSON object, found {type(value).__name__}")
    return migrate(where, value, version)
