"""Cache models: distributions over what came shortly before, to be mixed with a model's own.

Both give, for each scored token in the order of the text, its negative log-probability under the cache alone: infinite
where the cache does not hold it, NaN (the mixture then is the model) where the cache is still empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmkit.evaluation.plan import Indices, Tokens
from lmkit.evaluation.scoring import Scorer
from lmkit.models.base import Scores

ROWS = 512
"""Positions whose similarities to the cache are computed at once."""


def unigram_cache(tokens: Tokens, window: int) -> NDArray[np.float32]:
    """(N,) nats of each token under the relative frequencies of the up to ``window`` tokens before it.

    Kuhn & De Mori 1990. The first token has an empty cache.
    """
    nats_N = np.full(len(tokens), np.nan, dtype=np.float32)
    counts: dict[int, int] = {}
    ids = tokens.tolist()
    for i, token in enumerate(ids):
        if i > 0:
            count = counts.get(token, 0)
            nats_N[i] = np.log(min(i, window) / count) if count else np.inf
        counts[token] = counts.get(token, 0) + 1
        if i >= window:
            counts[ids[i - window]] -= 1
    return nats_N


class NeuralCache:
    """Continuous cache (Grave et al. 2017, eq. 3): p(w) proportional to the sum of exp(theta h_t . h_i) over the
    cached i whose token is w; h_i is the hidden vector that token i was predicted from. The hidden vector of an n-gram
    model is its history, and there h_t . h_i stands for the number of last tokens that two histories have in common.

    Use ``scorer`` in place of the head's with one window read at a time, so that tokens come in the order of the text.
    K values of theta are computed in one pass.
    """

    def __init__(self, num_tokens: int, window: int, thetas: Sequence[float]) -> None:
        self.window, self.thetas = window, list(thetas)
        self.nats_KN = np.full((len(self.thetas), num_tokens), np.nan, dtype=np.float32)
        self._hidden_SD: Tensor | None = None
        self._tokens_S = torch.zeros(0, dtype=torch.int64)

    def wrap(self, own: Scorer) -> Scorer:
        """A scorer that gives the scores of ``own`` and fills ``nats_KN`` beside."""

        def scorer(hidden_ND: Tensor, targets_N: Tensor, positions_N: Indices) -> Scores:
            for first in range(0, len(targets_N), ROWS):
                rows = slice(first, first + ROWS)
                self._add(hidden_ND[rows], targets_N[rows], positions_N[rows])
            return own(hidden_ND, targets_N, positions_N)

        return scorer

    def _add(self, hidden_ND: Tensor, targets_N: Tensor, positions_N: Indices) -> None:
        num_new = len(targets_N)
        if self._hidden_SD is None:
            self._hidden_SD, self._tokens_S = hidden_ND[:0], targets_N[:0]
        keys_SD = torch.cat([self._hidden_SD, hidden_ND])
        tokens_S = torch.cat([self._tokens_S, targets_N])
        num_old = len(keys_SD) - num_new
        index_N1 = torch.arange(num_old, num_old + num_new, device=keys_SD.device)[:, None]
        index_S = torch.arange(len(keys_SD), device=keys_SD.device)
        seen_NS = (index_S < index_N1) & (index_S >= index_N1 - self.window)
        similar_NS = similarities(hidden_ND, keys_SD)
        is_target_NS = tokens_S == targets_N[:, None]
        empty_N = ~seen_NS.any(1)
        for k, theta in enumerate(self.thetas):
            scaled_NS = (similar_NS * theta).masked_fill_(~seen_NS, -torch.inf)
            total_N = torch.logsumexp(scaled_NS, 1)
            own_N = torch.logsumexp(scaled_NS.masked_fill(~is_target_NS, -torch.inf), 1)
            nats_N = (total_N - own_N).where(~empty_N, torch.nan)
            self.nats_KN[k, positions_N] = nats_N.cpu().numpy()
        self._hidden_SD, self._tokens_S = keys_SD[-self.window :].clone(), tokens_S[-self.window :].clone()


def filled(cache_nats_N: NDArray[np.float32], model_nats_N: NDArray[np.float32]) -> NDArray[np.float32]:
    """The cache's nats with the model's own where the cache was empty."""
    return np.where(np.isnan(cache_nats_N), model_nats_N, cache_nats_N)


def similarities(hidden_ND: Tensor, keys_SD: Tensor) -> Tensor:
    """(N, S) float32: inner products; of histories (integers, most recent token last) the length of the common end."""
    if hidden_ND.is_floating_point():
        with torch.autocast(hidden_ND.device.type, enabled=False):  # rounded to bf16 one of 20 is up to 0.06 off
            return hidden_ND.float() @ keys_SD.float().T
    same_NSD = (hidden_ND[:, None] == keys_SD) & (hidden_ND[:, None] >= 0)
    return same_NSD.flip(2).cumprod(2).sum(2).float()


def theta_grid(hidden_ND: Tensor) -> list[float]:
    """Values of theta to try: around the inverse mean square length of vectors, so that similarities are of order 1."""
    factors = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    if not hidden_ND.is_floating_point():
        return [factor / 4 for factor in factors]
    mean_square = float(hidden_ND.float().square().sum(-1).mean())
    return [factor / mean_square for factor in factors]
