"""What a multirun writes beside its runs, so that it can be looked at and started again.

``<run.dir>/sweep.json`` holds the command and the jobs; ``sweep.jsonl`` one line for each job that failed. In the run
of a job that has come to its end, ``asked.json`` says what it was asked for: the configuration that is stored in a
checkpoint can be another one, since data and imported models fill it in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmkit.errors import CheckpointError, ConfigError
from lmkit.store import storage
from lmkit.store.browse import Status, read_newest_config, status_of
from lmkit.store.records import LineFile, encode, read_object, read_rows, to_json

SWEEP = "sweep.json"
FAILURES = "sweep.jsonl"
ASKED = "asked.json"
NOT_COMPUTED = ("run", "resume", "debug", "command", "vocab_size", "logger", "log", "plan", "parallel")
"""Parts of a stored configuration in which a finished job may differ from the one that is asked for."""


@dataclass(frozen=True)
class Job:
    """One job of a multirun."""

    folder: str
    """Name of its run directory in that of the sweep."""
    words: dict[str, str]
    """Key or group -> value, only of those that differ between the jobs."""


@dataclass(frozen=True)
class Sweep:
    """A multirun as it was started."""

    command: list[str]
    jobs: list[Job]


def begin(root: Path, command: Sequence[str], jobs: Sequence[Job], *, grows: bool = False) -> None:
    """Write sweep.json. Raises ConfigError if the folder holds another sweep, or ResourceError.

    The same jobs may be started again with any command. ``grows``: a search that decides on its jobs one after the
    other; those that are there already must be the same again.
    """
    old = read(root)
    if old is not None and grows:
        for before, now in zip(old.jobs, jobs, strict=False):
            if before != now:
                was, would_be = (" ".join(f"{k}={v}" for k, v in job.words.items()) for job in (before, now))
                raise ConfigError(
                    f"run.dir={root} holds another search: its job {now.folder} is {was}, and would be {would_be}",
                    "choose another run.dir",
                )
        jobs = max(old.jobs, list(jobs), key=len)
    elif old is not None and old.jobs != list(jobs):
        raise ConfigError(f"run.dir={root} holds a sweep of other jobs", "choose another run.dir")
    data = {"command": list(command), "jobs": [{"folder": job.folder, "words": job.words} for job in jobs]}
    with storage.resource_errors("write", root / SWEEP):
        root.mkdir(parents=True, exist_ok=True)
        storage.replace_file(root / SWEEP, to_json(data))


def read(root: Path) -> Sweep | None:
    """The sweep in a folder, None if there is none. Raises CheckpointError if its file is damaged."""
    data = read_object(root / SWEEP)
    if data is None:
        return None
    try:
        jobs = [Job(str(job["folder"]), {str(k): str(v) for k, v in job["words"].items()}) for job in data["jobs"]]
        return Sweep([str(word) for word in data["command"]], jobs)
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{root / SWEEP} is damaged", "remove it; the runs beside it stay") from None


def note_failure(root: Path, job: Job, exit_code: int, problem: str, warn: Callable[[str], None]) -> None:
    """Append why a job has failed; never raises for a full disk."""
    log = LineFile(root / FAILURES, warn)
    log.append({"folder": job.folder, "exit_code": exit_code, "problem": problem})
    log.close()


def read_failures(root: Path) -> dict[str, str]:
    """Folder of a job -> why it failed last, as text."""
    rows = read_rows(root / FAILURES)
    return {str(row.get("folder")): f"exit {row.get('exit_code')}: {row.get('problem')}" for row in rows}


def has_finished(run_dir: Path, config: Mapping[str, Any]) -> bool:
    """Whether the run has come to its end with this configuration (plain data, as it was asked for)."""
    if not run_dir.is_dir() or status_of(run_dir) is not Status.finished:
        return False
    _, stored = read_newest_config(run_dir)
    if not stored:
        return False
    with contextlib.suppress(CheckpointError):
        if read_object(run_dir / ASKED) == {"asked": _digest(_asked(config)), "stored": _digest(stored)}:
            return True
    return _computed(stored) == _computed(config)


def note_asked(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Write down which configuration has led to the one that a finished run has stored."""
    _, stored = read_newest_config(run_dir)
    if not stored or status_of(run_dir) is not Status.finished:
        return
    data = {"asked": _digest(_asked(config)), "stored": _digest(stored)}
    with contextlib.suppress(OSError):  # a full disk must not fail a job that is done; it only is not skipped
        storage.replace_file(run_dir / ASKED, to_json(data))


def _asked(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the result, the checkpoint that it starts from included."""
    run = config["run"]
    named = {} if run.get("checkpoint", "best") == "best" else {"checkpoint": run["checkpoint"]}
    return {**_computed(config), "base": run.get("path"), **named}


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(encode(config), sort_keys=True).encode()).hexdigest()


def _computed(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in NOT_COMPUTED}
