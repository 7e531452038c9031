"""Learning-rate schedules: pure functions from (step, progress) to a factor of the peak rate.

``progress`` is the share of the run that is done, 0 to 1. It is step / max_steps where the length of the run is known
in steps, and follows the clock where it is given as a budget (see horizon.Horizon). The factor at a step is the one the
update of that step uses; step counts from 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lmkit.config.optimization import (
    ConstantConfig,
    CosineConfig,
    InverseSqrtConfig,
    LinearConfig,
    PlateauConfig,
    ScheduleConfig,
    StepDecayConfig,
    WsdConfig,
)


def lr_factor(
    config: ScheduleConfig, step: int, progress: float, valid_losses: Sequence[Sequence[float]] = ()
) -> float:
    """Factor (0 to 1) of the peak learning rate for the update number ``step`` (from 0).

    ``valid_losses``: validation losses so far, oldest first, apart by the data they are of; only the plateau schedule
    looks at them.
    """
    warm = _warmup(config, step, progress)
    if warm < 1.0:
        return warm
    if isinstance(config, ConstantConfig):
        return 1.0
    if isinstance(config, PlateauConfig):
        plateaus = sum(num_plateaus(losses, config.patience) for losses in valid_losses)
        return max(config.min_ratio, config.factor**plateaus)
    if isinstance(config, InverseSqrtConfig):
        if config.warmup_steps is not None:
            return math.sqrt((config.warmup_steps + 1) / (step + 1))
        start = max(config.warmup_ratio, 1e-3)
        return math.sqrt(start / max(progress, start))
    if isinstance(config, StepDecayConfig):
        return config.factor ** _num_falls(config, progress)
    if isinstance(config, WsdConfig):
        left = min(1.0, (1.0 - progress) / config.decay_ratio)
        return config.final_ratio + (1.0 - config.final_ratio) * max(0.0, left)
    start = config.warmup_ratio
    if config.warmup_steps is not None:
        start = progress * config.warmup_steps / max(step, 1)  # how far the run was when the warm-up ended
    done = min(1.0, max(0.0, (progress - start) / max(1.0 - start, 1e-9)))
    if isinstance(config, LinearConfig):
        return config.final_ratio + (1.0 - config.final_ratio) * (1.0 - done)
    if isinstance(config, CosineConfig):
        return config.final_ratio + (1.0 - config.final_ratio) * 0.5 * (1.0 + math.cos(math.pi * done))
    raise TypeError(f"no schedule for {type(config).__name__}")


def _warmup(config: ScheduleConfig, step: int, progress: float) -> float:
    """Linear warm-up; 1 when it is over. Never 0, so that the first update already learns."""
    if config.warmup_steps is not None:
        return (step + 1) / (config.warmup_steps + 1)
    if progress >= config.warmup_ratio:
        return 1.0
    return max(progress / config.warmup_ratio, 0.01)


def _num_falls(config: StepDecayConfig, progress: float) -> int:
    """How often the rate has fallen; the first fall is where the constant part ends."""
    share = (progress - config.hold_ratio) / (1.0 - config.hold_ratio)
    return 0 if share < 0.0 else min(config.num_falls, 1 + int(share * config.num_falls + 1e-9))


def num_plateaus(valid_losses: Sequence[float], patience: int) -> int:
    """How often the loss went ``patience`` + 1 evaluations in a row without a new minimum."""
    best, waited, plateaus = math.inf, 0, 0
    for loss in valid_losses:
        if loss < best:
            best, waited = loss, 0
            continue
        waited += 1
        if waited > patience:
            plateaus, waited = plateaus + 1, 0
    return plateaus
