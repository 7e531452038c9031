"""Proofs that run with every evaluation, on a small sample: a number that fails one of them is not printed.

That each token is scored exactly once and by a finite number is proved for the whole text by scoring.ScoreSheet.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
from lmkit.models.base import LanguageModel, Scores

SAMPLE_SHARE = 0.004
"""Share of the scored tokens that are scored again."""
MIN_SAMPLE, MAX_WINDOW = 64, 256
ROWS = 8
"""Positions of a piece at which the whole distribution is looked at."""
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
    tolerance = 2e-3 if device.precision is Precision.fp32 else 0.2
    sample = sample_windows(windows, model.context is None)
    leak = look_for_leak(model, tokens, sample, device=device, seed=seed)
    _require(leak <= tolerance, f"the model sees the future: changing later tokens moved what is before by {leak:.3g}")
    together = score(model, tokens, sample, seq_len=seq_len, batch_size=max(batch_size, 2), device=device)
    softmax = _SoftmaxCheck(model)
    piece = max(1, min(seq_len, sample.longest) // 3) if model.context is None else seq_len
    alone = score(model, tokens, sample, seq_len=piece, batch_size=1, device=device, scorer=softmax.scorer)
    scored_N = together.scored_N
    batch = float(np.abs(together.nats_N[scored_N] - alone.nats_N[scored_N]).max())
    _require(batch <= tolerance, f"a sample scored one by one differs by {batch:.3g} nats from the same in batches")
    _require(
        softmax.difference <= tolerance,
        f"the softmax does not sum to one: scores differ by {softmax.difference:.3g} nats from the logits",
    )
    return Checked(batch, softmax.difference, leak, time.monotonic() - start)


def sample_windows(windows: Windows, unbounded: bool) -> Windows:
    """At least two windows, where there are so many, spread over the text with about SAMPLE_SHARE of its tokens.

    Of the long windows of models without a context of their own pieces are taken, each from an empty state, so that one
    over the whole text is not read twice.
    """
    windows = windows.take(windows.scored_W < windows.ends_W)
    wanted = max(MIN_SAMPLE, int(SAMPLE_SHARE * windows.num_scored))
    if unbounded and windows.longest > MAX_WINDOW:
        number = max(2, wanted // MAX_WINDOW)
        return _pieces(windows, number, min(MAX_WINDOW, wanted // number))
    per_window = max(1, windows.num_scored // len(windows.begins_W))
    return windows.take(_spread(len(windows.begins_W), max(2, wanted // per_window)))


def _pieces(windows: Windows, number: int, length: int) -> Windows:
    """Of what the windows score, ``number`` pieces of at most ``length`` tokens that do not overlap."""
    slots_W = np.maximum(1, (windows.ends_W - windows.scored_W) // length)
    first_W = np.cumsum(slots_W) - slots_W
    chosen = _spread(int(slots_W.sum()), number)
    w = np.searchsorted(first_W, chosen, side="right") - 1
    begins_W = windows.scored_W[w] + (chosen - first_W[w]) * length
    prefix_W = np.where(begins_W == windows.begins_W[w], windows.prefix_W[w], NO_PREFIX)
    return Windows(begins_W, begins_W, np.minimum(begins_W + length, windows.ends_W[w]), prefix_W)


def _spread(length: int, number: int) -> Indices:
    return np.unique(np.linspace(0, length - 1, min(number, length)).astype(np.int64))


class _SoftmaxCheck:
    """Scores by the head, and at a few rows of each call also by the logits of the whole vocabulary."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.difference = model, 0.0

    def scorer(self, hidden_ND: Tensor, targets_N: Tensor, positions_N: Indices) -> Scores:
        scores = self.model.head.score(hidden_ND, targets_N)
        rows = torch.from_numpy(_spread(len(targets_N), ROWS)).to(targets_N.device)
        logs_RV = torch.log_softmax(self.model.head.logits(hidden_ND[rows]).double(), 1)
        nats_R = -logs_RV.gather(1, targets_N[rows, None]).squeeze(1)
        difference = float((nats_R - scores.nats_N[rows].double()).abs().max())
        self.difference = max(self.difference, difference if math.isfinite(difference) else math.inf)
        return scores


@torch.inference_mode()
def look_for_leak(model: LanguageModel, tokens: Tokens, windows: Windows, *, device: Device, seed: int) -> float:
    """Largest change of log-probabilities before a position when the tokens from there on change; 0 is causal.

    Looks at one of the windows, at two neighbouring places in its middle: a model that sees the rest of a block of
    tokens shows nothing where a block begins. A position's own target counts as its future.
    """
    chosen = int((windows.ends_W - windows.begins_W).argmax())
    begin, end = int(windows.begins_W[chosen]), int(windows.ends_W[chosen])
    end = min(end, begin + MAX_WINDOW)
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
        return torch.log_softmax(model.head.logits(hidden_BTD[0, rows]).double(), 1).clamp_(min=-1e3)


def check_vocabulary(model: LanguageModel, tokens: Tokens, where: str) -> None:
    """Raise ConfigError for a token that the model does not know."""
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
    hashes, lengths = line_hashes(tokens, ends_V)
    train_hashes, train_lengths = line_hashes(train, ends_V)
    long_enough = lengths >= MIN_LINE
    known = np.isin(hashes[long_enough], train_hashes[train_lengths >= MIN_LINE])
    counted = lengths[long_enough]
    share = float(counted[known].sum() / counted.sum()) if len(counted) else 0.0
    return Overlap(len(counted), int(known.sum()), share)


def line_hashes(
    tokens: Tokens, ends_line_V: NDArray[np.bool_], chunk: int = 1 << 22
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """(lines,) hash and number of tokens of each line.

    hash = sum over its tokens of r(token) (2 i + 1)^3 mod 2^64 with i the place in the line and r a random odd number.
    """
    random_V = np.random.default_rng(0).integers(0, 1 << 63, len(ends_line_V), dtype=np.uint64) | np.uint64(1)
    hashes, lengths = [], []
    begin = 0
    while begin < len(tokens):
        piece = np.asarray(tokens[begin : begin + chunk])
        ends = np.flatnonzero(ends_line_V[piece]) + 1
        if begin + len(piece) == len(tokens):
            ends = np.unique(np.append(ends, len(piece)))
        elif len(ends) == 0:
            chunk *= 2
            continue
        piece = piece[: ends[-1]]
        starts = np.append(0, ends)[:-1]
        place = (np.arange(len(piece)) - np.repeat(starts, ends - starts)).astype(np.uint64)
        terms = random_V[piece] * (np.uint64(2) * place + np.uint64(1)) ** np.uint64(3)
        hashes.append(np.add.reduceat(terms, starts))
        lengths.append(ends - starts)
        begin += len(piece)
    if not hashes:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    return np.concatenate(hashes), np.concatenate(lengths)


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise CheckpointError(problem, "its perplexity cannot be trusted: look for the error in the model")
