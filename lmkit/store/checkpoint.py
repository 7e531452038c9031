"""Checkpoints: whole or not there at all, verified by content hash, free of code.

``<run>/checkpoints/step-000000012000/`` is immutable and holds model.safetensors, optim.safetensors (absent if there
is nothing in it), state.json, config.json, tokenizer/ and, written last, MANIFEST.json. Saving is in
``checkpoint_writer``. No pointer file is trusted: the latest checkpoint is the one with the highest step whose files
agree with its manifest.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lmkit.errors import CheckpointError
from lmkit.store import manifest as mf
from lmkit.store.found import FoundRun
from lmkit.store.listing import (
    VALID_LOSS,
    best_first,
    comparable,
    json_object,
    list_checkpoints,
    loss_and_data,
    valid_loss,
)
from lmkit.store.manifest import read_manifest, verify_checkpoint
from lmkit.store.migrations import NewerFormatError, migrate
from lmkit.store.reading import side_by_side
from lmkit.store.tensorfile import read_tensors

BEST = "best"
LATEST = "latest"

T = TypeVar("T")
Warn = Callable[[str], None]


@dataclass
class Snapshot:
    """Everything that a run is at a step boundary. Names of tied tensors may share one storage: it is stored once."""

    step: int
    """Optimizer steps completed."""
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    """JSON data: counters and the like. ``valid_nats_per_token`` decides which checkpoint is the best."""
    config: dict[str, Any]
    """JSON data, from lmkit.config.plain.to_plain."""


def load_checkpoint(
    path: Path, *, with_optimizer: bool, allow_nonfinite: bool = False, shared: bool = False
) -> Snapshot:
    """Read a checkpoint onto the CPU, verifying size and SHA-256 of every file that is read.

    Tied names come back as one tensor. Without the optimizer its file is neither read nor hashed. With it the files
    are left out of the system's cache, unless ``shared`` says that other processes of this machine read them, too.
    Raises CheckpointError if anything disagrees with the manifest, or if a weight is NaN or infinite and that is not
    allowed.
    """
    manifest = read_manifest(path)
    small = {
        entry.path: mf.read_entry(
            path, entry, max_bytes=mf.MAX_JSON_BYTES if entry.path in (mf.STATE, mf.CONFIG) else 1 << 30
        )
        for entry in manifest.files
        if entry.path not in (mf.MODEL, mf.OPTIMIZER)
    }
    once = with_optimizer and not shared
    tensors: dict[str, dict[str, Tensor]] = {mf.MODEL: {}, mf.OPTIMIZER: {}}
    # a hashing thread for each file, and both read side by side, so that no core waits for the other
    with ThreadPoolExecutor(1, "hash-model") as model_hasher, ThreadPoolExecutor(1, "hash-optimizer") as other_hasher:
        hashers = {mf.OPTIMIZER: other_hasher, mf.MODEL: model_hasher} if with_optimizer else {mf.MODEL: model_hasher}
        entries = {file: entry for file in hashers if (entry := manifest.file(file)) is not None}
        found = side_by_side(
            [
                read_tensors(path, entry, manifest.tensors[file], hashers[file], once=once)
                for file, entry in entries.items()
            ]
        )
        tensors |= {file: read for file, (read, _) in zip(entries, found, strict=True)}
        bad = None if allow_nonfinite else first_nonfinite(tensors[mf.MODEL])
        for _, check in found:
            check()
    if bad is not None:
        raise CheckpointError(
            f"{path / mf.MODEL}: {bad} holds NaN or infinity",
            "use an earlier checkpoint; run.allow_nonfinite=true of eval-ppl and generate reads it all the same",
        )
    for file, named in tensors.items():
        named |= {alias: named[name] for alias, name in manifest.aliases.get(file, {}).items()}
        tensors[file] = migrate(path / file, named, manifest.version)
    return Snapshot(
        step=manifest.step,
        model=tensors[mf.MODEL],
        optimizer=tensors[mf.OPTIMIZER],
        state=json_object(small[mf.STATE], path / mf.STATE, manifest.version),
        config=json_object(small[mf.CONFIG], path / mf.CONFIG, manifest.version),
    )


def first_nonfinite(tensors: dict[str, Tensor]) -> str | None:
    """Name of a floating-point tensor, on the CPU, that holds NaN or infinity."""
    for name, tensor in tensors.items():
        wide = tensor.float() if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else tensor
        if not wide.is_floating_point() or _has_finite_sum(wide):
            continue  # the sum, which is quick, is finite only if all are; finite numbers may have an infinite one
        if not bool(torch.isfinite(wide).all()):
            return name
    return None


def _has_finite_sum(tensor: Tensor) -> bool:
    if tensor.dtype not in (torch.float32, torch.float64):
        return bool(torch.isfinite(tensor.sum()))
    with np.errstate(all="ignore"):
        # one thread: beside training or hashing, torch's would wait for each other
        return bool(np.isfinite(np.add.reduce(tensor.detach().numpy().reshape(-1))))


def latest_checkpoint(run_dir: Path, warn: Warn) -> Path | None:
    """The newest checkpoint whose files all verify, or None if the run has none at all.

    ``warn`` is told which newer ones were skipped and why. Raises CheckpointError if all that there are are damaged.
    """
    return _first_whole(run_dir, list_checkpoints(run_dir)[::-1], _verified, warn)


def load_latest(run_dir: Path, warn: Warn, *, shared: bool = False) -> tuple[Path, Snapshot] | None:
    """The newest whole checkpoint and its content, optimizer included, read once; otherwise like latest_checkpoint.

    ``shared``: see load_checkpoint.
    """

    def load(path: Path) -> tuple[Path, Snapshot]:
        return path, load_checkpoint(path, with_optimizer=True, shared=shared)

    return _first_whole(run_dir, list_checkpoints(run_dir)[::-1], load, warn)


def best_checkpoint(run_dir: Path, warn: Warn) -> Path | None:
    """The whole checkpoint with the lowest validation loss (the newest of equals); the latest if none was evaluated.

    Where the run went on with other data, only those of its present data count as evaluated.
    """
    newest_first = list_checkpoints(run_dir)[::-1]
    found: dict[str, tuple[float | None, str | None]] = {}
    for path in newest_first:
        try:
            found[path.name] = loss_and_data(path)
        except NewerFormatError:
            raise
        except CheckpointError:
            continue  # _first_whole will say what is wrong with it
    return _first_whole(run_dir, best_first(newest_first, comparable(newest_first, found)), _verified, warn)


def _verified(path: Path) -> Path:
    verify_checkpoint(path)
    return path


def _first_whole(run_dir: Path, paths: list[Path], use: Callable[[Path], T], warn: Warn) -> T | None:
    """``use`` of the first checkpoint for which it raises no CheckpointError; that of a newer format is not skipped.

    One that is gone by now was retired by its run, which is no damage. Raises CheckpointError if nothing is left.
    """
    damaged, retired = [], False
    for path in paths:
        try:
            result = use(path)
        except NewerFormatError:
            raise
        except CheckpointError as error:
            if path.exists():
                damaged.append(f"{path.name}: {error}")
            else:
                retired = True
            continue
        for problem in damaged:
            warn(f"skipped a damaged checkpoint of {run_dir}, {problem}; using {path.name}")
        return result
    if damaged:
        raise CheckpointError(
            f"every checkpoint of {run_dir} is damaged ({'; '.join(damaged)})",
            "restore one from a copy, or start a new run",
        )
    if retired:
        raise CheckpointError(f"every checkpoint of {run_dir} was retired by its run while it was read", "try again")
    return None


def resolve_checkpoint(run: FoundRun, which: str, warn: Warn) -> Path:
    """The checkpoint that ``which`` names: best, latest, or a directory name such as step-000000001000.

    A run that was found by the path of one of its checkpoints gives that checkpoint. Raises CheckpointError.
    """
    if run.checkpoint is not None:
        return run.checkpoint
    known = list_checkpoints(run.path)
    if which in (BEST, LATEST):
        path = (best_checkpoint if which == BEST else latest_checkpoint)(run.path, warn)
    else:
        path = next((p for p in known if p.name == which), None)
    if path is not None:
        return path
    if not known:
        raise CheckpointError(f"{run.path} has no checkpoint", "continue it with resume=true, or name another run=DIR")
    names = ", ".join(p.name for p in known)
    raise CheckpointError(f"run.checkpoint={which!r} is not in {run.path}", f"there are best, latest, {names}")


__all__ = [
    "VALID_LOSS",
    "Snapshot",
    "Warn",
    "best_checkpoint",
    "first_nonfinite",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_latest",
    "resolve_checkpoint",
    "valid_loss",
]
