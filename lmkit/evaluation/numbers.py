"""All numbers of one scored text, from one sum of nats, and how certain they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmkit.errors import DataError, LmkitError
from lmkit.evaluation.plan import Indices, Windows
from lmkit.evaluation.protocols import Material, Protocol, Source
from lmkit.evaluation.scoring import TokenScores, exp, ratios
from lmkit.tokenizers.lines import line_enders, newlines

Floats = NDArray[np.float64]

MAX_UNITS = 20_000
"""Neighbouring units are joined until there are at most so many: resampling more changes no digit."""
ENOUGH_DOCUMENTS = 30
"""With fewer documents than this, lines are resampled."""
MAX_READ_BYTES = 20_000_000
"""Larger texts are not read again for the words of their lines."""


@dataclass(frozen=True)
class Units:
    """What is resampled: parts of the text with their nats and what these are divided by. U units."""

    name: str
    nats_U: Floats
    counts_U: Floats


@dataclass(frozen=True)
class Interval:
    """A percentile interval of a bootstrap."""

    low: float
    high: float
    level: float
    resamples: int
    unit: str
    num_units: int


def summary(
    scores: TokenScores,
    material: Material,
    source: Source,
    protocol: Protocol,
    windows: Windows,
    *,
    has_accuracy: bool = True,
) -> dict[str, Any]:
    """Every number that the scores define, under the names that scripts depend on; None where they define none.

    ppl = exp(nats / count). word_ppl counts words and ends of line, word_ppl_eos_not_counted words alone with the same
    nats; the ``without_`` numbers restrict both nats and count. Words, bytes and characters are those of the original
    text, so their numbers need every token of it scored. Raises DataError if none was.
    """
    nats_N, tokenizer = scores.nats_N, source.tokenizer
    scored_N = scores.scored_N
    num_tokens, nats = int(scored_N.sum()), float(np.nansum(nats_N, dtype=np.float64))
    if num_tokens == 0:
        raise DataError(
            f"protocol={protocol.name} scores no token of {source.name} {source.split_name}", "use another protocol"
        )
    everything = num_tokens == len(nats_N)
    is_eos_N = scored_N & (material.tokens == tokenizer.eos_id)
    is_unk_N = scored_N & (material.tokens == (-1 if tokenizer.unk_id is None else tokenizer.unk_id))
    per_word = everything or tokenizer.ends_lines
    words = material.num_words if everything else int((scored_N & ~is_eos_N).sum())
    lines = material.num_lines if everything else int(is_eos_N.sum())
    num_bytes, num_chars = (material.num_bytes, material.num_chars) if everything else (None, None)
    head = protocol.headline(nats_N, windows, material)
    result: dict[str, Any] = {
        "ppl": _ppl(head.nats, head.count),
        "ppl_per": head.per,
        **ratios(nats, num_tokens, words + lines if per_word else None, num_bytes, num_chars),
        "word_ppl_eos_not_counted": _ppl(nats, words) if per_word else None,
        "byte_ppl": _ppl(nats, num_bytes or 0),
        "char_ppl": _ppl(nats, num_chars or 0),
        "accuracy": int(scores.correct_N.sum()) / num_tokens if has_accuracy else None,
        "nats": nats,
        "num_tokens": num_tokens,
        "num_tokens_left_out": len(nats_N) - num_tokens,
        "num_words": words + lines if per_word else None,
        "num_lines": lines if per_word else None,
        "num_bytes": num_bytes,
        "num_chars": num_chars,
        "num_unk": int(is_unk_N.sum()),
        "eos": _part(nats_N, is_eos_N, num_tokens, nats),
        "unk": _part(nats_N, is_unk_N, num_tokens, nats),
    }
    for name, mask_N in (("eos", ~is_eos_N), ("unk", ~is_unk_N), ("eos_and_unk", ~is_eos_N & ~is_unk_N)):
        kept_N = scored_N & mask_N
        result[f"token_ppl_without_{name}"] = _ppl(float(nats_N[kept_N].sum(dtype=np.float64)), int(kept_N.sum()))
    return result


def _part(nats_N: NDArray[np.float32], mask_N: NDArray[np.bool_], num_tokens: int, nats: float) -> dict[str, Any]:
    """Share and cost of one kind of token."""
    count, cost = int(mask_N.sum()), float(nats_N[mask_N].sum(dtype=np.float64))
    return {
        "count": count,
        "share_of_tokens": count / num_tokens,
        "nats": cost,
        "share_of_nats": cost / nats if 0 < nats < math.inf else 0.0,
        "ppl": _ppl(cost, count),
    }


def _ppl(nats: float, count: float) -> float | None:
    return exp(nats / count) if count else None


def units_of(
    scores: TokenScores, material: Material, source: Source, count: float, weights_N: Floats | None = None
) -> Units:
    """Documents if there are enough, else lines, with the counts that the protocol's number divides by.

    ``count``: the sum that the counts must have. ``weights_N``: what the nats of each token are multiplied by (see
    Protocol.weights); None: 1. Where the number is not per word, or the words of a part are not known, its count is in
    proportion to the weights of its scored tokens. Parts of which nothing counts are no units.
    """
    weights_N = np.where(scores.scored_N, 1.0 if weights_N is None else weights_N, 0.0)
    documents = material.words_of_documents
    if len(documents) >= ENOUGH_DOCUMENTS:
        words_U = np.array(documents, dtype=np.float64)
        return _units("document", scores, weights_N, material.document_ends, words_U, count)
    name, ends_U = "document", material.document_ends
    if len(ends_U) < ENOUGH_DOCUMENTS:
        name, ends_U = "line", np.flatnonzero(line_enders(source.tokenizer)[material.tokens]) + 1
        if not source.tokenizer.ends_lines:  # the end of a document belongs to its last line
            ends_U = ends_U + np.isin(ends_U, np.flatnonzero(material.tokens == source.tokenizer.eos_id))
        if len(ends_U) == 0 or ends_U[-1] != len(material.tokens):
            ends_U = np.append(ends_U, len(material.tokens))
    return _units(name, scores, weights_N, ends_U, _words_of(ends_U, material, source, count), count)


def _words_of(ends_U: Indices, material: Material, source: Source, count: float) -> Floats | None:
    """Words and ends of line of each part, by the lines of the text that its tokens end; None where these are not what
    is counted, where each token is one of them, or where tokens and text do not agree about the lines."""
    tokenizer, total = source.tokenizer, material.num_words + material.num_lines
    if tokenizer.ends_lines or not math.isclose(count, total) or material.num_bytes > MAX_READ_BYTES:
        return None
    lines_U = np.append(0, np.cumsum(newlines(tokenizer)[material.tokens]))[ends_U]
    try:
        text = source.read()
    except LmkitError:  # what was prepared may outlast it
        return None
    words_L = np.array([len(line.split()) + 1 for line in text.split("\n")[:-1]], dtype=np.float64)
    if len(words_L) != lines_U[-1] or words_L.sum() != total:
        return None
    words_U: Floats = np.diff(np.append(0, np.cumsum(words_L))[lines_U], prepend=0.0)
    return words_U


def _units(
    name: str, scores: TokenScores, weights_N: Floats, ends_U: Indices, counts_U: Floats | None, count: float
) -> Units:
    if len(ends_U) > MAX_UNITS:
        chosen = np.linspace(0, len(ends_U), MAX_UNITS + 1).astype(np.int64)[1:] - 1
        if counts_U is not None:
            counts_U = np.diff(np.append(0, np.cumsum(counts_U)[chosen]))
        ends_U = ends_U[chosen]
        name = f"joined {name}"
    unit_N = np.repeat(np.arange(len(ends_U)), np.diff(ends_U, prepend=0))
    nats_N = np.where(weights_N > 0, scores.nats_N, 0).astype(np.float64) * weights_N
    nats_U: Floats = np.bincount(unit_N, nats_N, len(ends_U)).astype(np.float64)
    weights_U: Floats = np.bincount(unit_N, weights_N, len(ends_U)).astype(np.float64)
    if counts_U is None:
        counts_U = weights_U * (count / weights_U.sum())
    kept_U = (weights_U > 0) | (counts_U > 0)
    return Units(name, nats_U[kept_U], counts_U[kept_U])


def bootstrap(units: Units, resamples: int, seed: int, level: float = 0.95) -> Interval | None:
    """Percentile interval of exp(sum of nats / sum of counts) over resampled units (Efron & Tibshirani 1993, 13.3).

    None with fewer than two units or no resamples.
    """
    num_units = len(units.nats_U)
    if resamples < 1 or num_units < 2:
        return None
    sums_R2 = resampled(np.stack([units.nats_U, units.counts_U]), resamples, seed)
    low, high = percentiles(sums_R2[:, 0] / sums_R2[:, 1], level)
    return Interval(exp(low), exp(high), level, resamples, units.name, num_units)


def resampled(sums_KU: Floats, resamples: int, seed: int) -> Floats:
    """(R, K) sums over U units drawn with replacement, the same draw for each of the K quantities (may be infinite)."""
    rng = np.random.default_rng(seed)
    num_units = sums_KU.shape[1]
    infinite_KU = np.isposinf(sums_KU)
    finite_KU = np.where(infinite_KU, 0.0, sums_KU)
    sums_RK = np.empty((resamples, len(sums_KU)))
    for sums_K in sums_RK:
        times_U = np.bincount(rng.integers(num_units, size=num_units), minlength=num_units)
        sums_K[:] = np.where(infinite_KU @ times_U > 0, np.inf, finite_KU @ times_U)
    return sums_RK


def percentiles(values_R: Floats, level: float = 0.95) -> tuple[float, float]:
    """The middle ``level`` of the values."""
    low, high = np.quantile(values_R, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)
