"""Perplexity: every token of a text is scored exactly once, sums travel, means are taken once at the end."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmkit.data.prepared import Split
from lmkit.device import Device
from lmkit.errors import ConfigError, DivergedError
from lmkit.models.base import LanguageModel, Scores

Tokens = NDArray[np.integer[Any]]
Positions = NDArray[np.integer[Any]]


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
    """The sums over ``score_stream``, and how long it took."""
    start = time.monotonic()
    scores = score_stream(
        model,
        tokens,
        eos_id,
        carries_state=carries_state,
        context=context,
        stride=stride,
        seq_len=seq_len,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    nats = float(scores.nats_N.sum(dtype=np.float64))
    return Tally(nats, len(tokens), int(scores.correct_N.sum()), time.monotonic() - start)


def score_stream(
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
) -> TokenScores:
    """Score every token of a text exactly once, the first one conditioned on ``eos_id``.

    With carried state (score_carried) context, stride and batch_size have no meaning; without (score_windows) seq_len
    has none. The model computes in eval mode and is put back into the mode it was in. ``progress`` is told how many
    tokens are done. Raises ConfigError for an empty text or impossible window, DivergedError for scores that are not
    finite.
    """
    if carries_state:
        return score_carried(model, tokens, eos_id, seq_len=seq_len, device=device, progress=progress)
    return score_windows(
        model, tokens, eos_id, context=context, stride=stride, batch_size=batch_size, device=device, progress=progress
    )


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

    Each token is conditioned on all tokens before it. ``seq_len`` changes the speed only. There is one lane: cutting
    the text into several to fill a batch would start each of them without its past, and change the number.
    """
    text = _Text(tokens, eos_id, model.vocab_size)
    out = _Scores(len(tokens))
    state: Any = None
    with _evaluating(model):
        for begin in range(0, len(tokens), seq_len):
            positions_T = np.arange(begin, min(begin + seq_len, len(tokens)))
            with device.autocast():
                inputs_BT = text.inputs(positions_T[None]).to(device.torch_device)
                hidden_BTD, state = model(inputs_BT, state, use_state=True)
                scores = model.head.score(hidden_BTD[0], text.targets(positions_T).to(device.torch_device))
            out.put(positions_T, scores)
            if progress is not None:
                progress(begin + len(positions_T))
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

    Window k begins at token k * stride and scores those of its tokens that no earlier window has scored: the first
    window all, each later one its last ``stride``. A token is thus predicted from the up to ``context`` tokens before
    it (``eos_id`` counted at the start of the text), and behind the first window from more than context - stride.
    ``batch_size``, in windows, changes the speed only.
    """
    text = _Text(tokens, eos_id, model.vocab_size)
    check_window(context, stride, model.context)
    out = _Scores(len(tokens))
    num_windows = 1 + max(0, -(-(len(tokens) - context) // stride))
    with _evaluating(model):
        for first in range(0, num_windows, batch_size):
            starts_B = np.arange(first, min(first + batch_size, num_windows)) * stride
            ends_B = np.minimum(starts_B + context, len(tokens))
            positions_BT = starts_B[:, None] + np.arange(int((ends_B - starts_B).max()))
            scored_from_B = np.where(starts_B == 0, 0, starts_B + context - stride)
            wanted_BT = (positions_BT >= scored_from_B[:, None]) & (positions_BT < ends_B[:, None])
            positions_N = positions_BT[wanted_BT]
            with device.autocast():
                inputs_BT = text.inputs(np.minimum(positions_BT, len(tokens) - 1)).to(device.torch_device)
                hidden_BTD, _ = model(inputs_BT)
                hidden_ND = hidden_BTD[torch.from_numpy(wanted_BT).to(device.torch_device)]
                scores = model.head.score(hidden_ND, text.targets(positions_N).to(device.torch_device))
            out.put(positions_N, scores)
            if progress is not None:
                progress(int(ends_B[-1]))
    return out.finish()


def check_window(context: int, stride: int, model_context: int | None) -> None:
    """Raise ConfigError unless 1 <= stride <= context <= the model's own context (None: unbounded)."""
    if context < 1 or (model_context is not None and context > model_context):
        limit = "at least 1" if model_context is None else f"between 1 and the model's context of {model_context}"
        raise ConfigError(f"context={context} must be {limit}")
    if not 1 <= stride <= context:
        raise ConfigError(f"stride={stride} must be between 1 and context={context}", "else tokens would be left out")


@contextlib.contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """Eval mode, and back to the mode before whatever happens."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _Text:
    """Inputs and targets by position: each token is predicted from the one before it, the first from ``eos_id``."""

    def __init__(self, tokens: Tokens, eos_id: int, vocab_size: int) -> None:
        if len(tokens) == 0:
            raise ConfigError("the text to score is empty", "choose another split or dataset")
        if int(tokens.max()) >= vocab_size:
            raise ConfigError(
                f"token id {int(tokens.max())} is outside the model's vocabulary of {vocab_size}",
                "prepare the text with the run's tokenizer",
            )
        self.tokens, self.eos_id = tokens, eos_id

    def inputs(self, positions: Positions) -> torch.Tensor:
        before = self.tokens[np.maximum(positions - 1, 0)].astype(np.int64)
        return torch.from_numpy(np.where(positions == 0, self.eos_id, before))

    def targets(self, positions: Positions) -> torch.Tensor:
        return torch.from_numpy(self.tokens[positions].astype(np.int64))


class _Scores:
    """Collects the scores of a text and proves that each token was scored exactly once, by a finite number."""

    def __init__(self, num_tokens: int) -> None:
        self.nats_N = np.full(num_tokens, np.nan, dtype=np.float32)
        self.correct_N = np.zeros(num_tokens, dtype=np.bool_)
        self.num_put = 0

    def put(self, positions: Positions, scores: Scores) -> None:
        self.nats_N[positions] = scores.nats_N.float().cpu().numpy()
        self.correct_N[positions] = scores.correct_N.cpu().numpy()
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
