"""All numbers of one scored text, from one sum of nats, and how certain they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmkit.evaluation.plan import Indices, Windows
from lmkit.evaluation.protocols import Material, Protocol, Source, line_enders
from lmkit.evaluation.scoring import TokenScores, exp

Floats = NDArray[np.float64]

MAX_UNITS = 20_000
"""Neighbouring units are joined until there are at most so many: resampling more changes no digit."""
ENOUGH_DOCUMENTS = 30
"""With fewer documents than this, lines are resampled."""


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
    text, so their numbers need every token of it scored.
    """
    nats_N, tokenizer = scores.nats_N, source.tokenizer
    scored_N = scores.scored_N
    num_tokens, nats = int(scored_N.sum()), float(np.nansum(nats_N, dtype=np.float64))
    everything = num_tokens == len(nats_N)
    is_eos_N = scored_N & (material.tokens == tokenizer.eos_id)
    is_unk_N = scored_N & (material.tokens == (-1 if tokenizer.unk_id is None else tokenizer.unk_id))
    per_word = everything or tokenizer.ends_lines
    words = material.num_words if everything else int((scored_N & ~is_eos_N).sum())
    lines = material.num_lines if everything else int(is_eos_N.sum())
    head = protocol.headline(nats_N, windows, material)
    result: dict[str, Any] = {
        "ppl": _ppl(head.nats, head.count),
        "ppl_per": head.per,
        "word_ppl": _ppl(nats, words + lines) if per_word else None,
        "word_ppl_eos_not_counted": _ppl(nats, words) if per_word else None,
        "token_ppl": _ppl(nats, num_tokens),
        "byte_ppl": _ppl(nats, material.num_bytes) if everything else None,
        "char_ppl": _ppl(nats, material.num_chars) if everything else None,
        "bits_per_byte": _bits(nats, material.num_bytes) if everything else None,
        "bits_per_char": _bits(nats, material.num_chars) if everything else None,
        "accuracy": int(scores.correct_N.sum()) / num_tokens if has_accuracy else None,
        "nats": nats,
        "num_tokens": num_tokens,
        "num_tokens_left_out": len(nats_N) - num_tokens,
        "num_words": words + lines,
        "num_lines": lines,
        "num_bytes": material.num_bytes if everything else None,
        "num_chars": material.num_chars if everything else None,
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
        "share_of_nats": cost / nats if nats else 0.0,
        "ppl": _ppl(cost, count),
    }


def _ppl(nats: float, count: float) -> float | None:
    return exp(nats / count) if count else None


def _bits(nats: float, count: int) -> float | None:
    return nats / count / math.log(2) if count else None


def units_of(scores: TokenScores, material: Material, source: Source, count: float) -> Units:
    """Documents if there are enough, else lines, with the counts that the protocol's number divides by.

    ``count``: the sum that the counts must have. Where the words of a part are not known, they are in proportion to its
    tokens.
    """
    documents = material.words_of_documents
    if len(documents) >= ENOUGH_DOCUMENTS:
        return _units("document", scores, material.document_ends, np.array(documents, dtype=np.float64), count)
    if len(material.document_ends) >= ENOUGH_DOCUMENTS:
        return _units("document", scores, material.document_ends, None, count)
    ends_U = np.flatnonzero(line_enders(source.tokenizer)[material.tokens]) + 1
    if len(ends_U) == 0 or ends_U[-1] != len(material.tokens):
        ends_U = np.append(ends_U, len(material.tokens))
    return _units("line", scores, ends_U, None, count)


def _units(name: str, scores: TokenScores, ends_U: Indices, counts_U: Floats | None, count: float) -> Units:
    if len(ends_U) > MAX_UNITS:
        chosen = np.linspace(0, len(ends_U), MAX_UNITS + 1).astype(np.int64)[1:] - 1
        if counts_U is not None:
            counts_U = np.diff(np.append(0, np.cumsum(counts_U)[chosen]))
        ends_U = ends_U[chosen]
        name = f"{name}s, neighbours joined"
    begins_U = np.append(0, ends_U)[:-1]
    nats_U = np.add.reduceat(np.nan_to_num(scores.nats_N.astype(np.float64)), begins_U)
    if counts_U is None:
        tokens_U = np.add.reduceat(scores.scored_N.astype(np.float64), begins_U)
        counts_U = tokens_U * (count / tokens_U.sum())
    return Units(name, nats_U, counts_U)


def bootstrap(units: Units, resamples: int, seed: int, level: float = 0.95) -> Interval | None:
    """Percentile interval of exp(sum of nats / sum of counts) over resampled units (Efron & Tibshirani 1993, 13.3).

    None with fewer than two units or no resamples.
    """
    num_units = len(units.nats_U)
    if resamples < 1 or num_units < 2:
        return None
    ratios_R = resampled(np.stack([units.nats_U, units.counts_U]), resamples, seed)
    ppl_R = np.exp(np.minimum(ratios_R[:, 0] / ratios_R[:, 1], 700))
    low, high = np.quantile(ppl_R, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, resamples, units.name, num_units)


def resampled(sums_KU: Floats, resamples: int, seed: int) -> Floats:
    """(R, K) sums over U units drawn with replacement, the same draw for each of the K quantities."""
    rng = np.random.default_rng(seed)
    num_units = sums_KU.shape[1]
    draws_R = [np.bincount(rng.integers(num_units, size=num_units), minlength=num_units) for _ in range(resamples)]
    return np.array([sums_KU @ counts for counts in draws_R])
