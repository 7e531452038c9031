"""What training minimises. Evaluation always uses the exact softmax, whatever a model was trained with."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lmkit.config.softmax import AdaptiveSoftmaxConfig, SampledSoftmaxConfig, SoftmaxConfig
from lmkit.errors import ConfigError
from lmkit.heads import Candidates, SoftmaxHead
from lmkit.models.adaptive import AdaptiveHead
from lmkit.models.base import IGNORE, Head, State


class Objective(ABC):
    """Loss of a batch's hidden vectors."""

    ar_alpha = tar_beta = 0.0
    """Weights of the two parts of ``penalty``."""
    changes_at: tuple[float, ...] = ()
    """Shares of the run (0 to 1) from which on ``at`` gives another one."""

    @abstractmethod
    def __call__(self, head: Head, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """Summed loss (nats, scalar) over the targets that are not IGNORE; what training follows is its gradient."""

    def at(self, progress: float) -> Objective:
        """The objective to use where this share of the run is done (0 to 1)."""
        return self

    def of_batch(
        self,
        head: Head,
        hidden_BTD: Tensor,
        state: State | None,
        targets_BT: Tensor,
        scored_N: Tensor | None = None,
    ) -> Tensor:
        """Summed loss of a batch that the model has read, in value; the gradient is also that of ``penalty``.

        state: what the model returned beside the hidden vectors. scored_N: which of the B x T targets are not IGNORE,
        if the caller knows; the head then reads those only, on any device.
        """
        hidden_ND, targets_N = hidden_BTD.flatten(0, 1), targets_BT.reshape(-1)
        if scored_N is not None:
            hidden_ND, targets_N = hidden_ND.index_select(0, scored_N), targets_N.index_select(0, scored_N)
        loss = self(head, hidden_ND, targets_N)
        undropped_BTD = None if state is None else state.undropped_BTD
        penalty = self.penalty(hidden_BTD, hidden_BTD if undropped_BTD is None else undropped_BTD, targets_BT)
        return loss if penalty is None else loss + (penalty - penalty.detach())

    def penalty(self, hidden_BTD: Tensor, undropped_BTD: Tensor, targets_BT: Tensor) -> Tensor | None:
        """AR and TAR (Merity et al. 2017, "Revisiting activation regularization"), summed over targets; None: neither.

        alpha mean(h^2) of what the head reads and beta mean((h[t] - h[t + 1])^2) of what dropout has not touched, each
        times the number of targets. Padded positions count nothing, and a sum over rows is the sum of theirs.
        """
        if self.ar_alpha == 0.0 and self.tar_beta == 0.0:
            return None
        scored_BT1 = (targets_BT != IGNORE).unsqueeze(-1)
        width = hidden_BTD.shape[2]
        total = torch.zeros((), device=hidden_BTD.device)
        if self.ar_alpha > 0.0:
            total = total + self.ar_alpha / width * (hidden_BTD.float().square() * scored_BT1).sum()
        if self.tar_beta > 0.0:
            change_BTD = undropped_BTD[:, 1:].float() - undropped_BTD[:, :-1].float()
            both_BT1 = scored_BT1[:, 1:] & scored_BT1[:, :-1]
            share_B = scored_BT1.sum((1, 2)) / both_BT1.sum((1, 2)).clamp(min=1)  # targets for each change of a row
            total = total + self.tar_beta / width * ((change_BTD.square() * both_BT1).sum((1, 2)) * share_B).sum()
        return total


class ExactSoftmax(Objective):
    """The negative log-likelihood, whose gradient may be that of smoothed targets (Szegedy et al. 2016, section 7).

    Smoothing, like ``penalty``, is no part of the value, so that losses can be compared with and without it.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, head: Head, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        nats = head.loss(hidden_ND, targets_N)
        if self.label_smoothing == 0.0:
            return nats
        if not isinstance(head, SoftmaxHead):
            raise TypeError(f"softmax.label_smoothing cannot train a {type(head).__name__}")
        smoothing = self.label_smoothing * head.lead(hidden_ND, targets_N)
        return nats + (smoothing - smoothing.detach())


class SampledSoftmax(Objective):
    """The negative log-likelihood with a partition function estimated from frequent words, a draw of rare ones and the
    batch's own targets; one set of candidates a batch, drawn from torch's global generator.

    Importance sampling with shared candidates (Bengio & Senecal 2008; Jean et al. 2015), here by independent inclusion
    of each rare word with a probability proportional to its frequency. The probability that a word is a candidate is
    that of being drawn or being the target of another position, targets taken as drawn by frequency: over batches the
    partition function of a row is estimated without bias.
    """

    def __init__(self, config: SampledSoftmaxConfig, counts_V: Tensor) -> None:
        """counts_V: how often each token occurs in train."""
        share_V = counts_V.double().clamp(min=0.5) / counts_V.sum()
        order_V = counts_V.argsort(descending=True, stable=True)
        self.frequent_C = order_V[: config.num_frequent]
        rare_V = share_V.clone()
        rare_V[self.frequent_C] = 0.0
        draw_V = (rare_V / rare_V.sum().clamp(min=1e-30) * config.num_sampled).clamp(max=1.0)
        draw_V[self.frequent_C] = 1.0
        self.draw_V = draw_V.float()
        self.log_missed_V = torch.log1p(-share_V).float()
        self.exact_from, self.exact = config.exact_from, ExactSoftmax()
        self.changes_at = (config.exact_from,) if config.exact_from < 1.0 else ()

    def at(self, progress: float) -> Objective:
        return self if progress < self.exact_from else self.exact

    def __call__(self, head: Head, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        if not isinstance(head, SoftmaxHead):
            raise TypeError(f"softmax=sampled cannot train a {type(head).__name__}")
        device = targets_N.device
        if self.draw_V.device != device:
            self.draw_V, self.log_missed_V = self.draw_V.to(device), self.log_missed_V.to(device)
        scored_N = targets_N != IGNORE
        included_V = torch.rand(self.draw_V.shape, device=device) < self.draw_V
        asked_W = torch.zeros(len(included_V) + 1, dtype=torch.bool, device=device)  # W = V + 1: what is not scored
        asked_W[targets_N.where(scored_N, len(included_V))] = True
        included_V |= asked_W[:-1]
        ids_C = included_V.nonzero().squeeze(1)
        missed_C = (1.0 - self.draw_V[ids_C]) * torch.exp((scored_N.sum() - 1) * self.log_missed_V[ids_C])
        candidates = Candidates(ids_C, -torch.log1p(-missed_C))
        position_V = torch.cumsum(included_V, 0) - 1
        positions_N = torch.where(scored_N, position_V[targets_N.where(scored_N, 0)], IGNORE)
        return head.sampled_loss(hidden_ND, candidates, positions_N)


def check_head(config: SoftmaxConfig, head: type[Head]) -> None:
    """Raise ConfigError unless the loss can train an output layer of this kind."""
    if isinstance(config, AdaptiveSoftmaxConfig) and not issubclass(head, AdaptiveHead):
        raise ConfigError("softmax=adaptive cannot train a model that began with another softmax", "use softmax=exact")
    plain = isinstance(config, SampledSoftmaxConfig) or config.label_smoothing > 0
    if plain and not issubclass(head, SoftmaxHead):
        raise ConfigError(
            "softmax=sampled and softmax.label_smoothing cannot train a mixture of softmaxes or an adaptive softmax",
            "use softmax=exact without label_smoothing",
        )


def build_objective(config: SoftmaxConfig, counts_V: Tensor | None) -> Objective:
    """The objective of the ``softmax`` group; counts_V: how often each token occurs in train, for softmax=sampled."""
    objective: Objective = ExactSoftmax(config.label_smoothing)
    if isinstance(config, SampledSoftmaxConfig):
        if counts_V is None:
            raise TypeError("softmax=sampled needs counts")
        objective = SampledSoftmax(config, counts_V)
    for part in (objective, objective.at(1.0)):
        part.ar_alpha, part.tar_beta = config.ar_alpha, config.tar_beta
    return objective
