"""Softmax temperature: logits divided by T before the softmax, and the T that is best on a text (Guo et al. 2017)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lmkit.evaluation.plan import Indices
from lmkit.evaluation.scoring import Scorer
from lmkit.heads import rows_per_chunk
from lmkit.models.base import LanguageModel, Scores

GRID = tuple(round(0.6 + 0.1 * i, 1) for i in range(12))
"""Temperatures that are tried, at least five; the best is refined between its neighbours."""


def tempered(model: LanguageModel, temperature: float) -> Scorer:
    """A scorer with the logits divided by the temperature (> 0), a chunk of rows at a time."""

    def scorer(hidden_ND: Tensor, targets_N: Tensor, positions_N: Indices) -> Scores:
        nats_N = torch.zeros(len(targets_N), device=targets_N.device)
        correct_N = torch.zeros(len(targets_N), dtype=torch.bool, device=targets_N.device)
        for rows, logits_NV in _chunks(model, hidden_ND):
            logits_NV, targets = logits_NV.div_(temperature), targets_N[rows]
            nats_N[rows] = torch.logsumexp(logits_NV, 1) - logits_NV.gather(1, targets[:, None]).squeeze(1)
            correct_N[rows] = logits_NV.argmax(1) == targets
        return Scores(nats_N, correct_N)

    return scorer


class TemperatureSearch:
    """Sums the nats of a text at several temperatures in one pass; use ``scorer`` in place of the head's.

    The nats are convex in 1 / T (a log-sum-exp of linear functions less a linear one), so that the minimum lies between
    the neighbours of the best of the grid. There it is that of the polynomial through five of the grid: that is within
    2e-5 of the fewest nats even for a few tokens, while a parabola could end up worse than T = 1.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.nats = np.zeros(len(GRID))

    def scorer(self, hidden_ND: Tensor, targets_N: Tensor, positions_N: Indices) -> Scores:
        """Adds to the sums; the scores returned are those of the last temperature."""
        last = Scores(torch.zeros(len(targets_N)), torch.zeros(len(targets_N), dtype=torch.bool))
        for rows, logits_NV in _chunks(self.model, hidden_ND):
            at_target = logits_NV.gather(1, targets_N[rows, None]).squeeze(1)
            for k, temperature in enumerate(GRID):
                nats = torch.logsumexp(logits_NV / temperature, 1) - at_target / temperature
                self.nats[k] += float(nats.cpu().sum(dtype=torch.float64))
        return last

    def best(self) -> float:
        """The temperature of the fewest nats; 1 if they are not finite, which scoring then says."""
        if not np.isfinite(self.nats).all():
            return 1.0
        inverse, last = 1 / np.array(GRID), len(GRID) - 1
        k = int(self.nats.argmin())
        first = int(np.clip(k - 2, 0, last - 4))
        five = slice(first, first + 5)
        curve = np.polynomial.Polynomial.fit(inverse[five], self.nats[five], 4)
        between = np.linspace(inverse[max(k - 1, 0)], inverse[min(k + 1, last)], 2001)
        return float(1 / between[curve(between).argmin()])


def _chunks(model: LanguageModel, hidden_ND: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their logits, a few at a time."""
    size = rows_per_chunk(model.vocab_size, hidden_ND.device)
    for first in range(0, len(hidden_ND), size):
        rows = slice(first, first + size)
        yield rows, model.head.logits(hidden_ND[rows])
