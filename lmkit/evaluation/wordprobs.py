"""Probabilities of single tokens in files, one a line, and paired comparison of two models on the same text.

The layout is that of the files published with Herel & Mikolov 2023 (github.com/DavidHerel/sota_lm): one probability a
line, in the order of the text. Those files leave out the first token of the text, which is taken account of.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmkit.errors import DataError
from lmkit.evaluation.mixture import best_weights, mixed
from lmkit.evaluation.numbers import Units, percentiles, resampled
from lmkit.evaluation.scoring import exp

Nats = NDArray[np.float32]


def word_probs_text(nats_N: Nats) -> str:
    """The file of a scored text: exp(-nats) of every scored token with nine digits, one a line."""
    probs = np.exp(-nats_N[~np.isnan(nats_N)].astype(np.float64))
    return "".join(f"{p:.8E}\n" for p in probs.tolist())


def read_word_probs(path: Path) -> NDArray[np.float64]:
    """Nats of each line of a file of probabilities (0 to 1) or, if none is above 0, of natural logarithms of them.

    Raises DataError naming file and line.
    """
    try:
        with path.open("rb") as file:
            values = [_number(line, path, number) for number, line in enumerate(file, 1)]
    except OSError as error:
        raise DataError(f"cannot read compare={path}: {error.strerror or error}", "name a file or a run") from None
    array = np.array(values, dtype=np.float64)
    if len(array) == 0:
        raise DataError(f"compare={path} is empty", "name a file with one probability a line")
    if (array <= 0).all() and (array < 0).any():
        return -array
    bad = np.flatnonzero((array < 0) | (array > 1))
    if len(bad):
        raise DataError(
            f"compare={path}, line {bad[0] + 1}: {array[bad[0]]:g} is not a probability",
            "write one probability (0 to 1) or one natural logarithm (all at most 0) a line",
        )
    with np.errstate(divide="ignore"):
        return -np.log(array)


def _number(line: bytes, path: Path, number: int) -> float:
    try:
        value = float(line)
    except ValueError:
        value = float("nan")
    if np.isnan(value):
        text = line[:40].decode("utf-8", "replace").strip()
        raise DataError(f"compare={path}, line {number}: {text!r} is not a number", "write one probability a line")
    return value


def aligned(file_nats: NDArray[np.float64], scored_N: NDArray[np.bool_], path: Path) -> NDArray[np.float64]:
    """(N,) nats of a file at the tokens that are scored; NaN at the first where the file leaves it out.

    Raises DataError if the file is of another text.
    """
    nats_N = np.full(len(scored_N), np.nan)
    places = np.flatnonzero(scored_N)
    if len(file_nats) == len(places):
        nats_N[places] = file_nats
    elif len(file_nats) == len(places) - 1:
        nats_N[places[1:]] = file_nats
    else:
        raise DataError(
            f"compare={path} has {len(file_nats):,} lines, the text {len(places):,} scored tokens",
            "compare on the same text, tokens and protocol",
        )
    return nats_N


@dataclass(frozen=True)
class Comparison:
    """A against B on the same parts of the same text."""

    name: str
    ppl: float
    """Of A on the tokens that both scored."""
    other_ppl: float
    nats_per_count: float
    """Nats per word (or token) that A needs less than B; above 0: A is better."""
    low: float
    high: float
    """95 % interval of it over resampled units; NaN, as is ``better``, with one unit or no resamples."""
    better: float
    """Share of the resamples in which A is better."""
    unit: str
    num_units: int

    def as_dict(self) -> dict[str, Any]:
        """JSON data."""
        return dict(vars(self))


def compare_units(name: str, ours: Units, theirs: Units, resamples: int, seed: int) -> Comparison:
    """Paired bootstrap over units: each resample takes the same units of both (Koehn 2004)."""
    count = float(ours.counts_U.sum())
    low = high = better = float("nan")
    if resamples > 0 and len(ours.nats_U) > 1:
        sums_R3 = resampled(np.stack([ours.nats_U, theirs.nats_U, ours.counts_U]), resamples, seed)
        gain_R = (sums_R3[:, 1] - sums_R3[:, 0]) / sums_R3[:, 2]
        low, high = percentiles(gain_R)
        better = float((gain_R > 0).mean())
    return Comparison(
        name=name,
        ppl=exp(float(ours.nats_U.sum()) / count),
        other_ppl=exp(float(theirs.nats_U.sum()) / count),
        nats_per_count=float((theirs.nats_U.sum() - ours.nats_U.sum()) / count),
        low=low,
        high=high,
        better=better,
        unit=ours.name,
        num_units=len(ours.nats_U),
    )


def best_mixture(ours_N: Nats, theirs_N: NDArray[np.floating[Any]]) -> tuple[float, Nats]:
    """Weight of the other model in the best mixture on this text, and the mixture's nats; NaN where one has none."""
    weights = best_weights([ours_N, theirs_N])
    return weights[1], mixed([ours_N, theirs_N], weights)
