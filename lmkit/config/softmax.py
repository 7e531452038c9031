"""Configuration of the loss: the softmax, exact or cheaper, and what is added to it."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmkit.config.check import Problems, check_cutoffs

ADDED_TO_LOSS = ("label_smoothing", "ar_alpha", "tar_beta")
"""Keys of ``softmax`` that add to the loss over the vocabulary."""


@dataclass(kw_only=True)
class SoftmaxConfig:
    """The loss in training: cross-entropy over the whole vocabulary. Also the base of the ``softmax`` group.

    Evaluation always uses the exact softmax, without smoothing and penalties.
    """

    label_smoothing: float = 0.0
    """Share of each target that is spread over the whole vocabulary (0 <= e < 1; Szegedy et al. 2016); the loss that is
    shown and logged is without it."""
    ar_alpha: float = 0.0
    """Activation regularisation: weight (>= 0) of the mean square of the hidden vectors (Merity et al. 2017)."""
    tar_beta: float = 0.0
    """Temporal activation regularisation: weight (>= 0) of the mean square of their change from token to token."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.below_one("softmax", self, "label_smoothing")
            check.not_negative("softmax", self, "ar_alpha", "tar_beta")
            self._check(check)

    def _check(self, check: Problems) -> None:
        """Checks of the subclass, reported together with those of the base."""


@dataclass(kw_only=True)
class SampledSoftmaxConfig(SoftmaxConfig):
    """Cross-entropy over a sample of the vocabulary: much cheaper for large vocabularies and small models.

    The loss that is shown and logged is an estimate, on average a little too low (the logarithm is concave).
    """

    num_frequent: int = 500
    """This many of the most frequent tokens are always in the sample (>= 0)."""
    num_sampled: int = 300
    """Expected number of rarer tokens that are drawn for each batch (>= 1); the batch's targets come on top."""
    exact_from: float = 1.0
    """Share of the run after which the whole vocabulary is looked at (0 to 1; 1: never), at its cost."""

    def _check(self, check: Problems) -> None:
        check.at_least(0, "softmax", self, "num_frequent")
        check.at_least(1, "softmax", self, "num_sampled")
        check(0 <= self.exact_from <= 1, "softmax.exact_from", self.exact_from, "must be between 0 and 1")
        check(self.label_smoothing == 0, "softmax.label_smoothing", self.label_smoothing, "needs softmax=exact")


@dataclass(kw_only=True)
class AdaptiveSoftmaxConfig(SoftmaxConfig):
    """Adaptive softmax: few parameters and little work for rare tokens (Grave et al. 2017). Needs untied embeddings."""

    cutoffs: list[int] = field(default_factory=list)
    """Frequency rank at which each cluster of rarer tokens begins, rising; empty: 8 % and 25 % of the vocabulary."""
    div_value: float = 4.0
    """Each cluster is this many times narrower than the one before it (>= 1)."""

    def _check(self, check: Problems) -> None:
        check_cutoffs(check, "softmax.cutoffs", self.cutoffs)
        check(1 <= self.div_value < float("inf"), "softmax.div_value", self.div_value, "must be >= 1 and finite")
        check(self.label_smoothing == 0, "softmax.label_smoothing", self.label_smoothing, "needs softmax=exact")
