"""Configuration of where metrics go besides metrics.jsonl, which every run writes."""

from __future__ import annotations

from dataclasses import dataclass

from lmkit.config.check import Problems


@dataclass(kw_only=True)
class LoggerConfig:
    """Nothing besides metrics.jsonl; the base of the others."""


@dataclass(kw_only=True)
class TensorboardLoggerConfig(LoggerConfig):
    """TensorBoard event files in the run's folder ``tensorboard``."""


@dataclass(kw_only=True)
class WandbLoggerConfig(LoggerConfig):
    """Weights & Biases."""

    project: str = "lmkit"
    """Project that the run belongs to."""
    entity: str | None = None
    """User or team that owns the project; null: your default one."""
    offline: bool = False
    """Write to the run's folder ``wandb`` only; ``wandb sync`` sends it later."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check(bool(self.project), "logger.project", self.project, "must not be empty")


@dataclass(kw_only=True)
class MlflowLoggerConfig(LoggerConfig):
    """MLflow tracking."""

    uri: str | None = None
    """Tracking server or store, as in sqlite:///mlflow.db; null: MLFLOW_TRACKING_URI, or else mlflow's own default."""
    experiment: str = "lmkit"
    """Experiment that the run belongs to; made if it is not there."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check(bool(self.experiment), "logger.experiment", self.experiment, "must not be empty")


@dataclass(kw_only=True)
class TrackioLoggerConfig(LoggerConfig):
    """Trackio: a local database (TRACKIO_DIR moves it), or a Hugging Face Space."""

    project: str = "lmkit"
    """Project that the run belongs to."""
    space: str | None = None
    """Space to log to, as owner/name; null: the local database."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check(bool(self.project), "logger.project", self.project, "must not be empty")
