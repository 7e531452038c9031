"""Configuration of the device and its precision."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lmkit.config.check import Problems


class DeviceType(Enum):
    """Where tensors live."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Precision(Enum):
    """Number format of the matrix products; parameters and optimizer state stay in fp32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Switch(Enum):
    """on, off, or let lmkit decide and say what it decided."""

    auto = "auto"
    on = "on"
    off = "off"


MOST_THREADS = 1024
"""OpenMP ends the process, without a word of ours, where the system does not let it start as many as it was told."""


@dataclass(kw_only=True)
class DeviceConfig:
    """Where and how to compute. ``auto`` picks what is fast there and the run says what was picked."""

    type: DeviceType = DeviceType.auto
    """Device: auto (cuda, then mps, then cpu), cpu, cuda or mps."""
    index: int | None = None
    """Number of the CUDA device (>= 0); null: the current one."""
    precision: Precision = Precision.auto
    """auto: bf16 on CUDA cards that have it in hardware, fp32 elsewhere (bf16 trains faster on CPUs with AMX)."""
    compile: Switch = Switch.auto
    """torch.compile; auto: on for CUDA, but not for models with recurrent layers, off elsewhere."""
    fused: Switch = Switch.auto
    """Fused optimizer kernels; auto: wherever torch has them."""
    deterministic: bool = False
    """Only operations that give the same bytes each time (torch.use_deterministic_algorithms), for an exact resume on
    CUDA; one that has no such version ends the command. On CPUs the bytes are the same without it."""
    threads: int | None = None
    """CPU threads (1 to 1024); null: one per physical core that this process may use."""

    def __post_init__(self) -> None:
        with Problems() as check:
            good = self.threads is None or 1 <= self.threads <= MOST_THREADS
            check(good, "device.threads", self.threads, f"must be between 1 and {MOST_THREADS}, or null")
            check.at_least(0, "device", self, "index", or_null=True)
