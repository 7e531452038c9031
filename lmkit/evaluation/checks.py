"""Proofs that run with every evaluation, on a small sample: a number that fails one of them is not printed.

That each token is scored exactly once and by a finite number is proved for the whole text by scoring.ScoreSheet.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmkit.config.machine import Precision
from lmkit.device import Device
from lmkit.errors import CheckpointError, ConfigError
from lmkit.evaluation.plan import NO_PREFIX, Indices, Tokens, Windows
from lmkit.evaluation.scoring import mode, score
from lmkit.ids import check_ids, check_text, file_of
from lmkit.models.base import LanguageModel, Scores

SAMPLE_SHARE = 0.004
"""Share of the scored tokens that are scored again."""
MIN_SAMPLE, MAX_WINDOW, MAX_WINDOWS = 64, 256, 8
"""The sample has about so many tokens at least, in at most so many windows, or pieces of them of at most this length.

Scored one by one, a short window takes several times its share of the time.
"""
ROWS = 8
"""One position in so many has its whole distribution looked at; as many are compared before a change of the future."""
MIN_LINE = 8
"""Tokens of the shortest line that counts as an overlap of train and test."""


@dataclass(frozen=True)
class Checked:
    """What the proofs found; largest differences in nats."""

    batch_difference: float
    """Between a sample scored together and one by one."""
    softmax_difference: float
    """Between a token's nats and those from the logits of the whole vocabulary."""
    leak: float
    """Of what is known before a token, when it and everything after it changes. 0: no leak."""
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON data."""
        return dict(vars(self))


def prove(
    model: LanguageModel, tokens: Tokens, windows: Windows, *, seq_len: int, batch_size: int, device: Device, seed: int
) -> Checked:
    """Look for leaks, score a sample in two ways and sum softmaxes. Raises CheckpointError for what does not hold."""
    start = time.monotonic()
    exact = 0.02 if device.torch_device.type == "cuda" else 2e-3  # products of fp32 are made in TF32, of some shapes
    sample = sample_windows(windows, model.context is None)
    length = min(MAX_WINDOW, max(MIN_SAMPLE, 2 * sample_size(windows) // 5))
    leak = look_for_leak(model, tokens, windows, length=length, device=device, seed=seed)
    _require(leak <= exact, f"the model sees the future: changing later tokens moved what is before by {leak:.3g}")
    half = device.precision is not Precision.fp32
    batch, apart = _scored_twice(model, tokens, sample, seq_len, batch_size, device)
    _require_alike(batch, 0.2 if half else exact)  # vectors of half precision depend on the shape that they come from
    _require(apart <= exact, f"the softmax does not sum to one: scores differ by {apart:.3g} nats from the logits")
    if half:
        fp32 = replace(device, precision=Precision.fp32)
        _require_alike(_scored_twice(model, tokens, sample, seq_len, batch_size, fp32)[0], exact)
    return Checked(batch, apart, leak, time.monotonic() - start)


def _scored_twice(
    model: LanguageModel, tokens: Tokens, sample: Windows, seq_len: int, batch_size: int, device: Device
) -> tuple[float, float]:
    """Largest difference, in nats, of a sample scored together and one by one; and of its scores and logits."""
    together = score(model, tokens, sample, seq_len=seq_len, batch_size=max(batch_size, 2), device=device)
    softmax = _SoftmaxCheck(model)
    piece = max(1, min(seq_len, sample.longest) // 2) if model.context is None else seq_len
    alone = score(model, tokens, sample, seq_len=piece, batch_size=1, device=device, scorer=softmax.scorer)
    scored_N = together.scored_N
    batch = float(np.abs(together.nats_N[scored_N] - alone.nats_N[scored_N]).max())
    return batch, softmax.difference(device)


def sample_windows(windows: Windows, unbounded: bool) -> Windows:
    """Two to MAX_WINDOWS windows, where there are so many, spread over the text, for about SAMPLE_SHARE of its tokens.

    All tokens of a window count, also those that are only context in the whole text. Pieces of windows are taken, each
    from an empty state, where two whole ones would be more than that: of the long windows of models without a context
    of their own, and of short texts.
    """
    windows = windows.take(windows.scored_W < windows.ends_W)
    wanted = sample_size(windows)
    per_window = max(1, int((windows.ends_W - windows.begins_W).mean()))
    if (unbounded and windows.longest > MAX_WINDOW) or 2 * per_window > wanted:
        number = min(MAX_WINDOWS, max(2, wanted // MAX_WINDOW))
        return _pieces(windows, number, min(MAX_WINDOW, wanted // number))
    number = min(MAX_WINDOWS, max(2, wanted // per_window))
    return _each_token_once(windows.take(_spread(len(windows.begins_W), number)))


def sample_size(windows: Windows) -> int:
    """How many of the scored tokens are about right to score again."""
    return max(MIN_SAMPLE, int(SAMPLE_SHARE * windows.num_scored))


def _pieces(windows: Windows, number: int, length: int) -> Windows:
    """Of what the windows read, ``number`` pieces of at most ``length`` tokens."""
    slots_W = np.maximum(1, (windows.ends_W - windows.begins_W) // length)
    first_W = np.cumsum(slots_W) - slots_W
    chosen = _spread(int(slots_W.sum()), number)
    w = np.searchsorted(first_W, chosen, side="right") - 1
    begins_W = windows.begins_W[w] + (chosen - first_W[w]) * length
    prefix_W = np.where(begins_W == windows.begins_W[w], windows.prefix_W[w], NO_PREFIX)
    ends_W = np.minimum(begins_W + length, windows.ends_W[w])
    return _each_token_once(Windows(begins_W, begins_W, ends_W, prefix_W))


def _each_token_once(windows: Windows) -> Windows:
    """The windows in the order of the text; what an earlier one has scored is only context in a later one."""
    windows = windows.take(np.argsort(windows.begins_W, kind="stable"))
    before_W = np.maximum.accumulate(np.append(0, windows.ends_W[:-1]))
    scored_W = np.maximum(windows.begins_W, before_W)
    windows = Windows(windows.begins_W, scored_W, windows.ends_W, windows.prefix_W)
    return windows.take(scored_W < windows.ends_W)


def _spread(length: int, number: int) -> Indices:
    return np.linspace(0, length - 1, min(number, length)).astype(np.int64)


class _SoftmaxCheck:
    """Scores by the head, and compares those of a few rows of each call with the logits of the whole vocabulary."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def scorer(self, hidden_ND: Tensor, targets_N: Tensor, positions_N: Indices) -> Scores:
        scores = self.model.head.score(hidden_ND, targets_N)
        rows = torch.from_numpy(_spread(len(targets_N), max(1, len(targets_N) // ROWS))).to(targets_N.device)
        self.rows.append((hidden_ND[rows], targets_N[rows], scores.nats_N[rows]))
        return scores

    @torch.inference_mode()
    def difference(self, device: Device) -> float:
        """The largest, in nats; infinite where something is not finite."""
        largest = 0.0
        hidden_ND, targets_N, nats_N = (torch.cat(parts) for parts in zip(*self.rows, strict=True))
        with mode(self.model, training=False), device.autocast():
            for start in range(0, len(nats_N), ROWS):
                some = slice(start, start + ROWS)
                logs_RV = torch.log_softmax(self.model.head.logits(hidden_ND[some]), 1)
                apart_R = -logs_RV.gather(1, targets_N[some, None]).squeeze(1) - nats_N[some]
                difference = float(apart_R.abs().max())
                largest = max(largest, difference if math.isfinite(difference) else math.inf)
        return largest


@torch.inference_mode()
def look_for_leak(
    model: LanguageModel, tokens: Tokens, windows: Windows, *, length: int, device: Device, seed: int
) -> float:
    """Largest change of log-probabilities before a position when the tokens from there on change; 0 is causal.

    Looks at the first ``length`` inputs of the longest window, at two neighbouring places in their
    middle: a model that sees the rest of a block of tokens shows nothing where a block begins. A position's own target
    counts as its future.
    """
    chosen = int((windows.ends_W - windows.begins_W).argmax())
    begin, end = int(windows.begins_W[chosen]), int(windows.ends_W[chosen])
    end = min(end, begin + length)
    if end - begin < 2 or model.vocab_size < 2:
        return 0.0
    prefix = int(windows.prefix_W[chosen])
    inputs = np.concatenate([[tokens[begin - 1] if prefix == NO_PREFIX else prefix], tokens[begin : end - 1]])
    inputs = inputs.astype(np.int64)
    shift = np.random.default_rng(seed).integers(1, model.vocab_size, len(inputs))
    middle = len(inputs) // 2
    rows, leak = slice(max(0, middle - ROWS), middle + 1), 0.0
    with mode(model, training=False):
        logs_RV = _log_probs(model, inputs, rows, device)
        for place in (middle, middle + 1):
            changed = inputs.copy()
            changed[place:] = (inputs[place:] + shift[place:]) % model.vocab_size
            moved_RV = (_log_probs(model, changed, rows, device) - logs_RV)[: place - rows.start].abs()
            difference = float(moved_RV.max())
            leak = max(leak, difference if math.isfinite(difference) else math.inf)
    return leak


def _log_probs(model: LanguageModel, inputs: NDArray[np.int64], rows: slice, device: Device) -> Tensor:
    with device.autocast():
        hidden_BTD, _ = model(torch.from_numpy(inputs[None]).to(device.torch_device))
        return torch.log_softmax(model.head.logits(hidden_BTD[0, rows]), 1).clamp_(min=-1e3)


def check_vocabulary(model: LanguageModel, tokens: Tokens, where: str) -> None:
    """Raise ConfigError for a token that the model does not know, DataError if it comes from a file of tokens."""
    if file_of(tokens) is not None:
        check_text(tokens, model.vocab_size)
    if len(tokens) and int(tokens.max()) >= model.vocab_size:
        raise ConfigError(
            f"{where} holds token {int(tokens.max())}, the model knows {model.vocab_size}",
            "prepare the text with the run's tokenizer",
        )


@dataclass(frozen=True)
class Overlap:
    """How much of a text also stands in train, line by line."""

    num_lines: int
    """Lines of at least MIN_LINE tokens."""
    num_seen: int
    """Those of them that are also a line of train."""
    share_of_tokens: float
    """Of the tokens in such lines, the share that is in lines seen."""

    def as_dict(self) -> dict[str, Any]:
        """JSON data."""
        return dict(vars(self))


def overlap(train: Tokens, tokens: Tokens, ends_line_V: Sequence[bool] | NDArray[np.bool_]) -> Overlap:
    """Lines of a text that are also in train, compared by 64-bit hashes of their tokens."""
    ends_V = np.asarray(ends_line_V, dtype=np.bool_)
    lines = line_hashes(tokens, ends_V)
    in_train = line_hashes(train, ends_V, only=lines)
    long_enough = lines.lengths >= MIN_LINE
    known = _are_among(lines.hashes[long_enough], in_train.hashes[in_train.lengths >= MIN_LINE])
    counted = lines.lengths[long_enough]
    share = float(counted[known].sum() / counted.sum()) if len(counted) else 0.0
    return Overlap(len(counted), int(known.sum()), share)


@dataclass(frozen=True)
class LineHashes:
    """Per line of a text, (lines,) each."""

    hashes: NDArray[np.uint64]
    """Of all its tokens: equal lines have equal ones, different lines different ones but for 2^-64."""
    heads: NDArray[np.uint64]
    """Of its length and first two tokens."""
    lengths: NDArray[np.int64]
    """Tokens."""


def line_hashes(
    tokens: Tokens, ends_line_V: NDArray[np.bool_], chunk: int = 1 << 22, only: LineHashes | None = None
) -> LineHashes:
    """Hashes of the lines of a text, ``chunk`` tokens or more at a time; with ``only``, of those with a head among its.

    hash = sum over its tokens of r(token) (2 i + 1)^3 mod 2^64 with i the place in the line and r a random odd number.
    """
    random_V = np.random.default_rng(0).integers(0, 1 << 63, len(ends_line_V), dtype=np.uint64) | np.uint64(1)
    found = [LineHashes(np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.int64))]
    begin = 0
    while begin < len(tokens):
        piece = np.asarray(tokens[begin : begin + chunk])
        check_ids(piece, len(ends_line_V), tokens, range(begin, begin + len(piece)))
        ends = np.flatnonzero(ends_line_V[piece]) + 1
        if begin + len(piece) == len(tokens):
            ends = ends if len(ends) and ends[-1] == len(piece) else np.append(ends, len(piece))
        elif len(ends) == 0:
            chunk *= 2
            continue
        starts = np.append(0, ends[:-1])
        lengths = ends - starts
        second = piece[np.minimum(starts + 1, ends - 1)]
        heads = (random_V[piece[starts]] * np.uint64(3) + random_V[second]) * (2 * lengths + 1).astype(np.uint64)
        if only is not None:
            kept = _are_among(heads, only.heads)
            starts, lengths, heads = starts[kept], lengths[kept], heads[kept]
        found.append(LineHashes(_hashes(piece, starts, lengths, random_V), heads, lengths))
        begin += int(ends[-1])
    return LineHashes(
        np.concatenate([one.hashes for one in found]),
        np.concatenate([one.heads for one in found]),
        np.concatenate([one.lengths for one in found]),
    )


def _are_among(values: NDArray[np.uint64], pool: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Like numpy.isin, at a tenth of its time for few values in the pool."""
    if len(pool) == 0:
        return np.zeros(len(values), np.bool_)
    pool = np.sort(pool)
    found: NDArray[np.bool_] = pool[np.minimum(np.searchsorted(pool, values), len(pool) - 1)] == values
    return found


def _hashes(piece: Tokens, starts: Indices, lengths: Indices, random_V: NDArray[np.uint64]) -> NDArray[np.uint64]:
    if len(starts) == 0:
        return np.zeros(0, np.uint64)
    first = np.cumsum(lengths) - lengths
    place = np.arange(int(lengths.sum())) - np.repeat(first, lengths)
    tokens = piece[np.repeat(starts, lengths) + place]
    terms = random_V[tokens] * (2 * place + 1).astype(np.uint64) ** np.uint64(3)
    sums: NDArray[np.uint64] = np.add.reduceat(terms, first)
    return sums


def _require_alike(difference: float, tolerance: float) -> None:
    _require(
        difference <= tolerance,
        f"a sample scored one by one differs by {difference:.3g} nats from the same in batches",
    )


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise CheckpointError(problem, "its perplexity cannot be trusted: look for the error in the model")
