"""Jobs of a multirun by Hydra's plugins: launchers run them in other processes or machines, Optuna chooses them.

Hydra sees a configuration of its own, with the number of a job and nothing else of lmkit's: a launcher is handed the
composed jobs, and a sweeper asks for jobs through ``_Trials``, which stands where it expects a launcher.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmkit.console import Console
from lmkit.errors import ConfigError, LmkitError, ResourceError, StoppedError
from lmkit.sweep import (
    SEARCH,
    Job,
    Outcome,
    Runner,
    compose_all,
    here,
    is_finished,
    one_value,
    run_job,
    summed_up,
    take,
)

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext
    from omegaconf import DictConfig

    from lmkit.arguments import Line
    from lmkit.store.sweeps import Job as StoredJob

LAUNCHER, SWEEPER, SAMPLER = "hydra/launcher", "hydra/sweeper", "hydra/sweeper/sampler"
LAUNCHERS = {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit", "ray": "ray"}
"""Launcher -> the extra that installs it."""
SWEEPERS = {"optuna": "optuna"}
PRIMARY = "lmkit_multirun"
OPEN = ("hydra.launcher.ray.init.", "hydra.launcher.ray.remote.", "hydra.launcher.additional_parameters.")
"""Parts of the plugins' configurations that take any key."""
SEEDED = ("tpe", "random", "cmaes", "nsgaii", "motpe")
AGAIN = "the same command with resume=true goes on; finished jobs are skipped"


def check(line: Line) -> None:
    """Raise ConfigError for a plugin that is unknown or a key that needs one, ResourceError for one not installed."""
    from lmkit.presets import nearest

    if line.problems:
        raise ConfigError("; ".join(line.problems))
    if key := next((key for key in line.plugins if "_target_" in key), None):
        raise ConfigError(f"{key} names code to be run, which no key of lmkit does", "leave it out")
    for group, known, kind in ((LAUNCHER, LAUNCHERS, "launcher"), (SWEEPER, SWEEPERS, "sweeper")):
        name = line.plugins.get(group)
        if name is None:
            if key := next((key for key in line.plugins if key.startswith((f"hydra.{kind}.", f"{group}/"))), None):
                raise ConfigError(f"{key[len('hydra/') :]} needs a {kind}", f"add {kind}={next(iter(known))}")
            continue
        if name not in known:
            raise ConfigError(f"{kind}={name} is unknown", nearest(name, list(known)))
        extra = known[name]
        module = f"hydra_plugins.hydra_{extra}_{kind}"
        if not (importlib.util.find_spec("hydra_plugins") and importlib.util.find_spec(module)):
            raise ResourceError(
                f"{kind}={name} needs the package hydra-{extra}-{kind}, which is not installed",
                f"pip install 'lmkit[{extra}]'",
            )
    if not line.gives("run.dir") or "," in line.values["run.dir"]:
        raise ConfigError("launcher= and sweeper= need a folder for the runs", "add run.dir=DIR")
    if "hydra.sweeper.storage" in line.plugins:
        raise ConfigError("sweeper.storage has no use: a search is started again from its run.dir", "leave it out")


@dataclass
class _Task:
    """What a worker calls with Hydra's configuration of a job."""

    jobs: dict[int, Job] = field(default_factory=dict)
    words: list[str] = field(default_factory=lambda: sys.argv[1:])
    """Those of the command line, which runs note down; a worker may be another program, started with other words."""
    stopped: bool = False
    """Whether a job was stopped on request; a launcher that stays in this process is not to begin the next one."""

    def __call__(self, config: Any) -> Outcome:
        job = self.jobs[config.number]
        if self.stopped:
            return Outcome(StoppedError.exit_code, "not begun, since the one before was stopped", stopped=True)
        sys.argv[1:] = self.words
        try:
            return run_job(job)
        except LmkitError as error:  # one that ends the multirun
            self.stopped = True
            return Outcome(error.exit_code, str(error), stopped=True)


def launched(line: Line) -> Runner:
    """Jobs by the launcher of the line; in this process if it names none. Raises ConfigError for its settings."""
    if LAUNCHER not in line.plugins:
        return here
    from hydra.core.plugins import Plugins

    task, name = _Task(), line.plugins[LAUNCHER]
    plugins = {key: value for key, value in line.plugins.items() if "sweeper" not in key}
    context, config = _configure(line, plugins, [])
    launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)

    def run(jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
        for job in jobs:
            Console().say(f"{job.name}: to {name}")
        task.jobs = {job.number: job for job in jobs}
        try:
            returns = launcher.launch([[f"number={job.number}"] for job in jobs], jobs[0].number)
            outcomes = [one.return_value for one in returns]
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise ResourceError(f"launcher={name} lost a job: {text}", AGAIN) from error
        for job, outcome in zip(jobs, outcomes, strict=True):
            if outcome.code:
                Console().say(f"{job.name}: exit {outcome.code}: {outcome.problem}")
        yield from zip(jobs, outcomes, strict=True)

    return run


def search(line: Line) -> int:
    """Let Optuna choose the values of ``interval(...)``, ``choice(...)``, lists; the lowest valid loss is the best.

    Its samplers draw from a seed, so that a search that is started again asks for the same jobs, and the finished ones
    answer from their runs.
    """
    from hydra.core.plugins import Plugins

    both = {**line.groups, **line.values}
    searched = {key: value for key, value in both.items() if _is_searched(value) and key != "run.dir"}
    if not searched:
        raise ConfigError("sweeper=optuna has nothing to choose", "add KEY=interval(A,B) or KEY=a,b")
    if line.gives("predict"):
        raise ConfigError("each run of a search would write its predictions over those before", "leave out predict")
    names = {key.replace(".", "__"): key for key in searched}  # a key and the group it is in can both be searched
    plugins = {"hydra.sweeper.max_failure_rate": "1.0"} | line.plugins
    if LAUNCHER not in line.plugins:
        plugins.setdefault("hydra.sweeper.n_jobs", "1")
    if line.plugins.get(SAMPLER, "tpe") in SEEDED:
        plugins.setdefault("hydra.sweeper.sampler.seed", "1")
    trials = _Trials(line, names, launched(line))
    context, config = _configure(line, {k: v for k, v in plugins.items() if "launcher" not in k}, list(names))
    sweeper: Any = Plugins.instance().instantiate_sweeper(hydra_context=context, task_function=_Task(), config=config)
    sweeper.sweeper.launcher = trials
    logging.getLogger("optuna").setLevel(logging.WARNING)
    try:
        sweeper.sweep([f"{name}={searched[key]}" for name, key in names.items()])
    except ValueError:
        if not trials.outcomes or not all(outcome.code for outcome in trials.outcomes):
            raise
        # Optuna has no best trial where all have failed
    code = summed_up(trials.outcomes)
    Console().say(f"next: lmkit runs sweep {shlex.quote(str(_root(line)))}")
    return code


def _is_searched(value: str) -> bool:
    return SEARCH.fullmatch(value) is not None or ("," in value and value[:1] != "[")


class _Trials:
    """Runs the jobs that a sweeper asks for, where it expects a launcher."""

    def __init__(self, line: Line, names: dict[str, str], runner: Runner) -> None:
        self.outcomes: list[Outcome] = []
        self._line, self._names, self._runner = line, names, runner
        self._noted: list[StoredJob] = []

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run jobs; what they return is their lowest valid loss."""
        from hydra.core.utils import JobReturn, JobStatus

        from lmkit.store.browse import read_summary

        jobs = self._jobs(job_overrides, initial_job_idx)
        failed = self._failed_before(jobs)
        rest = [job for job in jobs if job.number not in failed]
        _check_unfinished(rest)
        ended = {job.number: outcome for job, outcome in zip(rest, take(rest, self._runner, self._noted), strict=True)}
        returns = []
        for job in jobs:
            outcome = ended.get(job.number) or Outcome(1, failed[job.number])
            self.outcomes.append(outcome)
            loss = None if outcome.code else read_summary(Path(job.made.run.dir)).best_valid_loss
            answer: Any = RuntimeError(outcome.problem or "the run has no valid loss") if loss is None else loss
            status = JobStatus.FAILED if loss is None else JobStatus.COMPLETED
            returns.append(JobReturn(status=status, _return_value=answer))
        if any(outcome.stopped for outcome in ended.values()):
            raise StoppedError("the search was stopped", AGAIN)
        return returns

    def _jobs(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[Job]:
        """The jobs of these overrides, composed and written down."""
        from lmkit.config.commands import PretrainConfig
        from lmkit.presets import preset_name
        from lmkit.store.sweeps import Job as StoredJob
        from lmkit.store.sweeps import begin

        lines, root = [], _root(self._line)
        for number, overrides in enumerate(job_overrides, start=first):
            chosen = {self._names[name]: text for name, text in map(_plain, overrides)}
            groups = {key: preset_name(key, chosen.get(key, value)) for key, value in self._line.groups.items()}
            values = {key: chosen.get(key, value) for key, value in self._line.values.items()}
            values = {key: one_value(self._line.command, key, value) for key, value in values.items()}
            values["run.dir"] = str(root / str(number))
            lines.append(dataclasses.replace(self._line, groups=groups, values=values))
            self._noted.append(StoredJob(str(number), chosen))
        made = compose_all(lines)[1]
        if any(isinstance(one, PretrainConfig) and one.plan for one in made):
            raise ConfigError("plan=true trains nothing that a search could choose by", "leave it out")
        begin(root, ["lmkit", *sys.argv[1:]], self._noted, grows=True)
        return [
            Job(number, f"job {number + 1}", one, config)
            for number, (one, config) in enumerate(zip(lines, made, strict=True), start=first)
        ]

    def _failed_before(self, jobs: Sequence[Job]) -> dict[int, str]:
        """Number -> problem of jobs that failed before others were chosen: those would be chosen differently now.

        One that was the last job then, and has ended well since, is what the others were chosen by.
        """
        from lmkit.store.sweeps import read, read_failures

        root = _root(self._line)
        sweep, failures = read(root), read_failures(root)
        if sweep is None or len(sweep.jobs) <= jobs[-1].number + 1:
            return {}
        tried = [job for job in jobs if str(job.number) in failures and not is_finished(job.made)]
        failed = {job.number: failures[str(job.number)] for job in tried}
        for job in jobs:
            if job.number in failed:
                Console().say(f"{job.name}: failed before, not tried again")
        return failed


def _check_unfinished(jobs: Sequence[Job]) -> None:
    """Raise ConfigError for a job that has begun before and may not go on, since it would count as failed for good."""
    from lmkit.store.browse import is_run

    for job in jobs:
        if not job.made.resume and is_run(Path(job.made.run.dir)) and not is_finished(job.made):
            raise ConfigError(f"{job.name} of the search has begun and not finished", AGAIN)


def _plain(override: str) -> tuple[str, str]:
    """Name and text of a value as Hydra writes it, without its quotes."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(override)
    value: Any = parsed.value()
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return parsed.key_or_group, text


def _root(line: Line) -> Path:
    return Path(os.path.abspath(os.path.expanduser(line.values["run.dir"])))


def _configure(line: Line, plugins: dict[str, str], names: Sequence[str]) -> tuple[HydraContext, DictConfig]:
    """Hydra's configuration of a multirun, whose own part is the number of a job and ``names``. Raises ConfigError."""
    from hydra import initialize
    from hydra._internal.callbacks import Callbacks
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import HydraContext, RunMode

    ConfigStore.instance().store(name=PRIMARY, node={"number": 0, **dict.fromkeys(names)})
    folder = str(_root(line)).replace("\\", "\\\\").replace("'", "\\'")
    words = [f"hydra.sweep.dir='{folder}'", "hydra.sweep.subdir=.", "hydra.output_subdir=null"]
    words += ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    words += [f"{'++' if key.startswith(OPEN) else ''}{key}={value}" for key, value in plugins.items()]
    GlobalHydra.instance().clear()
    with initialize(version_base="1.3", config_path=None, job_name="lmkit"):
        hydra = GlobalHydra.instance().hydra
        if hydra is None:
            raise TypeError("Hydra was not initialised")
        loader = hydra.config_loader
        try:
            config = loader.load_configuration(PRIMARY, words, run_mode=RunMode.MULTIRUN)
        except HydraException as error:
            text = str(error).splitlines()[0].replace("hydra.launcher", "launcher").replace("hydra.sweeper", "sweeper")
            raise ConfigError(text, "the keys are those of Hydra's plugin") from None
    return HydraContext(config_loader=loader, callbacks=Callbacks(config)), config
