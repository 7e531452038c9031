"""Configuration of what finetuning teaches: the ``task`` group."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class TaskConfig:
    """Base of the ``task`` group."""


@dataclass(kw_only=True)
class LmTaskConfig(TaskConfig):
    """More text: predict each token of ``dataset`` from those before it."""
