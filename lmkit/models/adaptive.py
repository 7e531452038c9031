"""Adaptive softmax (Grave et al. 2017, "Efficient softmax approximation for GPUs", section 4).

It is a model of the whole distribution, not an approximation of one: its exact probabilities are what is evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmkit.errors import ConfigError
from lmkit.heads import linear_cross_entropy, rows_per_chunk, score_in_chunks, without_autocast
from lmkit.models.base import IGNORE, Head, Scores


class AdaptiveHead(Head):
    """A softmax over the frequent tokens and one entry for each cluster of rare ones, and a softmax in each cluster.

    p(v) = p(v in head) for frequent v, p(cluster) p(v | cluster) for others. Cluster i (from 1) reads h through a
    projection to D / div_value^i channels. Tokens are told by their rank in the counts of train, which ``set_counts``
    sets before the first step; until then ids count as ranks.
    """

    rank_V: Tensor

    def __init__(self, width: int, vocab_size: int, cutoffs: Sequence[int], div_value: float) -> None:
        """cutoffs: first rank of each cluster, rising. ConfigError if the vocabulary is not larger than the last."""
        super().__init__()
        if cutoffs[-1] >= vocab_size:
            raise ConfigError(
                f"model.cutoffs ends with {cutoffs[-1]}, but the vocabulary has {vocab_size} tokens",
                "lower softmax.cutoffs",
            )
        self.edges = [*cutoffs, vocab_size]
        self.register_buffer("rank_V", torch.arange(vocab_size))
        self.weight = nn.Parameter(torch.empty(cutoffs[0] + len(cutoffs), width))
        self.bias = nn.Parameter(torch.zeros(len(self.weight)))
        self.tails = nn.ModuleList(
            Tail(width, max(1, int(width / min(div_value, width) ** i)), self.edges[i] - self.edges[i - 1])
            for i in range(1, len(self.edges))
        )

    @torch.no_grad()
    def set_counts(self, counts_V: Tensor, *, biases: bool) -> None:
        """Rank the tokens by how often they occur in train; ``biases``: start from the logs of their shares."""
        order_V = counts_V.argsort(descending=True, stable=True)
        self.rank_V[order_V] = torch.arange(len(order_V))
        if not biases:
            return
        parts = counts_V[order_V].double().clamp(min=0.5).tensor_split(self.edges[:-1])
        totals = torch.stack([part.sum() for part in parts[1:]])
        self.bias.copy_(torch.log(torch.cat([parts[0], totals]) / sum(part.sum() for part in parts)))
        for tail, part in zip(self.tails, parts[1:], strict=True):
            tail.bias.copy_(torch.log(part / part.sum()))  # type: ignore[operator]

    def loss(self, hidden_ND: Tensor, targets_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
        """As Head.loss: each target costs its entry in the head, and one in a cluster if it is rare."""
        scored_N = targets_N != IGNORE
        rank_N = torch.where(scored_N, self.rank_V[targets_N.where(scored_N, 0)], IGNORE)
        first = self.edges[0]
        starts = torch.tensor(self.edges[:-1], device=rank_N.device)
        cluster_N = torch.bucketize(rank_N, starts, right=True)  # 0: in the head itself, or ignored
        entry_N = torch.where(cluster_N > 0, first + cluster_N - 1, rank_N)
        total = linear_cross_entropy(hidden_ND, self.weight, self.bias, entry_N, weights_N=weights_N)
        for i, tail in enumerate(self.tails, start=1):
            rows = (cluster_N == i).nonzero().squeeze(1)
            weights = None if weights_N is None else weights_N[rows]
            total = total + tail.loss(hidden_ND[rows], rank_N[rows] - self.edges[i - 1], weights)  # type: ignore[operator]
        return total

    @torch.no_grad()
    def score(self, hidden_ND: Tensor, targets_N: Tensor) -> Scores:
        """As Head.score, from the whole distribution."""
        size = rows_per_chunk(2 * len(self.rank_V), hidden_ND.device)
        return score_in_chunks(self, hidden_ND, targets_N, size)

    @without_autocast
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """(N, V) float32 log-probabilities."""
        first = self.edges[0]
        head_NE = F.log_softmax(F.linear(hidden_ND, self.weight, self.bias).float(), 1)
        parts = [head_NE[:, :first]]
        for i, tail in enumerate(self.tails):
            parts.append(tail(hidden_ND) + head_NE[:, first + i, None])
        return torch.cat(parts, 1).index_select(1, self.rank_V)


class Tail(nn.Module):
    """The softmax in one cluster."""

    def __init__(self, width: int, narrow: int, num_tokens: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, narrow, bias=False)
        self.weight = nn.Parameter(torch.empty(num_tokens, narrow))
        self.bias = nn.Parameter(torch.zeros(num_tokens))

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """(N, tokens of the cluster) float32 log-probabilities inside the cluster."""
        return F.log_softmax(F.linear(self.project(hidden_ND), self.weight, self.bias).float(), 1)

    def loss(self, hidden_ND: Tensor, targets_N: Tensor, weights_N: Tensor | None) -> Tensor:
        """As Head.loss, inside the cluster."""
        return linear_cross_entropy(self.project(hidden_ND), self.weight, self.bias, targets_N, weights_N=weights_N)
