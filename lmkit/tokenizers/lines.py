"""Which tokens end the lines of a text."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from lmkit.tokenizers.base import Tokenizer


def line_enders(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """(V,) whether a token ends a line: the end token of a word-level tokenizer, else any with a newline in it."""
    if tokenizer.ends_lines:
        return np.isin(np.arange(tokenizer.vocab_size), [tokenizer.eos_id])
    return newlines(tokenizer) > 0


@functools.lru_cache(maxsize=2)
def newlines(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """(V,) how many newlines are in each token's text; kept, since large vocabularies take seconds."""
    return np.array([tokenizer.decode([i]).count("\n") for i in range(tokenizer.vocab_size)], dtype=np.int64)
