"""BLEU of sampled sentences against real ones, and against each other. Counted by nltk, the extra ``lmkit[gan]``.

As in Texygen (Zhu et al. 2018): the mean over sentences of nltk's sentence BLEU of orders 2 to 5 with uniform weights
and its smoothing method 1, all references at once. Self-BLEU takes the other samples as references: high values mean
that the samples resemble each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from lmkit.errors import DataError, ResourceError

ORDERS = (2, 3, 4, 5)

Words = Sequence[str]


def bleu(samples: Sequence[Words], references: Sequence[Words]) -> dict[int, float]:
    """Order -> mean BLEU (0 to 1) of the samples. Raises DataError if there is nothing, ResourceError without nltk."""
    if not samples or not references:
        raise DataError("BLEU needs samples and references", "give at least one of each")
    return _mean([_sentence_bleu(sample, references) for sample in samples])


def self_bleu(samples: Sequence[Words]) -> dict[int, float]:
    """Order -> mean BLEU (0 to 1) of each sample against all others. Needs two; see ``bleu``."""
    if len(samples) < 2:
        raise DataError("self-BLEU needs at least two samples", "draw more")
    others = [[*samples[:i], *samples[i + 1 :]] for i in range(len(samples))]
    return _mean([_sentence_bleu(sample, rest) for sample, rest in zip(samples, others, strict=True)])


def _mean(rows: Sequence[Sequence[float]]) -> dict[int, float]:
    return {order: fmean(row[i] for row in rows) for i, order in enumerate(ORDERS)}


def _sentence_bleu(sample: Words, references: Sequence[Words]) -> list[float]:
    try:
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    except ImportError:
        raise ResourceError("BLEU is counted by nltk, which is not installed", "pip install 'lmkit[gan]'") from None
    if not sample:
        return [0.0] * len(ORDERS)
    weights = [tuple([1 / order] * order) for order in ORDERS]
    values = sentence_bleu(list(references), list(sample), weights, SmoothingFunction().method1)
    return [float(value) for value in values]
