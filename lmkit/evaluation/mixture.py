"""Mixtures of models: averages of the probabilities that each gives to the tokens of a text.

A mixture needs nothing of its members but the log-likelihood of each token, so every member is scored on its own.
Shape letters: M members, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Nats = NDArray[np.floating]


def mixed(nats_MN: Sequence[Nats], weights: Sequence[float]) -> NDArray[np.float32]:
    """-log of the weighted sum of probabilities; NaN where a member is NaN, infinite nats are no probability."""
    return (-_log_sum(_logs(nats_MN) + _log_weights(weights))).astype(np.float32)


def averaged(nats_MN: Sequence[Nats]) -> NDArray[np.float32]:
    """The mixture with equal weights (an ensemble)."""
    return mixed(nats_MN, [1 / len(nats_MN)] * len(nats_MN))


def best_weights(nats_MN: Sequence[Nats], tolerance: float = 1e-12, max_rounds: int = 2000) -> list[float]:
    """The weights that maximise the likelihood of a text, by expectation-maximisation from equal ones.

    The log-likelihood is concave in the weights, so what EM finds is the best (Jelinek & Mercer 1980). Stops when the
    nats per token change by less than ``tolerance`` relative to them. Towards a weight of 0 EM is slow, so that a
    single member that is better than what it has reached gets all the weight. Tokens that a member does not score, or
    that none thinks possible, say nothing about the weights.
    """
    logs_MN = _logs(nats_MN)
    logs_MN = logs_MN[:, np.isfinite(logs_MN.max(0))]
    weights_M = np.full(len(logs_MN), 1 / len(logs_MN))
    top_N = logs_MN.max(0)
    probs_MN = np.exp(logs_MN - top_N)
    nats = before = np.inf
    for _ in range(max_rounds):
        total_N = weights_M @ probs_MN
        nats = -float((np.log(total_N) + top_N).mean())
        if before - nats < tolerance * max(abs(nats), 1.0):
            break
        before = nats
        weights_M = weights_M * (probs_MN @ (1 / total_N)) / len(total_N)
    alone_M = -logs_MN.mean(1)
    if alone_M.min() <= nats:
        weights_M = np.eye(len(logs_MN))[alone_M.argmin()]
    weights: list[float] = (weights_M / weights_M.sum()).tolist()
    return weights


def _logs(nats_MN: Sequence[Nats]) -> Floats:
    return -np.stack([np.asarray(nats, dtype=np.float64) for nats in nats_MN])


def _log_weights(weights: Sequence[float]) -> Floats:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(weights, dtype=np.float64))[:, None]


def _log_sum(logs_MN: Floats) -> Floats:
    top_N = np.where(np.isneginf(logs_MN.max(0)), 0.0, logs_MN.max(0))
    with np.errstate(divide="ignore"):
        total_N: Floats = np.log(np.exp(logs_MN - top_N).sum(0)) + top_N
    return total_N
