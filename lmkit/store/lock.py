"""The kernel lock of a run directory: one process trains a run, and the system frees the lock when that one ends."""

from __future__ import annotations

from pathlib import Path

import filelock

from lmkit.errors import CheckpointError, ResourceError, RunLockedError
from lmkit.store import storage
from lmkit.store.found import LOCK, LOCK_INFO
from lmkit.store.records import read_object

LOOK_S = 0.5
"""Whoever looks whether a run is training holds its lock for a moment; so long does a run that begins wait for it."""


class NoLocksError(ResourceError):
    """The run directory is on a file system that has no locks."""


def acquire(path: Path, *, patience_s: float = 0.0) -> filelock.BaseFileLock:
    """Take the run's kernel lock, which the system frees when the process ends in whatever way.

    ``patience_s``: how long to wait for one that is held. Raises RunLockedError naming the holder, NoLocksError, or
    ResourceError.
    """
    lock = filelock.FileLock(path / LOCK, timeout=patience_s, thread_local=False, fallback_to_soft=False)
    try:
        if (path / LOCK).is_symlink():
            raise OSError(None, "LOCK is a symbolic link")
        lock.acquire()
    except filelock.Timeout:
        raise RunLockedError(
            f"{path} is in use by {_holder(path)}", "wait for it or stop it, or choose another run.dir"
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and not storage.has_no_locks(error):
            raise storage.resource_error("lock", path, error) from error
        raise NoLocksError(
            f"{path} is on a file system without locks ({error})",
            "choose a run.dir on a local disk, or train without one: run.lock=off",
        ) from error
    return lock


def _holder(path: Path) -> str:
    """Who holds the lock, as far as LOCK.info says."""
    try:
        info = read_object(path / LOCK_INFO) or {}
    except CheckpointError:
        info = {}
    return f"process {info.get('pid', '?')} on {info.get('host', '?')}, started {info.get('started', '?')}"
