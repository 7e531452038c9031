"""What runs learn: each task has its batches, its loss and its validation, and all of them share one loop."""

from __future__ import annotations

from lmkit.tasks.base import Task, Validation

__all__ = ["Task", "Validation"]
