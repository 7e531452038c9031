"""The steps since the last line of metrics, and what that line says of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lmkit.train import StepReport


@dataclass
class Window:
    """Reports of steps; each is looked at once, maybe some steps later (see ``Trainer.reads_late``)."""

    reports: list[StepReport] = field(default_factory=list)
    started: float = 0.0
    """The time.monotonic() at which its first step began; validations move it forward by what they take."""
    _num_read: int = 0

    def unread(self) -> Iterator[StepReport]:
        """The reports that were not looked at yet."""
        while self._num_read < len(self.reports):
            self._num_read += 1
            yield self.reports[self._num_read - 1]

    def drop_unread(self) -> None:
        """Forget the reports that were not looked at."""
        del self.reports[self._num_read :]

    def clear(self, now: float) -> None:
        """Forget all reports; the next step begins ``now``."""
        self.reports, self._num_read, self.started = [], 0, now

    def close(self, now: float) -> dict[str, Any]:
        """The means of its steps and the numbers of the last one, for metrics.jsonl; the next window begins ``now``."""
        reports, last = self.reports, self.reports[-1]
        num_targets = sum(r.num_targets for r in reports)
        nats = sum(r.loss * r.num_targets for r in reports if r.num_targets)
        row = {
            "step": last.step,
            "loss": nats / num_targets if num_targets else math.nan,  # of batches that were passed over there is none
            "lr": last.lr,
            "grad_norm": last.grad_norm,
            "tokens_per_s": num_targets / max(now - self.started, 1e-9),
            "progress": last.progress,
        }
        self.clear(now)
        return row
