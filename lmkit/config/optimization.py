"""Configuration of optimizers and schedules."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lmkit.config.check import Problems


class Decay(Enum):
    """Which parameters weight decay applies to."""

    matrices = "matrices"
    all = "all"


@dataclass(kw_only=True)
class OptimizerConfig:
    """Base of the ``optimizer`` group."""

    lr: float = 1e-3
    """Peak learning rate (> 0); the schedule multiplies it by a factor from 0 to 1."""
    weight_decay: float = 0.0
    """Weight decay (>= 0): decoupled for adamw, nadam, muon and schedule_free, an L2 term for the others."""
    decay_on: Decay = Decay.matrices
    """What decays: matrices (embeddings among them), or all, that is gains and biases too."""
    clip_norm: float | None = 1.0
    """Clip the global gradient norm to this (> 0); null: no clipping."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.positive("optimizer", self, "lr")
            check.not_negative("optimizer", self, "weight_decay")
            check(
                self.clip_norm is None or self.clip_norm > 0,
                "optimizer.clip_norm",
                self.clip_norm,
                "must be > 0 or null",
            )
            self._check(check)

    def _check(self, check: Problems) -> None:
        """Checks of the subclass, reported together with those of the base."""


@dataclass(kw_only=True)
class SgdConfig(OptimizerConfig):
    """Stochastic gradient descent, with momentum and Nesterov's variant."""

    lr: float = 1.0
    """Peak learning rate (> 0)."""
    momentum: float = 0.0
    """Momentum (0 <= m < 1)."""
    nesterov: bool = False
    """Nesterov momentum; needs momentum > 0."""

    def _check(self, check: Problems) -> None:
        check.below_one("optimizer", self, "momentum")
        check(
            not self.nesterov or self.momentum > 0, "optimizer.nesterov", self.nesterov, "needs optimizer.momentum > 0"
        )


@dataclass(kw_only=True)
class AdagradConfig(OptimizerConfig):
    """Adagrad (Duchi et al. 2011)."""

    lr: float = 0.02
    """Peak learning rate (> 0)."""
    eps: float = 1e-10
    """Added to the denominator (> 0)."""

    def _check(self, check: Problems) -> None:
        check(self.eps > 0, "optimizer.eps", self.eps, "must be > 0")


@dataclass(kw_only=True)
class AdadeltaConfig(OptimizerConfig):
    """Adadelta (Zeiler 2012)."""

    lr: float = 1.0
    """Peak learning rate (> 0)."""
    rho: float = 0.95
    """Decay of the running averages (0 <= rho < 1)."""
    eps: float = 1e-6
    """Added under the square roots (> 0)."""

    def _check(self, check: Problems) -> None:
        check.below_one("optimizer", self, "rho")
        check(self.eps > 0, "optimizer.eps", self.eps, "must be > 0")


@dataclass(kw_only=True)
class RmspropConfig(OptimizerConfig):
    """RMSprop (Tieleman & Hinton 2012)."""

    lr: float = 1e-3
    """Peak learning rate (> 0)."""
    alpha: float = 0.99
    """Decay of the squared-gradient average (0 <= alpha < 1)."""
    momentum: float = 0.0
    """Momentum (0 <= m < 1)."""
    eps: float = 1e-8
    """Added to the denominator (> 0)."""

    def _check(self, check: Problems) -> None:
        check.below_one("optimizer", self, "alpha", "momentum")
        check(self.eps > 0, "optimizer.eps", self.eps, "must be > 0")


@dataclass(kw_only=True)
class AdamConfig(OptimizerConfig):
    """Adam (Kingma & Ba 2015); weight decay is an L2 term."""

    beta1: float = 0.9
    """Decay of the gradient average (0 <= beta1 < 1)."""
    beta2: float = 0.999
    """Decay of the squared-gradient average (0 <= beta2 < 1)."""
    eps: float = 1e-8
    """Added to the denominator (> 0)."""

    def _check(self, check: Problems) -> None:
        check.below_one("optimizer", self, "beta1", "beta2")
        check(self.eps > 0, "optimizer.eps", self.eps, "must be > 0")


@dataclass(kw_only=True)
class AdamwConfig(AdamConfig):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    lr: float = 2e-3
    """Peak learning rate (> 0)."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices (>= 0)."""
    beta2: float = 0.99
    """Decay of the squared-gradient average (0 <= beta2 < 1)."""


@dataclass(kw_only=True)
class NadamConfig(AdamConfig):
    """Adam with Nesterov momentum (Dozat 2016) and decoupled weight decay."""

    lr: float = 2e-3
    """Peak learning rate (> 0)."""
    momentum_decay: float = 4e-3
    """How fast the momentum grows to beta1 (>= 0): the factor is 1 - 0.96^(step x this) / 2."""

    def _check(self, check: Problems) -> None:
        super()._check(check)
        check.not_negative("optimizer", self, "momentum_decay")


@dataclass(kw_only=True)
class ScheduleFreeConfig(AdamConfig):
    """Schedule-free AdamW (Defazio et al. 2024), by the authors' library; takes schedule=constant and no average."""

    lr: float = 5e-3
    """Learning rate after warm-up (> 0)."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices (>= 0), of the point at which gradients are taken."""
    beta1: float = 0.95
    """How far that point is moved from the fast weights towards their average (0 < beta1 < 1)."""
    beta2: float = 0.99
    """Decay of the squared-gradient average (0 <= beta2 < 1)."""

    def _check(self, check: Problems) -> None:
        super()._check(check)
        check(self.beta1 > 0, "optimizer.beta1", self.beta1, "must be > 0 for schedule_free")


@dataclass(kw_only=True)
class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al. 2024) on the hidden matrices, AdamW on embeddings, the head, gains and biases."""

    lr: float = 0.02
    """Peak learning rate of the hidden matrices (> 0)."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices (>= 0)."""
    momentum: float = 0.95
    """Nesterov momentum of the hidden matrices (0 <= m < 1)."""
    ns_steps: int = 5
    """Newton-Schulz iterations (1 to 10), in fp32 on the CPU and bf16 on CUDA."""
    adam_lr: float = 2e-3
    """Peak learning rate of everything else (> 0)."""
    beta1: float = 0.9
    """AdamW's decay of the gradient average (0 <= beta1 < 1)."""
    beta2: float = 0.99
    """AdamW's decay of the squared-gradient average (0 <= beta2 < 1)."""
    eps: float = 1e-8
    """AdamW's addition to the denominator (> 0)."""

    def _check(self, check: Problems) -> None:
        check.below_one("optimizer", self, "momentum")
        check(1 <= self.ns_steps <= 10, "optimizer.ns_steps", self.ns_steps, "must be between 1 and 10")
        check.positive("optimizer", self, "adam_lr")
        check.below_one("optimizer", self, "beta1", "beta2")
        check(self.eps > 0, "optimizer.eps", self.eps, "must be > 0")


@dataclass(kw_only=True)
class ScheduleConfig:
    """Base of the ``schedule`` group. A schedule is a pure function of the step and of the run's progress (0 to 1)."""

    warmup_steps: int | None = None
    """Linear warm-up over this many steps (>= 0); null: ``warmup_ratio`` of the run."""
    warmup_ratio: float = 0.02
    """Linear warm-up over this share of the run, where warmup_steps is null (0 to 1)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.at_least(0, "schedule", self, "warmup_steps", or_null=True)
            check(0 <= self.warmup_ratio <= 1, "schedule.warmup_ratio", self.warmup_ratio, "must be between 0 and 1")
            self._check(check)

    def _check(self, check: Problems) -> None:
        """Checks of the subclass, reported together with those of the base."""


@dataclass(kw_only=True)
class ConstantConfig(ScheduleConfig):
    """Constant after warm-up."""


@dataclass(kw_only=True)
class _DecayingConfig(ScheduleConfig):
    final_ratio: float = 0.0
    """Learning rate at the end, as a share of the peak (0 to 1)."""

    def _check(self, check: Problems) -> None:
        check(0 <= self.final_ratio <= 1, "schedule.final_ratio", self.final_ratio, "must be between 0 and 1")


@dataclass(kw_only=True)
class CosineConfig(_DecayingConfig):
    """Half a cosine from the peak to the final ratio (Loshchilov & Hutter 2017)."""


@dataclass(kw_only=True)
class LinearConfig(_DecayingConfig):
    """A straight line from the peak to the final ratio."""


@dataclass(kw_only=True)
class WsdConfig(_DecayingConfig):
    """Warm-up, stable, decay (Hu et al. 2024): constant, then a straight line to the final ratio."""

    decay_ratio: float = 0.4
    """Share of the run spent decaying (0 < r <= 1)."""

    def _check(self, check: Problems) -> None:
        super()._check(check)
        check(0 < self.decay_ratio <= 1, "schedule.decay_ratio", self.decay_ratio, "must be above 0 and at most 1")


@dataclass(kw_only=True)
class StepDecayConfig(ScheduleConfig):
    """Constant, then multiplied by ``factor`` at ``num_falls`` moments, equally spaced (Zaremba et al. 2014)."""

    hold_ratio: float = 0.5
    """Share of the run before the first fall (0 <= r < 1)."""
    factor: float = 0.5
    """Multiplier of each fall (0 < f < 1)."""
    num_falls: int = 5
    """How often the rate falls (>= 1)."""

    def _check(self, check: Problems) -> None:
        check.below_one("schedule", self, "hold_ratio")
        check(0 < self.factor < 1, "schedule.factor", self.factor, "must be above 0 and below 1")
        check.at_least(1, "schedule", self, "num_falls")


@dataclass(kw_only=True)
class InverseSqrtConfig(ScheduleConfig):
    """Falls with the inverse square root of the step after warm-up (Vaswani et al. 2017, section 5.3)."""


@dataclass(kw_only=True)
class PlateauConfig(ScheduleConfig):
    """Multiplies the rate by ``factor`` when the validation loss has not improved for ``patience`` evaluations."""

    factor: float = 0.5
    """Multiplier at a plateau (0 < f < 1)."""
    patience: int = 1
    """Evaluations without improvement that are tolerated before the rate falls (>= 0)."""
    min_ratio: float = 0.001
    """The rate never falls below this share of the peak (0 to 1)."""

    def _check(self, check: Problems) -> None:
        check(0 < self.factor < 1, "schedule.factor", self.factor, "must be above 0 and below 1")
        check.at_least(0, "schedule", self, "patience")
        check(0 <= self.min_ratio <= 1, "schedule.min_ratio", self.min_ratio, "must be between 0 and 1")
