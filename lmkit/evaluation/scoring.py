"""Scoring: every token that a plan asks for is scored exactly once; sums travel, means are taken once at the end."""

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
from torch import Tensor

from lmkit.data.prepared import Split
from lmkit.device import Device, attention_of_any_shape
from lmkit.errors import ConfigError, DivergedError
from lmkit.evaluation.plan import NO_PREFIX, Indices, Tokens, Windows
from lmkit.ids import check_ids, check_text, file_of
from lmkit.models.base import LanguageModel, Scores

Scorer = Callable[[Tensor, Tensor, Indices], Scores]
"""From hidden vectors (N, D), targets (N,) and their positions in the text to scores."""


@dataclass(frozen=True)
class TokenScores:
    """One value per token of the text, in its order."""

    nats_N: NDArray[np.float32]
    """Negative log-likelihood of each token in nats; NaN where the plan does not score it."""
    correct_N: NDArray[np.bool_]
    """Whether the token was the most probable one."""

    @property
    def scored_N(self) -> NDArray[np.bool_]:
        """Which tokens were scored."""
        return ~np.isnan(self.nats_N)


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
    windows: Windows,
    *,
    seq_len: int,
    batch_size: int,
    device: Device,
    progress: Callable[[int], None] | None = None,
) -> Tally:
    """The sums over ``score``, and how long it took."""
    start = time.monotonic()
    scores = score(model, tokens, windows, seq_len=seq_len, batch_size=batch_size, device=device, progress=progress)
    nats = float(np.nansum(scores.nats_N, dtype=np.float64))
    return Tally(nats, windows.num_scored, int(scores.correct_N.sum()), time.monotonic() - start)


@torch.inference_mode()
@attention_of_any_shape()
def score(
    model: LanguageModel,
    tokens: Tokens,
    windows: Windows,
    *,
    seq_len: int,
    batch_size: int,
    device: Device,
    scorer: Scorer | None = None,
    dropout: bool = False,
    progress: Callable[[int], None] | None = None,
) -> TokenScores:
    """Score what the windows ask for.

    Up to ``batch_size`` windows are read at once, each from an empty state, ``seq_len`` tokens at a time with carried
    state; neither changes a number. Windows of about the same length are read together, and no model reads what its
    receptive field does not reach. (A Transformer's cache cannot be kept from one overlapping window to the next: from
    the second layer on, keys depend on where their window began.) ``scorer`` stands in for the
    head's own scores and is called in the order of the text if batch_size is 1. The model computes in eval mode unless
    ``dropout``, and is put back into the mode it was in. ``progress`` is told how many tokens are done. Raises
    ConfigError for an empty text or a foreign token (DataError where it comes from a file of tokens), DivergedError for
    scores that are not finite.
    """
    text = Text(tokens, model.vocab_size)
    out = ScoreSheet(len(tokens), windows)
    if model.receptive_field is not None:
        windows = windows.shortened(model.receptive_field)
    scorer = scorer or own_scores(model)
    with mode(model, training=dropout):
        for batch in batches(windows, batch_size):
            state: Any = None
            for offset in range(0, batch.longest, seq_len):
                positions_BT = batch.begins_W[:, None] + np.arange(offset, min(offset + seq_len, batch.longest))
                wanted_BT = (positions_BT >= batch.scored_W[:, None]) & (positions_BT < batch.ends_W[:, None])
                more = offset + seq_len < batch.longest
                inputs_BT = text.inputs(positions_BT, batch).to(device.torch_device)
                positions_N = positions_BT[wanted_BT]
                with device.autocast():
                    hidden_BTD, state = model(inputs_BT, state, use_state=more)
                    if len(positions_N) == 0:
                        continue
                    rows_N = torch.from_numpy(np.flatnonzero(wanted_BT)).to(device.torch_device)
                    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, rows_N)
                    targets_N = text.targets(positions_N).to(device.torch_device)
                    out.put(positions_N, scorer(hidden_ND, targets_N, positions_N))
                if progress is not None:
                    progress(out.num_put)
    return out.finish()


def batches(windows: Windows, batch_size: int) -> Iterator[Windows]:
    """The windows that score something, ``batch_size`` at a time: in the order of the text, or by length if they differ
    in it and more than one is read at a time."""
    windows = windows.take(windows.scored_W < windows.ends_W)
    lengths_W = windows.ends_W - windows.begins_W
    if batch_size > 1 and len(lengths_W) > batch_size and int(lengths_W[:-1].min()) < int(lengths_W.max()):
        windows = windows.take(np.argsort(-lengths_W, kind="stable"))
    for first in range(0, len(lengths_W), batch_size):
        yield windows.take(np.arange(first, min(first + batch_size, len(lengths_W))))


def own_scores(model: LanguageModel) -> Scorer:
    """The scores of the model's own head."""

    def scorer(hidden_ND: Tensor, targets_N: Tensor, positions_N: Indices) -> Scores:
        return model.head.score(hidden_ND, targets_N)

    return scorer


@contextlib.contextmanager
def mode(model: LanguageModel, *, training: bool) -> Iterator[None]:
    """Eval (or training) mode, and back to the mode before whatever happens."""
    was_training = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(was_training)


class Text:
    """Inputs and targets by position. Raises DataError for an id that is not in the vocabulary."""

    def __init__(self, tokens: Tokens, vocab_size: int) -> None:
        if len(tokens) == 0:
            raise ConfigError("the text to score is empty", "choose another split or dataset")
        if file_of(tokens) is not None:
            check_text(tokens, vocab_size)
        elif int(tokens.max()) >= vocab_size:
            raise ConfigError(
                f"token id {int(tokens.max())} is outside the model's vocabulary of {vocab_size}",
                "prepare the text with the run's tokenizer",
            )
        self.tokens, self.vocab_size = tokens, vocab_size

    def inputs(self, positions_BT: Indices, windows: Windows) -> Tensor:
        """Token before each position, or the prefix where a window begins with one; anything behind the text's end."""
        before_BT = np.clip(positions_BT - 1, 0, len(self.tokens) - 1)
        prefix_B1 = windows.prefix_W[:, None]
        is_prefix_BT = (positions_BT == windows.begins_W[:, None]) & (prefix_B1 != NO_PREFIX)
        return torch.from_numpy(np.where(is_prefix_BT, prefix_B1, self._read(before_BT)))

    def targets(self, positions_N: Indices) -> Tensor:
        """(N,) int64 tokens at the positions."""
        return torch.from_numpy(self._read(positions_N))

    def _read(self, positions: Indices) -> Indices:
        ids = self.tokens[positions].astype(np.int64)
        check_ids(ids, self.vocab_size, self.tokens, positions)
        return ids


class ScoreSheet:
    """Collects the scores of a text and proves that each token was scored exactly once, by a finite number."""

    def __init__(self, num_tokens: int, windows: Windows) -> None:
        self.nats_N = np.full(num_tokens, np.nan, dtype=np.float32)
        self.correct_N = np.zeros(num_tokens, dtype=np.bool_)
        self.put_N = np.zeros(num_tokens, dtype=np.bool_)
        self.num_put, self.num_wanted = 0, windows.num_scored

    def put(self, positions_N: Indices, scores: Scores) -> None:
        """Note the scores of the tokens at these positions."""
        self.nats_N[positions_N] = scores.nats_N.float().cpu().numpy()
        self.correct_N[positions_N] = scores.correct_N.cpu().numpy()
        self.put_N[positions_N] = True
        self.num_put += len(positions_N)

    def finish(self) -> TokenScores:
        """All scores. Raises DivergedError that names the first that is not finite."""
        if not self.num_put == self.num_wanted == int(self.put_N.sum()):
            raise RuntimeError(f"{self.num_put} scores of {int(self.put_N.sum())} tokens, not {self.num_wanted}")
        bad = np.flatnonzero(self.put_N & ~np.isfinite(self.nats_N))
        if len(bad):
            raise DivergedError(
                f"the score of token {bad[0]} is {self.nats_N[bad[0]]} ({len(bad)} of {self.num_put} not finite)",
                "the model has diverged: use an earlier checkpoint, or retrain with a lower optimizer.lr",
            )
        return TokenScores(self.nats_N, self.correct_N)


def summarize(tally: Tally, split: Split) -> dict[str, Any]:
    """The numbers of a wholly scored split; accuracy: share of tokens that were the most probable one."""
    return {
        **ratios(tally.nats, tally.num_tokens, split.num_words, split.num_bytes, split.num_chars),
        "nats": tally.nats,
        "num_tokens": tally.num_tokens,
        "num_words": split.num_words,
        "num_bytes": split.num_bytes,
        "num_chars": split.num_chars,
        "num_unk": split.num_unk,
        "accuracy": tally.num_correct / tally.num_tokens,
        "eval_seconds": tally.seconds,
    }


def ratios(
    nats: float, num_tokens: int, num_words: int | None, num_bytes: int | None, num_chars: int | None
) -> dict[str, float | None]:
    """One sum of nats over each count, under the names that scripts depend on; None where a count is None or 0.

    word_ppl = exp(nats / words), words being those of the original text plus one end of line each, whatever the
    tokenizer; token_ppl = exp(nats / tokens); bits_per_byte = nats / (bytes ln 2).
    """
    return {
        "word_ppl": exp(nats / num_words) if num_words else None,
        "token_ppl": exp(nats / num_tokens) if num_tokens else None,
        "bits_per_byte": nats / num_bytes / math.log(2) if num_bytes else None,
        "bits_per_char": nats / num_chars / math.log(2) if num_chars else None,
    }


def exp(nats: float) -> float:
    """exp, infinite where it overflows."""
    return math.exp(nats) if nats < 700 else math.inf
