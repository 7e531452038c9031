"""Run directories: made, locked and written. How they are found and read again is in ``found``.

``<run>/`` holds LOCK (a kernel lock for the life of the process), LOCK.info (who holds it, for people), run.json
(how it began, and on which data it goes on), journal.jsonl (one line per event), metrics.jsonl (one line per logged
step), result.json, checkpoints/.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import filelock

from lmkit.config.text import format_value
from lmkit.errors import ConfigError, LmkitError, ResourceError, StoppedError
from lmkit.store import storage
from lmkit.store.found import (
    CHECKPOINTS,
    FINISHED,
    JOURNAL,
    LOCK,
    LOCK_INFO,
    METRICS,
    RESULT,
    RUN_INFO,
    absolute,
    metrics_row,
    read_info,
)
from lmkit.store.lock import LOOK_S, NoLocksError, acquire
from lmkit.store.records import LineFile, to_json

Change = tuple[str, Any, Any]
"""What has changed, from what to what."""


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


class Listener(Protocol):
    """Who else is told of a run's metrics. Its methods never raise for its own troubles."""

    def row(self, row: Mapping[str, Any]) -> None:
        """A row was logged."""

    def end(self, error: BaseException | None) -> None:
        """The process's part of the run is over; ``error`` is what ended it early."""


class Run:
    """A run directory that this process has locked and writes to. Use ``Run.create``; ``close`` frees the lock."""

    def __init__(self, path: Path, lock: filelock.BaseFileLock | None, warn: Callable[[str], None]) -> None:
        """lock: what ``acquire`` gave; None: there is none."""
        self.path = path
        self.run_id = uuid.uuid4().hex
        self.digests: dict[str, str] = {}
        """Digests of what the run is trained on (``data``); set by ``begin`` and written into every checkpoint."""
        self.former_data: list[str] = []
        """Digests of the data that the run was trained on before these, the oldest first; kept in run.json."""
        self.place: dict[str, str] = {}
        """Where it is trained, as far as bits may depend on it (``device``); written into every checkpoint, too."""
        self._lock = lock
        self._has_ended = False
        """Whether the journal says how this process's part has ended."""
        self._listeners: list[Listener] = []
        self._metrics = LineFile(path / METRICS, warn)
        self._journal = LineFile(path / JOURNAL, warn)

    @classmethod
    def create(
        cls,
        directory: str | Path | None,
        *,
        root: str | Path,
        dataset: str,
        model: str,
        resume: bool,
        warn: Callable[[str], None],
        lock: bool = True,
    ) -> Self:
        """Make (or, with ``resume``, reopen) a run directory and lock it.

        ``directory`` None: a new ``<root>/<YYYYmmdd-HHMMSS>-<dataset>-<model>``, with -2, -3 ... after a name that is
        taken. ``resume`` starts a given directory that is missing or empty. ``warn`` is told once if a log cannot be
        written. Without ``lock`` a file system that has no locks will do, of which ``warn`` is told. Raises ConfigError
        (directory not empty, or not a run), RunLockedError, NoLocksError, or ResourceError (cannot write there).
        """
        if directory is None:
            if resume:
                raise ConfigError("resume=true does not say which run to continue", "name it: run.dir=DIR")
            path = _make_new(absolute(root), dataset, model)
        else:
            path = absolute(directory)
            _make_given(path)
            if LOCK not in os.listdir(path):
                _check_usable(path, resume=resume)  # before anything is written into a folder that is not a run
        held: filelock.BaseFileLock | None = None
        try:
            held = acquire(path, patience_s=LOOK_S)
        except NoLocksError:
            if lock:
                raise
        try:
            _check_usable(path, resume=resume)
            run = cls(path, held, warn)
            run._open()
            if held is None:
                warn(f"{path} is on a file system without locks: nothing keeps a second process out of the run")
                run.journal("no lock")
        except BaseException:
            if held is not None:
                held.release()
            raise
        return run

    def _open(self) -> None:
        """Prove that the directory can be written, and clear what a killed process left."""
        holder = {"pid": os.getpid(), "host": platform.node(), "started": _utc_now()}
        with storage.resource_errors("write in", self.path):
            storage.replace_file(self.path / LOCK_INFO, to_json(holder))
            (self.path / CHECKPOINTS).mkdir(exist_ok=True)
            storage.sync_directory(self.path)
            with contextlib.suppress(OSError):  # a parent that may be passed through but not read
                storage.sync_directory(self.path.parent)
            storage.sweep(self.path)
            storage.sweep(self.path / CHECKPOINTS)
        info = read_info(self.path)
        if info is not None:
            self.run_id = str(info.get("run_id", self.run_id))
            self.digests = {str(key): str(value) for key, value in (info.get("digests") or {}).items()}
            self.former_data = [str(digest) for digest in info.get("former_data") or []]

    def begin(
        self,
        *,
        seed: int,
        command: Sequence[str],
        digests: Mapping[str, str],
        base: tuple[str, str] | None = None,
        show: Callable[[list[Change]], None] = lambda changes: None,
        new_data: bool = False,
    ) -> None:
        """Write run.json, or if the run goes on, check that seed, digests and base are still the same.

        ``digests``: name -> SHA-256 or key of what must not change, e.g. data and tokenizer. ``base``: path and SHA-256
        of the checkpoint that the run starts from, which a run that was killed before its own first one finds here.
        Raises ConfigError with both values of what differs, which are first given to ``show``. With ``new_data`` the
        data may be others than run.json says, which stays as it is until ``take_data``.
        """
        digests = dict(digests)
        base_path, base_sha256 = base or (None, None)
        info = read_info(self.path)
        if info is None:
            info = {
                "run_id": self.run_id,
                "created": _utc_now(),
                "seed": seed,
                "command": list(command),
                "digests": digests,
                "base": base_path,
                "base_sha256": base_sha256,
            }
            if self.former_data:
                info["former_data"] = self.former_data
            self._replace(RUN_INFO, info)
            self.journal("start", {"command": list(command)})
        else:
            old = {"seed": info.get("seed"), "base_sha256": info.get("base_sha256"), **(info.get("digests") or {})}
            new = {"seed": seed, "base_sha256": base_sha256, **digests}
            if new_data:
                old.pop("data", None)
            self.refuse_changes(old, new, show, base=info.get("base"))
            self.journal("resume", {"command": list(command)})
        self.digests = digests

    def take_data(self, former: Sequence[str]) -> None:
        """Write into run.json that the run goes on with the data that ``begin`` was told of.

        ``former``: digests of the data that it was trained on before, the oldest first. Raises ResourceError.
        """
        info = read_info(self.path) or {}
        known, now, self.former_data = info.get("digests") or {}, self.digests["data"], list(former)
        if (known.get("data", now), info.get("former_data", [])) != (now, self.former_data):
            changed = {"digests": known | {"data": now}, "former_data": self.former_data}
            self._replace(RUN_INFO, {**info, **changed})

    def refuse_changes(
        self,
        old: Mapping[str, Any],
        new: Mapping[str, Any],
        show: Callable[[list[Change]], None],
        base: str | None = None,
    ) -> None:
        """Raise ConfigError with both values of what differs, which are first given to ``show``.

        What ``old`` does not name was not recorded yet and counts as the same. ``base``: what the run began with.
        """
        changes = [
            (key, old.get(key, new.get(key)), new.get(key))
            for key in sorted({*old, *new})
            if old.get(key, new.get(key)) != new.get(key)
        ]
        if changes:
            show(changes)
            told = ", ".join(f"{name}: {format_value(before)} -> {format_value(now)}" for name, before, now in changes)
            remedy = "start a new run, or finetune from this one"
            names = [name for name, _, _ in changes]
            if names == ["data"]:
                remedy += ", or go on with the new data: run.allow_data_change=true"
            if names == ["base_sha256"] and base is not None:
                remedy += f", or go on from what this one began with: {base}"
            raise ConfigError(f"{self.path} cannot be resumed because this changed: {told}", remedy)

    def journal(self, event: str, fields: Mapping[str, Any] | None = None) -> None:
        """Append an event to journal.jsonl; may be called from any thread, never raises for a full disk."""
        self._has_ended = self._has_ended or event in ("stopped", FINISHED)
        self._journal.append({"time": _utc_now(), "event": event, "pid": os.getpid(), **(fields or {})})

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a row, which must hold ``step``, to metrics.jsonl; NaN is kept. Never raises for a full disk."""
        if "step" not in row:
            raise ValueError("a row of metrics needs its step")
        self._metrics.append(row)
        for listener in self._listeners:
            listener.row(row)

    def attach(self, listener: Listener) -> None:
        """From now on tell ``listener`` each row of metrics too, and in the end how this process's part has ended."""
        self._listeners.append(listener)

    def cut_metrics(self, step: int, *, validated: bool = True) -> None:
        """Cut metrics.jsonl back to the rows of steps <= ``step`` (that of the checkpoint that the run goes on from).

        ``validated``: whether that checkpoint knows of a validation after its step; else the row of one, which comes
        anew, is cut, too. The rest, a torn last line included, is appended to metrics.jsonl.old. Raises ResourceError.
        """
        path, old = self.path / METRICS, self.path / f"{METRICS}.old"
        self._metrics.close()
        raw = b""
        with storage.resource_errors("write", path), contextlib.suppress(FileNotFoundError):
            raw = storage.read_regular(path)
        kept = 0
        for line in raw.splitlines(keepends=True):
            row = metrics_row(line)
            last = step - 1 if row is not None and "valid_loss" in row and not validated else step
            if not line.endswith(b"\n") or (row is not None and row["step"] > last):
                break
            kept += len(line)
        if kept < len(raw):
            with storage.resource_errors("write", old):
                descriptor = storage.open_to_append(old)
                try:
                    storage.write_all(descriptor, raw[kept:] if raw.endswith(b"\n") else raw[kept:] + b"\n")
                finally:
                    os.close(descriptor)
            with storage.resource_errors("write", path):
                storage.replace_file(path, raw[:kept])

    def write_result(self, result: Mapping[str, Any], *, status: str = FINISHED) -> None:
        """Write result.json atomically, with ``status`` and the time, when the journal is on the disk. Raises
        ResourceError."""
        self._journal.sync()  # or else the result of a run that has not ended might be all that a power cut leaves
        self._replace(RESULT, {"status": status, "ended": _utc_now(), "run_id": self.run_id, **result})

    def _replace(self, name: str, value: Mapping[str, Any]) -> None:
        with storage.resource_errors("write", self.path / name):
            storage.replace_file(self.path / name, to_json(value))

    def close(self) -> None:
        """Close the logs and free the lock."""
        self._metrics.close()
        self._journal.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._note(error)
            for listener in self._listeners:
                listener.end(error)
        finally:
            self.close()

    def _note(self, error: BaseException | None) -> None:
        """Journal what ends this process's part early; a stop that was waited for was journalled before."""
        with contextlib.suppress(Exception):  # whatever it is: the error that people must see is the other one
            if isinstance(error, KeyboardInterrupt):
                if not self._has_ended:  # but before the first step, or by a second signal
                    self.journal("interrupted")
            elif isinstance(error, LmkitError) and not isinstance(error, StoppedError):
                self.journal("error", {"code": error.exit_code, "message": str(error)})


class SharedRun(Run):
    """A run as the other processes of its job see it: the first one has made and locked it, and alone writes to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, *_: Any, **__: Any) -> None:
        return

    def take_data(self, former: Sequence[str]) -> None:
        return

    def journal(self, event: str, fields: Mapping[str, Any] | None = None) -> None:
        return

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        return

    def attach(self, listener: Listener) -> None:
        return

    def cut_metrics(self, step: int, *, validated: bool = True) -> None:
        return

    def write_result(self, result: Mapping[str, Any], *, status: str = FINISHED) -> None:
        return

    def close(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


def _make_new(root: Path, dataset: str, model: str) -> Path:
    """Make a directory under ``root`` whose name no other run has, even one started in the same second."""
    parts = [datetime.now().strftime("%Y%m%d-%H%M%S"), dataset, model]
    name = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", part).strip("_.") or "x" for part in parts[1:])
    name = f"{parts[0]}-{name}"[:100]
    with storage.resource_errors("make a run in", root):
        storage.make_directories(root)
        for number in range(1, 10_000):
            path = root / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
    raise ResourceError(f"cannot make a run in {root}: all names are taken", "choose another run.root")


def _make_given(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run.dir={path} is a file", "name a directory")
    with storage.resource_errors("make", path):
        storage.make_directories(path)


def _check_usable(path: Path, *, resume: bool) -> None:
    """ConfigError if the directory holds something that this command must not touch."""
    names = set(os.listdir(path)) - {LOCK, LOCK_INFO}
    present = {name for name in names if not name.startswith(storage.TMP_PREFIX)}
    if present and not resume:
        raise ConfigError(
            f"run.dir={path} exists and is not empty", "continue the run with resume=true, or choose another run.dir"
        )
    is_run = RUN_INFO in present or (path / CHECKPOINTS).is_dir()
    if present and not is_run:
        raise ConfigError(f"run.dir={path} is not a run directory", "choose another run.dir")
