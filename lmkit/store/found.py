"""Runs as those see them who only read: their files, their metrics and result."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmkit.errors import CheckpointError
from lmkit.store import records, storage
from lmkit.store.manifest import MANIFEST
from lmkit.store.records import read_object

CHECKPOINTS = "checkpoints"
RUN_INFO = "run.json"
RESULT = "result.json"
METRICS = "metrics.jsonl"
JOURNAL = "journal.jsonl"
LOCK = "LOCK"
LOCK_INFO = "LOCK.info"
FINISHED = "finished"
"""``status`` in result.json of a run that came to its end."""
_REMEDY = "remove it: a run that goes on writes it anew"


def absolute(path: str | Path) -> Path:
    """The absolute path, with ~ for the home folder; that of an unknown user stays as it is."""
    return Path(os.path.expanduser(path)).absolute()


def metrics_row(line: bytes) -> dict[str, Any] | None:
    """One line of metrics.jsonl, or None if it is torn or foreign."""
    row = records.parse_row(line)
    return row if row is not None and type(row.get("step")) is int else None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in order; NaN and infinity are floats again, torn lines are left out.

    No file is no row. Raises CheckpointError if it cannot be read.
    """
    path = run_dir / METRICS
    try:
        lines = storage.read_regular(path).splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    return [row for row in map(metrics_row, lines) if row is not None]


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """result.json, or None if the run has not written one. Raises CheckpointError if it is damaged."""
    return read_object(run_dir / RESULT, _REMEDY)


def read_info(run_dir: Path) -> dict[str, Any] | None:
    """run.json, or None if the run has not written one. Raises CheckpointError if it is damaged."""
    info = read_object(run_dir / RUN_INFO, _REMEDY)
    for key, kind, what in (("digests", dict, "object"), ("former_data", list, "array")):
        if info is not None and not isinstance(info.get(key) or kind(), kind):
            raise CheckpointError(f"{run_dir / RUN_INFO} is damaged: {key} must be a JSON {what}", _REMEDY)
    return info


@dataclass(frozen=True)
class FoundRun:
    """An existing run that a command reads."""

    path: Path
    checkpoint: Path | None = None
    """The checkpoint that was named instead of its run, if any."""


def open_run(path: str | Path) -> FoundRun:
    """The run at ``path``, which may also be one of its checkpoints or a checkpoint that was copied elsewhere.

    Raises CheckpointError if there is no run or it has no checkpoint yet.
    """
    path = absolute(path)
    if not os.path.isdir(path):  # False, where Path.is_dir raises, for a name that is too long
        what = "is not a directory" if os.path.exists(path) else "does not exist"
        raise CheckpointError(f"run={path} {what}", "name a run directory, or leave run out to take the newest one")
    if (path / MANIFEST).is_file():
        return FoundRun(path.parent.parent if path.parent.name == CHECKPOINTS else path, path)
    if not (path / RUN_INFO).exists() and not (path / CHECKPOINTS).is_dir():
        raise CheckpointError(f"run={path} is not a run directory", "name one that lmkit pretrain or finetune has made")
    checkpoints = path / CHECKPOINTS
    # one that is gone already was retired by the run, which has newer ones then
    if not checkpoints.is_dir() or not any(
        (p / MANIFEST).is_file() or not p.exists() for p in checkpoints.glob("step-*")
    ):
        raise CheckpointError(f"run={path} has no checkpoint yet", f"continue it: run.dir={path} resume=true")
    return FoundRun(path)
