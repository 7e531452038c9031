"""Configuration of what pretraining teaches: the ``objective`` group."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lmkit.config.check import Problems


@dataclass(kw_only=True)
class ObjectiveConfig:
    """Predict each token of the text from those before it: the ``lm`` objective, and the base of the others."""

    @property
    def name(self) -> str:
        """Its schema name, which is also what ``ModelConfig.objective`` says of the models that it trains."""
        return "lm"


class Anneal(Enum):
    """How the weight of the KL term grows."""

    none = "none"
    linear = "linear"
    cyclical = "cyclical"


@dataclass(kw_only=True)
class VaeObjectiveConfig(ObjectiveConfig):
    """Evidence lower bound of sentences (Kingma & Welling 2014; Bowman et al. 2016)."""

    beta: float = 1.0
    """Weight of the KL term once it is annealed (>= 0); 1 is the bound itself."""
    anneal: Anneal = Anneal.linear
    """Growth of that weight from 0 after the plain part: linear once, cyclical (Fu et al. 2019), or none."""
    anneal_share: float = 0.3
    """Share of what follows the plain part, or of each cycle, over which it grows (0 < share <= 1)."""
    cycles: int = 4
    """Cycles of anneal=cyclical after the plain part (>= 1)."""
    free_nats: float = 6.0
    """Mean KL of a micro-batch's rows that is free (>= 0), in equal parts a unit (free bits; Kingma et al. 2016)."""
    target_nats: float = 0.0
    """The same, however the units share it: up to that none costs anything (>= 0; 0: free_nats alone count)."""
    plain_share: float = 0.0
    """Share of the run, at its start, in which the decoder learns alone, as a language model (0 to below 1)."""
    num_samples: int = 10
    """Samples of the importance-weighted bound in validation (>= 1; Burda et al. 2016)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.not_negative("objective", self, "beta")
            share = self.anneal_share
            check(0 < share <= 1, "objective.anneal_share", share, "must be above 0 and at most 1")
            check.at_least(1, "objective", self, "cycles")
            check.not_negative("objective", self, "free_nats", "target_nats")
            check.below_one("objective", self, "plain_share")
            check.at_least(1, "objective", self, "num_samples")

    def note_unused(self, check: Problems) -> None:
        """Note keys that would do nothing with this kind of growth. Asked of what is to be trained now only."""
        for used, name, needed in (
            (self.anneal is not Anneal.none, "anneal_share", "linear or cyclical"),
            (self.anneal is Anneal.cyclical, "cycles", "cyclical"),
        ):
            rule = f"needs objective.anneal={needed}: set it, or leave this out"
            check.unused("objective", self, () if used else (name,), rule)

    @property
    def name(self) -> str:
        return "vae"

    def is_plain(self, progress: float) -> bool:
        """Whether the decoder still learns alone after this share of the run."""
        return progress < self.plain_share

    def weight(self, progress: float) -> float:
        """Weight of the KL term after this share of the run."""
        if self.anneal is Anneal.none:
            return self.beta
        within = max(0.0, progress - self.plain_share) / (1.0 - self.plain_share)
        within = within if self.anneal is Anneal.linear else round(within * self.cycles, 9) % 1.0
        return self.beta * min(1.0, within / self.anneal_share)


@dataclass(kw_only=True)
class GanObjectiveConfig(ObjectiveConfig):
    """Maximum likelihood, then relativistic adversarial training of soft samples (Nie et al. 2019, RelGAN)."""

    pretrain_share: float = 0.8
    """Share of the run that is maximum likelihood only (0 to 1)."""
    length: int = 24
    """Tokens of a sentence that the discriminator sees (>= 1)."""
    generator_lr: float = 0.02
    """Learning rate of the generator in the adversarial part, as a share of optimizer.lr (> 0)."""
    discriminator_lr: float = 0.02
    """Learning rate of the discriminator, as a share of optimizer.lr (> 0)."""
    sharpness: float = 100.0
    """Inverse temperature of the Gumbel-softmax at the end of the run, from 1, exponentially (>= 1)."""
    num_samples: int = 500
    """Sentences that are sampled in validation (>= 1)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            share = self.pretrain_share
            check(0 <= share <= 1, "objective.pretrain_share", share, "must be between 0 and 1")
            check.at_least(1, "objective", self, "length")
            check.positive("objective", self, "generator_lr", "discriminator_lr")
            check(1 <= self.sharpness < float("inf"), "objective.sharpness", self.sharpness, "must be >= 1 and finite")
            check.at_least(1, "objective", self, "num_samples")

    @property
    def name(self) -> str:
        return "gan"

    def is_adversarial(self, progress: float) -> bool:
        """Whether maximum likelihood is over after this share of the run."""
        return progress >= self.pretrain_share

    def inverse_temperature(self, progress: float) -> float:
        """Of the Gumbel-softmax after this share of the run."""
        done = max(0.0, progress - self.pretrain_share) / max(1e-9, 1.0 - self.pretrain_share)
        return float(self.sharpness ** min(1.0, done))
