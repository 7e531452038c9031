"""Configuration of training in more than one process. torchrun starts the processes; see docs/running.md."""

from __future__ import annotations

from dataclasses import dataclass

from lmkit.config.check import Problems


@dataclass(kw_only=True)
class ParallelConfig:
    """One process; the base of the others."""


@dataclass(kw_only=True)
class DdpConfig(ParallelConfig):
    """Each process has the whole model and takes its share of the micro-batches; gradients are summed."""

    timeout_s: float = 3600.0
    """Seconds that a process waits for the others (> 0): more than preparing the data or a validation takes."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check(0 < self.timeout_s <= 1e9, "parallel.timeout_s", self.timeout_s, "must be > 0 and at most 1e9")


@dataclass(kw_only=True)
class FsdpConfig(DdpConfig):
    """As ddp, but each process holds a piece of the parameters, gradients and optimizer state: for large models."""
