"""``-m``: one job for each combination of comma-separated values, in order, in this process."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmkit.errors import ConfigError, StoppedError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lmkit.arguments import Line
    from lmkit.store.sweeps import Job as StoredJob


def combinations(line: Line) -> list[Line]:
    """One line for every job; a value with commas stands for several, and the last one varies fastest.

    A value in brackets, ``stop=[a,b]``, is one list. Where jobs would share a ``run.dir`` or ``to`` each gets a folder
    in it, and where they would share an ``output`` each gets a number in its name.
    """
    choices = {**line.groups, **line.values}
    jobs = []
    for picked in itertools.product(*map(_split, choices.values())):
        chosen = dict(zip(choices, picked, strict=True))
        groups = {key: chosen[key] for key in line.groups}
        values = {key: chosen[key] for key in line.values}
        jobs.append(dataclasses.replace(line, groups=groups, values=values))
    for key in ("run.dir", "to", "output"):
        shared = len(jobs) > 1 and len({job.values.get(key) for job in jobs}) < len(jobs)
        for number, job in enumerate(jobs if shared else []):
            if job.values.get(key, "null") not in ("", "null"):
                job.values[key] = _own(key, job.values[key], number)
    return jobs


def _own(key: str, name: str, number: int) -> str:
    path = Path(name)
    return str(path / str(number) if key != "output" else path.with_stem(f"{path.stem}-{number}"))


def _split(value: str) -> list[str]:
    if value[:1] == "[" and value[-1:] == "]":
        return [value]
    return [part.strip() for part in value.split(",")]


def sweep(line: Line) -> int:
    """Run every job, also after one has failed; returns the worst exit code.

    All jobs are composed before the first one runs, so that a typo costs nothing. A job that is stopped on request ends
    the sweep. Jobs with folders in one ``run.dir`` are written down there; started again, those that have finished with
    the same configuration are skipped.
    """
    from lmkit.cli import run_command, to_yaml
    from lmkit.reporting import report, show
    from lmkit.store.sweeps import note_failure

    jobs = combinations(line)
    composed, configs = _compose_all(jobs)
    if line.show_config:
        for job, config in zip(jobs, composed, strict=True):
            show(f"---  # {' '.join(_words(job).split())}\n{to_yaml(config)}", end="")
        return 0
    noted = _note(line, jobs)
    worst, failed = 0, 0
    for number, (job, made) in enumerate(zip(jobs, configs, strict=True), start=1):
        if _is_finished(made):
            print(f"job {number} of {len(jobs)}: finished before, skipped: {_words(job)}", file=sys.stderr)
            continue
        print(f"job {number} of {len(jobs)}: {_words(job)}", file=sys.stderr)
        try:
            run_command(line, made)
        except (StoppedError, BrokenPipeError):
            raise
        except Exception as error:
            code = report(error, line.command, debug=getattr(made, "debug", False), where=f"job {number}: ")
            worst, failed = max(worst, code), failed + 1
            if noted:
                note_failure(Path(made.run.dir).parent, noted[number - 1], code, str(error), _warn)
    if failed:
        print(f"{failed} of {len(jobs)} jobs failed", file=sys.stderr)
    return worst


def _note(line: Line, jobs: Sequence[Line]) -> list[StoredJob]:
    """Write the jobs into the ``run.dir`` that they share; none if they share none. Raises ConfigError."""
    from lmkit.store.sweeps import Job as StoredJob
    from lmkit.store.sweeps import begin

    root, folders = line.values.get("run.dir", "null"), [job.values.get("run.dir", "") for job in jobs]
    if root in ("", "null") or len(jobs) < 2 or any(str(Path(f).parent) != str(Path(root)) for f in folders):
        return []
    choices = [{**job.groups, **job.values} for job in jobs]
    varied = [key for key in choices[0] if key != "run.dir" and len({values[key] for values in choices}) > 1]
    stored = [
        StoredJob(Path(folder).name, {key: values[key] for key in varied})
        for folder, values in zip(folders, choices, strict=True)
    ]
    begin(Path(os.path.expanduser(root)), ["lmkit", *sys.argv[1:]], stored)
    return stored


def _is_finished(made: Any) -> bool:
    """Whether the run that a job would make has come to its end before, with the same configuration."""
    from lmkit.config.commands import FinetuneConfig, PretrainConfig
    from lmkit.config.plain import to_plain
    from lmkit.store.sweeps import has_finished

    if not isinstance(made, PretrainConfig | FinetuneConfig) or made.run.dir is None:
        return False
    return has_finished(Path(made.run.dir), to_plain(made))


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _compose_all(jobs: Sequence[Line]) -> tuple[list[DictConfig], list[Any]]:
    """The configuration of every job and its dataclass; raises ConfigError with what is wrong with any of them."""
    from lmkit.cli import compose, to_dataclass

    composed, made = [], []
    problems: dict[str, None] = {}  # many jobs share a mistake: say it once
    for job in jobs:
        try:
            composed.append(compose(job))
            made.append(to_dataclass(composed[-1]))
        except ConfigError as error:
            problems |= dict.fromkeys(str(error).split("; "))
    if problems:
        raise ConfigError("; ".join(problems))
    return composed, made


def _words(job: Line) -> str:
    return " ".join(f"{key}={value}" for key, value in {**job.groups, **job.values}.items())
