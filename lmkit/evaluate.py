"""Perplexity: every token of a text is scored exactly once, sums travel, means are taken once at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmkit.device import Device
from lmkit.errors import ConfigError, DivergedError
from lmkit.models.base import LanguageModel
from lmkit.prepared import Split

Tokens = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class TokenScores:
    """One value per token of the text, in its order."""

    nats_N: NDArray[np.float32]
    """Negative log-likelihood of each token in nats."""
    correct_N: NDArray[np.bool_]
    """Whether the token was the most probable one."""


@dataclass(frozen=True)
class Tally:
    """Sums over a text."""

    nats: float
    """Negative log-likelihood of the whole text, nats, summed in float64."""
    num_tokens: int
    num_correct: int
    seconds: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.num_tokens


def perplexity(
    model: LanguageModel,
    tokens: Tokens,
    eos_id: int,
    *,
    carries_state: bool,
    context: int,
    stride: int,
    seq_len: int,
    batch_size: int,
    device: Device,
    progress: Callable[[int], None] | None = None,
) -> Tally:
    """Score a whole text; see score_stream for how. Returns sums."""
    start = time.monotonic()
    if carries_state:
        scores = score_carried(model, tokens, eos_id, seq_len=seq_len, device=device, progress=progress)
    else:
        scores = score_windows(
            model,
            tokens,
            eos_id,
            context=context,
            stride=stride,
            batch_size=batch_size,
            device=device,
            progress=progress,
        )
    nats = float(scores.nats_N.sum(dtype=np.float64))
    return Tally(nats, len(tokens), int(scores.correct_N.sum()), time.monotonic() - start)


@torch.inference_mode()
def score_carried(
    model: LanguageModel,
    tokens: Tokens,
    eos_id: int,
    *,
    seq_len: int,
    device: Device,
    progress: Callable[[int], None] | None = None,
) -> TokenScores:
    """Read the text once from start to end with carried state, ``seq_len`` tokens at a time.

    Each token is conditioned on all tokens before it, the first on ``eos_id``. ``seq_len`` changes the speed only.
    """
    _check(tokens, model)
    out = _Scores(len(tokens))
    inputs, targets = _shifted(tokens, eos_id)
    was_training = model.training
    model.eval()
    state: Any = None
    for begin in range(0, len(tokens), seq_len):
        piece = slice(begin, begin + seq_len)
        with device.autocast():
            hidden_BTD, state = model(inputs[None, piece].to(device.torch_device), state, use_state=True)
            scores = model.head.score(hidden_BTD.flatten(0, 1), targets[piece].to(device.torch_device))
        out.put(np.arange(begin, min(begin + seq_len, len(tokens))), scores.nats_N, scores.correct_N)
        if progress is not None:
            progress(min(begin + seq_len, len(tokens)))
    model.train(was_training)
    return out.finish()


@torch.inference_mode()
def score_windows(
    model: LanguageModel,
    tokens: Tokens,
    eos_id: int,
    *,
    context: int,
    stride: int,
    batch_size: int,
    device: Device,
    progress: Callable[[int], None] | None = None,
) -> TokenScores:
    """Slide a window of ``context`` tokens over the text, ``stride`` tokens at a time.

    Window k reads the inputs from k * stride on; it scores the tokens that no earlier window has scored, so that each
    is scored once: the first window all its tokens, every later one its last ``stride``. A scored token therefore has
    at least context - stride predecessors (fewer only at the start of the text) and at most context. ``batch_size``
    changes the speed only.
    """
    _check(tokens, model)
    if not 1 <= stride <= context:
        raise ConfigError(f"stride={stride} must be between 1 and context={context}")
    if model.context is not None and context > model.context:
        raise ConfigError(f"context={context} is longer than the model's context of {model.context}", "lower it")
    out = _Scores(len(tokens))
    inputs, targets = _shifted(tokens, eos_id)
    was_training = model.training
    model.eval()
    num_windows = 1 + max(0, -(-(len(tokens) - context) // stride))
    for first in range(0, num_windows, batch_size):
        starts_B = np.arange(first, min(first + batch_size, num_windows)) * stride
        ends_B = np.minimum(starts_B + context, len(tokens))
        width = int((ends_B - starts_B).max())
        positions_BT = starts_B[:, None] + np.arange(width)
        scored_from_B = np.where(starts_B == 0, 0, starts_B + context - stride)
        wanted_BT = (positions_BT >= scored_from_B[:, None]) & (positions_BT < ends_B[:, None])
        safe_BT = np.minimum(positions_BT, len(tokens) - 1)
        mask_BT = torch.from_numpy(wanted_BT).to(device.torch_device)
        with device.autocast():
            hidden_BTD, _ = model(inputs[safe_BT].to(device.torch_device))
            scores = model.head.score(hidden_BTD[mask_BT], targets[safe_BT].to(device.torch_device)[mask_BT])
        out.put(positions_BT[wanted_BT], scores.nats_N, scores.correct_N)
        if progress is not None:
            progress(int(ends_B[-1]))
    model.train(was_training)
    return out.finish()


class _Scores:
    """Collects the scores of a text and proves that each token was scored exactly once, by a finite number."""

    def __init__(self, num_tokens: int) -> None:
        self.nats_N = np.full(num_tokens, np.nan, dtype=np.float32)
        self.correct_N = np.zeros(num_tokens, dtype=np.bool_)
        self.num_put = 0

    def put(self, positions: NDArray[np.integer[Any]], nats: torch.Tensor, correct: torch.Tensor) -> None:
        self.nats_N[positions] = nats.float().cpu().numpy()
        self.correct_N[positions] = correct.cpu().numpy()
        self.num_put += len(positions)

    def finish(self) -> TokenScores:
        if self.num_put != len(self.nats_N):
            raise RuntimeError(f"{self.num_put} scores for {len(self.nats_N)} tokens")
        bad = np.flatnonzero(~np.isfinite(self.nats_N))
        if len(bad):
            raise DivergedError(
                f"the score of token {bad[0]} is {self.nats_N[bad[0]]} ({len(bad)} of {len(self.nats_N)} not finite)",
                "the model has diverged: use an earlier checkpoint, or retrain with a lower optimizer.lr",
            )
        return TokenScores(self.nats_N, self.correct_N)


def _shifted(tokens: Tokens, eos_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, int64: each token is predicted from the one before it, the first from ``eos_id``."""
    targets = torch.from_numpy(np.asarray(tokens).astype(np.int64))
    return torch.cat([torch.tensor([eos_id]), targets[:-1]]), targets


def _check(tokens: Tokens, model: LanguageModel) -> None:
    if len(tokens) == 0:
        raise ConfigError("the text to score is empty", "choose another split or dataset")
    if int(tokens.max()) >= model.vocab_size:
        raise ConfigError(f"token id {int(tokens.max())} is outside the model's vocabulary of {model.vocab_size}")


def summarize(tally: Tally, split: Split) -> dict[str, Any]:
    """The numbers of a scored split under the names that scripts depend on.

    word_ppl = exp(nats / words), words being those of the original text plus one end of line each, whatever the
    tokenizer; token_ppl = exp(nats / tokens); bits_per_byte = nats / (bytes ln 2); accuracy: share of tokens that were
    the most probable one.
    """
    return {
        "word_ppl": _exp(tally.nats / split.num_words),
        "token_ppl": _exp(tally.nats / tally.num_tokens),
        "bits_per_byte": tally.nats / split.num_bytes / math.log(2),
        "bits_per_char": tally.nats / split.num_chars / math.log(2),
        "nats": tally.nats,
        "num_tokens": tally.num_tokens,
        "num_words": split.num_words,
        "num_bytes": split.num_bytes,
        "num_chars": split.num_chars,
        "num_unk": split.num_unk,
        "accuracy": tally.num_correct / tally.num_tokens,
        "eval_seconds": tally.seconds,
    }


def _exp(nats: float) -> float:
    """exp, infinite where it overflows."""
    return math.exp(nats) if nats < 700 else math.inf
