"""Softmax temperature: logits divided by T before the softmax, and the T that is best on a text (Guo et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lmkit.evaluation.plan import Indices
from lmkit.evaluation.scoring import Scorer
from lmkit.heads import rows_per_chunk
from lmkit.models.base import LanguageModel, Scores

GRID = tuple(round(0.6 + 0.1 * i, 1) for i in range(12))
"""Temperatures that are tried, 0.6 to 1.7; the best is refined between its neighbours."""


def tempered(model: LanguageModel, temperature: float) -> Scorer:
    """A scorer with the logits divided by the temperature (> 0), a chunk of rows at a time."""

    def scorer(hidden_ND: Tensor, targets_N: Tensor, positions_N: Indices) -> Scores:
        nats, correct = [], []
        for logits_NV, targets in _chunks(model, hidden_ND, targets_N):
            logits_NV = logits_NV.div_(temperature)
            at_target = logits_NV.gather(1, targets[:, None]).squeeze(1)
            nats.append(torch.logsumexp(logits_NV, 1) - at_target)
            correct.append(logits_NV.argmax(1) == targets)
        return Scores(torch.cat(nats), torch.cat(correct))

    return scorer


class TemperatureSearch:
    """Sums the nats of a text at several temperatures in one pass; use ``scorer`` in place of the head's.

    The nats are convex in 1 / T (a log-sum-exp of linear functions less a linear one), so that a parabola through the
    best of the grid and its neighbours finds the minimum between them.
    """

    def __init__(self, model: LanguageModel, grid: Sequence[float] = GRID) -> None:
        self.model, self.grid = model, tuple(grid)
        self.nats = np.zeros(len(self.grid))

    def scorer(self, hidden_ND: Tensor, targets_N: Tensor, positions_N: Indices) -> Scores:
        """Adds to the sums; the scores returned are those of the last temperature."""
        last = Scores(torch.zeros(len(targets_N)), torch.zeros(len(targets_N), dtype=torch.bool))
        for logits_NV, targets in _chunks(self.model, hidden_ND, targets_N):
            at_target = logits_NV.gather(1, targets[:, None]).squeeze(1)
            for k, temperature in enumerate(self.grid):
                nats = torch.logsumexp(logits_NV / temperature, 1) - at_target / temperature
                self.nats[k] += float(nats.sum(dtype=torch.float64))
        return last

    def best(self) -> float:
        """The temperature of the fewest nats."""
        inverse = 1 / np.array(self.grid)
        k = int(np.clip(self.nats.argmin(), 1, len(self.grid) - 2))
        a, b, _ = np.polyfit(inverse[k - 1 : k + 2], self.nats[k - 1 : k + 2], 2)
        low, high = sorted((inverse[k - 1], inverse[k + 1]))
        vertex = -b / (2 * a) if a > 0 else inverse[self.nats.argmin()]
        return float(1 / np.clip(vertex, low, high)) if math.isfinite(vertex) else 1.0


def _chunks(model: LanguageModel, hidden_ND: Tensor, targets_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = rows_per_chunk(model.vocab_size, hidden_ND.device)
    for hidden, targets in zip(torch.split(hidden_ND, size), torch.split(targets_N, size), strict=True):
        yield model.head.logits(hidden), targets
