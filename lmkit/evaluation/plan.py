"""What is scored and from what: a text cut into windows, each read by the model from an empty state.

A position p of a text is scored as the target of a prediction whose input is token p - 1. Where a window begins with
a ``prefix``, that token stands in place of p - 1. Everything that protocols differ in, except how numbers are made of
the scores, is a set of windows: one for the whole text, one a stripe, a sentence or a document, overlapping ones.

Shape letters: W windows, S segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmkit.errors import ConfigError

Tokens = NDArray[np.integer[Any]]
Indices = NDArray[np.int64]

NO_PREFIX = -1


@dataclass(frozen=True)
class Windows:
    """Window w reads the inputs of positions begins_W[w] to ends_W[w] and scores those from scored_W[w] on."""

    begins_W: Indices
    scored_W: Indices
    ends_W: Indices
    prefix_W: Indices
    """The input of position begins_W[w]; NO_PREFIX: the token before it in the text."""

    @property
    def num_scored(self) -> int:
        """Positions that are scored, in all windows."""
        return int((self.ends_W - self.scored_W).sum())

    @property
    def longest(self) -> int:
        """Inputs of the longest window."""
        return int((self.ends_W - self.begins_W).max(initial=0))

    def take(self, chosen: NDArray[Any]) -> Windows:
        """Some of the windows (indices or a mask)."""
        return Windows(self.begins_W[chosen], self.scored_W[chosen], self.ends_W[chosen], self.prefix_W[chosen])

    def shortened(self, receptive_field: int) -> Windows:
        """The same scores for a model that sees only so many last inputs: what no score depends on is not read."""
        begins_W = np.maximum(self.begins_W, self.scored_W - receptive_field + 1)
        return Windows(
            begins_W, self.scored_W, self.ends_W, np.where(begins_W == self.begins_W, self.prefix_W, NO_PREFIX)
        )

    def positions_in_context(self, num_tokens: int) -> Indices:
        """(num_tokens,) how many inputs of its window precede that of each position; -1 where none is scored."""
        position_N = np.full(num_tokens, -1, dtype=np.int64)
        for begin, scored, end in zip(self.begins_W, self.scored_W, self.ends_W, strict=True):
            position_N[scored:end] = np.arange(scored - begin, end - begin)
        return position_N


@dataclass(frozen=True)
class Segments:
    """Parts of a text that know nothing of each other: documents, sentences, stripes, or the whole of it."""

    begins_S: Indices
    ends_S: Indices
    prefix: int
    """What the first token of each is predicted from; NO_PREFIX: it is not scored, the second is predicted from it."""

    @classmethod
    def whole(cls, num_tokens: int, prefix: int) -> Segments:
        """The text as one segment."""
        return cls(np.array([0]), np.array([num_tokens]), prefix)

    @classmethod
    def stripes(cls, num_tokens: int, num_stripes: int) -> Segments:
        """Equal parts, the rest of the text left out (``batchify`` of AWD-LSTM and Transformer-XL)."""
        length = num_tokens // num_stripes
        if length < 2:
            raise ConfigError(
                f"a text of {num_tokens} tokens is too short for {num_stripes} stripes", "use protocol=mikolov"
            )
        begins_S = np.arange(num_stripes) * length
        return cls(begins_S, begins_S + length, NO_PREFIX)

    @classmethod
    def ending_with(cls, is_end_N: NDArray[np.bool_], prefix: int) -> Segments:
        """Segments that end with the marked tokens, and with the text."""
        ends_S = np.flatnonzero(is_end_N) + 1
        if len(is_end_N) and (len(ends_S) == 0 or ends_S[-1] != len(is_end_N)):
            ends_S = np.append(ends_S, len(is_end_N))
        return cls(np.append(0, ends_S)[:-1], ends_S, prefix)


def unbroken(segments: Segments) -> Windows:
    """One window a segment: for models that carry a state, or segments that fit into the context."""
    begins_S = np.minimum(segments.begins_S + (segments.prefix == NO_PREFIX), segments.ends_S)
    return _windows(begins_S, begins_S, segments.ends_S, np.full(len(begins_S), segments.prefix))


def sliding(segments: Segments, context: int, stride: int) -> Windows:
    """A window of ``context`` tokens moves over each segment ``stride`` tokens at a time.

    The first scores all its tokens, each later one those that no earlier has scored: its last ``stride``. A token is
    thus predicted from the up to ``context`` tokens before it, and behind the first window from more than
    context - stride.
    """
    whole = unbroken(segments)
    lengths_S = whole.ends_W - whole.begins_W
    number_S = 1 + np.maximum(0, -(-(lengths_S - context) // stride))
    segment_W = np.repeat(np.arange(len(number_S)), number_S)
    index_W = np.arange(len(segment_W)) - np.repeat(np.cumsum(number_S) - number_S, number_S)
    begins_W = whole.begins_W[segment_W] + index_W * stride
    ends_W = np.minimum(begins_W + context, whole.ends_W[segment_W])
    scored_W = np.where(index_W == 0, begins_W, begins_W + context - stride)
    return _windows(begins_W, scored_W, ends_W, np.where(index_W == 0, segments.prefix, NO_PREFIX))


def rolling(segments: Segments, context: int) -> Windows:
    """Windows side by side; only the last of a segment reaches back, so that it is a full one too.

    As ``loglikelihood_rolling`` of lm-evaluation-harness with ``context_len`` 1: the first token of each window is
    predicted from the one token before it.
    """
    windows = sliding(segments, context, context)
    is_first_W = np.isin(windows.begins_W, unbroken(segments).begins_W)
    segment_begins_W = np.maximum.accumulate(np.where(is_first_W, windows.begins_W, 0))
    begins_W = np.where(is_first_W, windows.begins_W, np.maximum(windows.ends_W - context, segment_begins_W))
    prefix_W = np.where(begins_W == segment_begins_W, segments.prefix, NO_PREFIX)
    return _windows(begins_W, windows.scored_W, windows.ends_W, prefix_W)


def strided(num_tokens: int, max_length: int, stride: int) -> Windows:
    """The strided loop of Hugging Face's documentation ("Perplexity of fixed-length models").

    Windows of ``max_length`` tokens begin at every ``stride``-th; a window's first token is only ever an input, so that
    without overlap one token a window is never scored.
    """
    starts_W = np.arange(0, num_tokens, stride)
    ends_W = np.minimum(starts_W + max_length, num_tokens)
    num_windows = int(np.argmax(ends_W == num_tokens)) + 1
    starts_W, ends_W = starts_W[:num_windows], ends_W[:num_windows]
    begins_W = np.minimum(starts_W + 1, ends_W)
    scored_W = np.maximum(np.append(0, ends_W[:-1]), begins_W)
    return _windows(begins_W, scored_W, ends_W, np.full(num_windows, NO_PREFIX))


@dataclass(frozen=True)
class Reach:
    """How far back a model looks: windows of ``context`` tokens, ``stride`` apart; None: a state carries the past."""

    context: int | None
    stride: int | None

    def windows(self, segments: Segments) -> Windows:
        """Sliding windows in each segment, or one window each."""
        if self.context is None or self.stride is None:
            return unbroken(segments)
        return sliding(segments, self.context, self.stride)


def check_window(context: int, stride: int, model_context: int | None) -> None:
    """Raise ConfigError unless 1 <= stride <= context <= the model's own context (None: unbounded)."""
    if context < 1 or (model_context is not None and context > model_context):
        limit = "at least 1" if model_context is None else f"between 1 and the model's context of {model_context}"
        raise ConfigError(f"context={context} must be {limit}")
    if not 1 <= stride <= context:
        raise ConfigError(f"stride={stride} must be between 1 and context={context}", "else tokens would be left out")


def _windows(*arrays: NDArray[np.integer[Any]]) -> Windows:
    return Windows(*(np.asarray(array, dtype=np.int64) for array in arrays))
