"""``-m``: one job for each combination of comma-separated values, in order, in this process or by a launcher."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmkit.console import Console
from lmkit.errors import ConfigError, LmkitError, StoppedError
from lmkit.reporting import is_first, report, show

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lmkit.arguments import Line
    from lmkit.store.sweeps import Job as StoredJob

SEARCH = re.compile(r"(tag|choice|range|interval|int|float|shuffle|sort)\(.*\)")
"""A value that leaves the choice to a sweeper."""
FOLDERS, FILES = ("run.dir", "to"), ("output", "report", "word_probs")
"""Keys that name what a job writes."""


@dataclass(frozen=True)
class Job:
    """One job of a multirun."""

    number: int
    """From 0."""
    name: str
    """For people, as in ``job 1 of 4``."""
    line: Line
    made: Any
    """Its configuration, as the command takes it."""


@dataclass(frozen=True)
class Outcome:
    """How a job has ended."""

    code: int = 0
    """Exit code."""
    problem: str = ""
    stopped: bool = False
    """Stopped on request: it neither failed nor came to its end."""


Runner = Callable[[Sequence[Job]], Iterator[tuple[Job, Outcome]]]
"""Runs jobs, in this process or elsewhere, and tells how each of them has ended."""


def combinations(line: Line) -> list[Line]:
    """One line for every job; a value with commas stands for several, and the last one varies fastest.

    A value in brackets is one: ``stop=[a,b]`` a list, and ``weights=[0.9,0.1]`` the text between them. Where jobs would
    share a ``run.dir`` or ``to`` each gets a folder in it, and where they would share a file that they write each gets
    a number in its name. Raises ConfigError for predictions that would replace one another.
    """
    from lmkit.presets import preset_name

    choices = {**line.groups, **line.values}
    jobs = []
    for picked in itertools.product(*map(_split, choices.values())):
        chosen = {key: one_value(line.command, key, text) for key, text in zip(choices, picked, strict=True)}
        groups = {key: preset_name(key, chosen[key]) for key in line.groups}
        values = {key: chosen[key] for key in line.values}
        jobs.append(dataclasses.replace(line, groups=groups, values=values))
    for key in (*FOLDERS, *FILES):
        alike = len({job.values.get(key) for job in jobs}) < len(jobs)
        shared = alike or (len(jobs) == 1 and "hydra/launcher" in line.plugins)
        for number, job in enumerate(jobs if shared else []):
            if job.gives(key):
                job.values[key] = _own(key, job.values[key], number)
    read = [job.values["predict"] for job in jobs if job.gives("predict") and not job.gives("output")]
    if len(set(read)) < len(read):
        raise ConfigError("the jobs would write their predictions into one file", "add output=FILE: each gets a number")
    return jobs


def _own(key: str, name: str, number: int) -> str:
    path = Path(name)
    if key in FOLDERS:
        return str(path / str(number))
    return str(path.with_stem(f"{path.stem}-{number}")) if path.name else name  # which the command refuses


def one_value(command: str, key: str, text: str) -> str:
    """A value of a multirun as it is without: what brackets keep together, unless the key takes a list."""
    from lmkit.keys import every_key

    keeps = text[:1] == "[" and text[-1:] == "]" and "," in text
    return text[1:-1] if keeps and typing.get_origin(every_key(command).get(key)) is not list else text


def _split(value: str) -> list[str]:
    if value[:1] == "[" and value[-1:] == "]":
        return [value]
    if SEARCH.fullmatch(value):
        raise ConfigError(f"{value} leaves the choice to a sweeper", "add sweeper=optuna, or list the values: a,b,c")
    return [part.strip() for part in value.split(",")]


def sweep(line: Line) -> int:
    """Run every job, also after one has failed; returns the worst exit code.

    All jobs are composed before the first one runs, so that a typo costs nothing. A job that is stopped on request ends
    the sweep. Jobs with folders in one ``run.dir`` are written down there; started again, those that have finished with
    the same configuration are skipped.
    """
    from lmkit.composing import to_yaml

    runner: Runner = here
    if line.plugins:
        from lmkit import launch

        launch.check(line)
        if launch.SWEEPER in line.plugins and not line.show_config:
            return launch.search(line)
        runner = launch.launched(line)
    lines = combinations(line)
    composed, configs = compose_all(lines)
    if line.show_config:
        for one, config in zip(lines, composed, strict=True):
            show(f"---  # {' '.join(_words(one).split())}\n{to_yaml(config)}", end="")
        return 0
    noted = _note(line, lines) if is_first() and any(_run_dir(made) is not None for made in configs) else []
    jobs = [
        Job(number, f"job {number + 1} of {len(lines)}", one, made)
        for number, (one, made) in enumerate(zip(lines, configs, strict=True))
    ]
    outcomes = take(jobs, runner, noted)
    return summed_up(outcomes)


def summed_up(outcomes: Sequence[Outcome]) -> int:
    """Say how many jobs have failed, and return the worst exit code.

    Of several processes only the first does; torchrun would end it as soon as another one fails.
    """
    if not is_first():
        return 0
    failed = sum(outcome.code != 0 and not outcome.stopped for outcome in outcomes)
    if failed:
        Console().say(f"{failed} of {len(outcomes)} jobs failed")
    if stopped := sum(outcome.stopped for outcome in outcomes):
        Console().say(f"{stopped} of {len(outcomes)} jobs stopped: resume=true goes on with them")
    return max((outcome.code for outcome in outcomes), default=0)


def take(jobs: Sequence[Job], runner: Runner, noted: Sequence[StoredJob]) -> list[Outcome]:
    """Run the jobs that have not finished before, and note which fail; ``noted``: the jobs as they are written down."""
    from lmkit.store.sweeps import note_failure

    outcomes = {job.number: Outcome() for job in jobs if is_finished(job.made)}
    for job in jobs:
        if job.number in outcomes:
            _say(f"{job.name}: finished before, skipped: {_words(job.line)}")
    stored = {one.folder: one for one in noted}
    rest = [job for job in jobs if job.number not in outcomes]
    for job, outcome in runner(rest) if rest else ():
        outcomes[job.number] = outcome
        if outcome.code and not outcome.stopped and noted:
            folder = Path(job.made.run.dir)
            note_failure(folder.parent, stored[folder.name], outcome.code, outcome.problem, Console().warn)
    return [outcomes[job.number] for job in jobs]


def here(jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
    """Run jobs in this process, one after the other."""
    for job in jobs:
        _say(f"{job.name}: {_words(job.line)}")
        yield job, run_job(job)


def _say(text: str) -> None:
    Console(silent=not is_first()).say(text)


def run_job(job: Job) -> Outcome:
    """Run one job; its error is shown, and is no error of the sweep. Raises StoppedError where it was stopped, and its
    error where it could not be stopped in order."""
    from lmkit.cli import run_command
    from lmkit.config.plain import to_plain
    from lmkit.store.sweeps import note_asked

    try:
        run_command(job.line, job.made)
    except (StoppedError, BrokenPipeError):
        raise
    except Exception as error:
        if isinstance(error, LmkitError) and error.stopping:
            raise
        debug = getattr(job.made, "debug", False)
        code = report(error, job.line.command, debug=debug, where=f"job {job.number + 1}: ")
        return Outcome(code, str(error))
    except SystemExit as left:  # the first of several processes says why
        if left.code == StoppedError.exit_code:
            raise
        return Outcome(left.code if isinstance(left.code, int) else 1)
    if is_first() and (folder := _run_dir(job.made)) is not None:
        note_asked(folder, to_plain(job.made))
    return Outcome()


def _note(line: Line, jobs: Sequence[Line]) -> list[StoredJob]:
    """Write the jobs into the ``run.dir`` that they share; none if they share none. Raises ConfigError."""
    from lmkit.store.sweeps import Job as StoredJob
    from lmkit.store.sweeps import begin

    if not line.gives("run.dir"):
        return []
    root, folders = Path(line.values["run.dir"]), [Path(job.values["run.dir"]) for job in jobs]
    if any(folder.parent != root for folder in folders):
        return []
    choices = [{**job.groups, **job.values} for job in jobs]
    varied = [key for key in choices[0] if key != "run.dir" and len({values[key] for values in choices}) > 1]
    stored = [
        StoredJob(folder.name, {key: values[key] for key in varied})
        for folder, values in zip(folders, choices, strict=True)
    ]
    begin(Path(os.path.expanduser(root)), ["lmkit", *sys.argv[1:]], stored)
    return stored


def is_finished(made: Any) -> bool:
    """Whether the run that a job would make has come to its end before, with the same configuration."""
    from lmkit.config.plain import to_plain
    from lmkit.store.sweeps import has_finished

    folder = _run_dir(made)
    return folder is not None and has_finished(folder, to_plain(made))


def _run_dir(made: Any) -> Path | None:
    """Where the run of a job is made, if it makes one in a given place; a plan makes none."""
    from lmkit.config.commands import FinetuneConfig, PretrainConfig

    is_training = isinstance(made, FinetuneConfig) or (isinstance(made, PretrainConfig) and not made.plan)
    return Path(made.run.dir) if is_training and made.run.dir is not None else None


def compose_all(jobs: Sequence[Line]) -> tuple[list[DictConfig], list[Any]]:
    """The configuration of every job and its dataclass; raises ConfigError with what is wrong with any of them."""
    from lmkit.composing import compose, to_dataclass

    composed, made = [], []
    problems: dict[str, None] = {}  # many jobs share a mistake: say it once
    for job in jobs:
        try:
            composed.append(compose(job))
            made.append(to_dataclass(composed[-1]))
            _check_base(made[-1])
        except ConfigError as error:
            problems |= dict.fromkeys(str(error).split("; "))
    if problems:
        raise ConfigError("; ".join(problems))
    return composed, made


def _check_base(made: Any) -> None:
    """Raise ConfigError for a finetuning that would start from the newest finished run: the job before may be that."""
    from lmkit.config.commands import FinetuneConfig
    from lmkit.config.tasks import LmTaskConfig, RegressTaskConfig

    if not isinstance(made, FinetuneConfig) or made.run.path is not None or made.init.weights is not None:
        return
    only_predicts = made.predict is not None and isinstance(made.task, LmTaskConfig)
    only_numbers = isinstance(made.task, RegressTaskConfig) and made.task.text is None
    if not only_predicts and not only_numbers:
        raise ConfigError("jobs of a multirun start from one run, and the newest changes as they finish", "add run=DIR")


def _words(job: Line) -> str:
    return " ".join(f"{key}={value}" for key, value in {**job.groups, **job.values}.items())
