"""Metrics for TensorBoard, Weights & Biases, MLflow and Trackio, besides the run's own metrics.jsonl.

A logger is told of each row that goes into metrics.jsonl. It never stops a run: where one fails there is one warning,
and it is off until the run is continued. A run that goes on continues the same external run, whose id and last steps
are kept in ``logger.json``; rows that it does not have yet, such as those before it was switched on, are sent first,
and no number of a step is sent twice. After a rollback the numbers of the first pass over a step stay.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lmkit.config.loggers import (
    LoggerConfig,
    MlflowLoggerConfig,
    TensorboardLoggerConfig,
    TrackioLoggerConfig,
    WandbLoggerConfig,
)
from lmkit.config.plain import kind_of
from lmkit.config.text import flatten
from lmkit.errors import CheckpointError, DivergedError, ResourceError, StoppedError
from lmkit.store.found import read_metrics
from lmkit.store.records import encode, read_object
from lmkit.store.runs import Run
from lmkit.store.storage import TMP_PREFIX

STATE = "logger.json"
"""File in the run: kind of logger -> id of its external run, and name of each number -> the last step it has."""


class Logger(ABC):
    """One external run. Any exception of its methods switches it off."""

    @abstractmethod
    def start(self, name: str, config: Mapping[str, Any], run_id: str | None) -> str:
        """Begin a run with a name and a flat configuration, or continue the one of ``run_id``; returns its id."""

    @abstractmethod
    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write numbers of a step; steps never go back, but one may come several times with other numbers."""

    @abstractmethod
    def finish(self, status: str) -> None:
        """End it: finished, stopped, diverged or crashed."""


class TensorboardLogger(Logger):
    """Event files in ``<run>/tensorboard``; the configuration is a text."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "tensorboard"
        self._writer: Any = None

    def start(self, name: str, config: Mapping[str, Any], run_id: str | None) -> str:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder))
        if run_id is None:
            lines = "\n".join(f"    {key}={value}" for key, value in config.items())
            self._writer.add_text("config", lines)
        return "tensorboard"

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, status: str) -> None:
        self._writer.close()


class WandbLogger(Logger):
    """A run of Weights & Biases, written to ``<run>/wandb`` and, unless offline, sent."""

    def __init__(self, config: WandbLoggerConfig, run_dir: Path) -> None:
        self._config, self._folder = config, run_dir
        self._run: Any = None

    def start(self, name: str, config: Mapping[str, Any], run_id: str | None) -> str:
        import wandb

        self._run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            dir=str(self._folder),
            id=run_id,
            name=name,
            config=dict(config),
            resume="allow",
            mode="offline" if self._config.offline else None,
            settings=wandb.Settings(console="off", silent=True),
        )
        return str(self._run.id)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def finish(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=0 if status in ("finished", "stopped") else 1)


class MlflowLogger(Logger):
    """A run of an MLflow experiment."""

    STATUS: Mapping[str, str] = {"finished": "FINISHED", "stopped": "KILLED"}
    MOST_CHARACTERS = 500
    """Of a parameter's value, in all versions of the server."""

    def __init__(self, config: MlflowLoggerConfig) -> None:
        self._config = config
        self._client: Any = None
        self._run_id = ""

    def start(self, name: str, config: Mapping[str, Any], run_id: str | None) -> str:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(self._config.uri)
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            self._run_id = run_id
            return run_id
        experiment = self._client.get_experiment_by_name(self._config.experiment)
        if experiment is None:
            experiment_id = self._client.create_experiment(self._config.experiment)
        else:
            experiment_id = experiment.experiment_id
        self._run_id = str(self._client.create_run(experiment_id, run_name=name).info.run_id)
        params = [Param(key, str(value)[: self.MOST_CHARACTERS]) for key, value in config.items()]
        for first in range(0, len(params), 100):  # the most that one request may hold
            self._client.log_batch(self._run_id, params=params[first : first + 100])
        return self._run_id

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, step) for name, value in numbers.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def finish(self, status: str) -> None:
        self._client.set_terminated(self._run_id, self.STATUS.get(status, "FAILED"))


class TrackioLogger(Logger):
    """A run of a Trackio project; its name is its id."""

    def __init__(self, config: TrackioLoggerConfig) -> None:
        self._config = config
        self._run: Any = None

    def start(self, name: str, config: Mapping[str, Any], run_id: str | None) -> str:
        import trackio

        self._run = trackio.init(
            project=self._config.project,
            name=name if run_id is None else run_id,
            space_id=self._config.space,
            config=dict(config),
            resume="never" if run_id is None else "allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return str(self._run.name)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def finish(self, status: str) -> None:
        import trackio

        trackio.finish()  # its run's own ``finish`` would be called once more at the exit


PACKAGES = {
    TensorboardLoggerConfig: "tensorboard",
    WandbLoggerConfig: "wandb",
    MlflowLoggerConfig: "mlflow",
    TrackioLoggerConfig: "trackio",
}
"""Configuration -> the package it needs, which is also the name of the extra that installs it."""


def require_logger(config: LoggerConfig) -> None:
    """Raise ResourceError if the package of a logger is missing; call it before any work."""
    package = PACKAGES.get(type(config))
    if package is not None and importlib.util.find_spec(package) is None:
        raise ResourceError(
            f"logger={kind_of(config)} needs the package {package}, which is not installed",
            f"pip install 'lmkit[{package}]'",
        )


def build_logger(config: LoggerConfig, run_dir: Path) -> Logger | None:
    """The logger of a configuration; None for ``logger=none``."""
    if isinstance(config, TensorboardLoggerConfig):
        return TensorboardLogger(run_dir)
    if isinstance(config, WandbLoggerConfig):
        return WandbLogger(config, run_dir)
    if isinstance(config, MlflowLoggerConfig):
        return MlflowLogger(config)
    return TrackioLogger(config) if isinstance(config, TrackioLoggerConfig) else None


def attach_logger(
    config: LoggerConfig, run: Run, stored_config: Mapping[str, Any], warn: Callable[[str], None]
) -> None:
    """From now on send the run's metrics to the configured logger, too; call it after ``run.cut_metrics``.

    Raises ResourceError if its package is missing, or if a new external run cannot be begun; one that cannot be
    continued is only a warning.
    """
    require_logger(config)
    logger = build_logger(config, run.path)
    if logger is None:
        return
    attached = AttachedLogger(logger, kind_of(config), run.path, warn)
    attached.start(f"{run.path.name}-{run.run_id[:6]}", {key: encode(value) for key, value in flatten(stored_config)})
    run.attach(attached)


class AttachedLogger:
    """A logger that a run talks to: it remembers what was sent, and is off after the first failure."""

    def __init__(self, logger: Logger, kind: str, run_dir: Path, warn: Callable[[str], None]) -> None:
        self._logger, self._kind, self._path, self._warn = logger, kind, run_dir / STATE, warn
        self._states = _read_states(self._path)
        self._is_on = True

    @property
    def _last(self) -> dict[str, int]:
        """Name of a number -> the last step that was sent."""
        last: dict[str, int] = self._states[self._kind]["last"]
        return last

    def start(self, name: str, config: Mapping[str, Any]) -> None:
        """Begin or continue the external run and send what it lacks of metrics.jsonl. Raises ResourceError."""
        old = self._states.get(self._kind)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # standard output is for results, whatever a library says
                run_id = self._logger.start(name, config, None if old is None else old["id"])
        except Exception as error:
            if old is None:
                raise ResourceError(
                    f"logger={self._kind} cannot begin a run: {_brief(error)}", "see to it, or leave the logger out"
                ) from error
            self._turn_off(error)
            return
        self._states[self._kind] = {"id": run_id, "last": {} if old is None else old["last"]}
        for row in read_metrics(self._path.parent):
            self.row(row)

    def row(self, row: Mapping[str, Any]) -> None:
        """Send the numbers of a row of metrics that were not sent yet."""
        if not self._is_on:
            return
        step, last = int(row["step"]), self._last
        numbers = {name: value for name, value in _numbers(row) if last.get(name, -1) < step}
        if not numbers or step < max(last.values(), default=-1):
            return
        try:
            self._logger.log(step, numbers)
            last.update(dict.fromkeys(numbers, step))
            self._remember()
        except Exception as error:
            self._turn_off(error)

    def end(self, error: BaseException | None) -> None:
        """End the external run, as ``error`` ends this one."""
        if not self._is_on:
            return
        status = "crashed"
        for kind, name in (
            (type(None), "finished"),
            (StoppedError, "stopped"),
            (KeyboardInterrupt, "stopped"),
            (DivergedError, "diverged"),
        ):
            status = name if isinstance(error, kind) else status
        try:
            with contextlib.redirect_stdout(sys.stderr):
                self._logger.finish(status)
        except Exception as failure:
            self._turn_off(failure)
        self._is_on = False

    def _turn_off(self, error: Exception) -> None:
        self._is_on = False
        self._warn(f"logger={self._kind} is off from here on: {_brief(error)}; metrics.jsonl has everything")

    def _remember(self) -> None:
        """Replace the file at once, but without waiting for the disk: it is written as often as there is a row."""
        unfinished = self._path.with_name(f"{TMP_PREFIX}{STATE}")
        unfinished.write_text(json.dumps(self._states), encoding="utf-8", newline="\n")
        os.replace(unfinished, self._path)


def _read_states(path: Path) -> dict[str, Any]:
    """Kind -> id and last steps; what is damaged or of another shape counts as not there."""
    try:
        states = read_object(path) or {}
    except CheckpointError:
        return {}
    return {
        kind: {"id": str(state["id"]), "last": state["last"]}
        for kind, state in states.items()
        if isinstance(state, dict) and isinstance(state.get("last"), dict) and "id" in state
        if all(type(step) is int for step in state["last"].values())
    }


def _numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """``train/loss``, ``valid/ppl`` ...: the finite numbers of a row by what they are of."""
    for key, value in row.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key != "step" and is_number and math.isfinite(value):
            yield f"valid/{key.removeprefix('valid_')}" if key.startswith("valid_") else f"train/{key}", float(value)


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
