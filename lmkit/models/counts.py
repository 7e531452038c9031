"""Counting for ``ngram``: from a text to the tables of interpolated modified Kneser-Ney (Chen & Goodman 1999)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""Discounts of counts 1, 2 and more where the text is too small to estimate them (as KenLM's --discount_fallback)."""


@dataclass(frozen=True)
class Level:
    """All n-grams of one length, and their contexts, that is, all their tokens but the last.

    A context's id is its place in ``contexts_C``. Contexts are looked up from the newest token to the oldest and
    n-grams by context and last token, so that a context's n-grams lie side by side.
    """

    contexts_C: Tensor
    """int64, increasing: id of the context without its oldest token, times V, plus that token. The empty context: 0."""
    log_backoffs_C: Tensor
    """float32, ln b(h)."""
    ngrams_G: Tensor
    """int64, increasing: id of the context times V, plus the last token."""
    log_probs_G: Tensor
    """float32, ln P(w | h)."""


TABLES = ("contexts", "log_backoffs", "ngrams", "log_probs")


def estimate(tokens: NDArray[np.integer[Any]], *, order: int, vocab_size: int, eos_id: int) -> list[Level]:
    """Count a text, the first token following ``eos_id``, and return the levels 1..order.

    No context reaches back past an ``eos_id``, which stands at its start as the sentence begin. n-grams of full length
    and n-grams behind a sentence begin count how often they occur, all others how many different tokens precede them
    (SRILM's ngram-count -kndiscount -interpolate, all minimum counts 1). Everything is computed in float64.
    """
    contexts, ngrams, occurrences = _count(tokens, order, vocab_size, eos_id)
    lower = [np.zeros(len(ngrams[0]), dtype=np.int64)]
    for k in range(1, order):
        shorter = contexts[k][ngrams[k] // vocab_size] // vocab_size * vocab_size + ngrams[k] % vocab_size
        lower.append(np.searchsorted(ngrams[k - 1], shorter))
    probs = np.full(1, 1.0 / vocab_size)
    levels = []
    for k in range(order):
        counts, context_G = occurrences[k], ngrams[k] // vocab_size
        if k + 1 < order:
            preceding = np.bincount(lower[k + 1], minlength=len(counts))
            begins = contexts[k][context_G] % vocab_size == eos_id if k else np.zeros(len(counts), dtype=np.bool_)
            counts = np.where(begins, counts, preceding)
        discounts_G = np.array((0.0, *discounts(counts)))[np.minimum(counts, 3)]
        total_C = np.bincount(context_G, weights=counts, minlength=len(contexts[k]))
        backoffs = np.bincount(context_G, weights=discounts_G, minlength=len(contexts[k])) / total_C
        probs = (counts - discounts_G) / total_C[context_G] + backoffs[context_G] * probs[lower[k]]
        tables = contexts[k], _log(backoffs), ngrams[k], _log(probs)
        levels.append(Level(*(torch.from_numpy(table) for table in tables)))
    return levels


def _log(probs: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.minimum(np.log(probs), 0.0).astype(np.float32)


def _count(
    tokens: NDArray[np.integer[Any]], order: int, vocab_size: int, eos_id: int
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """contexts_C and ngrams_G of each level as in Level, and how often each n-gram occurs."""
    text = np.concatenate([[eos_id], tokens]).astype(np.int64)
    index_N = np.arange(len(tokens), dtype=np.int64)
    available_N = index_N + 1 - np.maximum.accumulate(np.where(text[:-1] == eos_id, index_N, 0))
    context_N = np.zeros(len(tokens), dtype=np.int64)
    contexts, ngrams, occurrences = [np.zeros(1, dtype=np.int64)], [], []
    for k in range(order):
        if k:
            inside = available_N[index_N] >= k
            index_N, context_N = index_N[inside], context_N[inside]
            keys, context_N = np.unique(context_N * vocab_size + text[index_N - k + 1], return_inverse=True)
            contexts.append(keys)
        keys, number = np.unique(context_N * vocab_size + text[index_N + 1], return_counts=True)
        ngrams.append(keys)
        occurrences.append(number)
    return contexts, ngrams, occurrences


def discounts(counts: NDArray[np.int64]) -> tuple[float, float, float]:
    """D(1), D(2) and D(3 and more) from the numbers of n-grams counted once to four times."""
    n1, n2, n3, n4 = (int(n) for n in np.bincount(np.minimum(counts, 5), minlength=6)[1:5])
    if min(n1, n2, n3, n4) == 0:
        return FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    found = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
    return found if all(0 < d < i for i, d in enumerate(found, 1)) else FALLBACK_DISCOUNTS
