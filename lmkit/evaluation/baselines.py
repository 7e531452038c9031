"""What a perplexity is compared with before anything is believed: counts of words, and what compressors make of a text.

A model that is not better than these has learnt nothing that counting could not have told. (Uniform probabilities, the
lowest baseline, cost log V nats a token.)
"""

from __future__ import annotations

import lzma
import zlib
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lmkit.config.machine import Precision
from lmkit.config.model import NgramConfig
from lmkit.device import Device
from lmkit.errors import DataError
from lmkit.evaluation.plan import Segments, Windows, unbroken
from lmkit.evaluation.scoring import score
from lmkit.ids import check_text
from lmkit.initialise import token_counts
from lmkit.models.ngram import KneserNey

Tokens = NDArray[np.integer[Any]]

CPU = Device(torch.device("cpu"), Precision.fp32, compile=False, fused=False, description="cpu")
PIECE_TOKENS, BATCH_WINDOWS = 4096, 64
"""Tokens and windows that are looked up at once; neither changes a number."""
PIECE_BYTES = 1 << 20
XZ_DICTIONARY = 64 << 20
"""Bytes that xz -9 looks back."""
GZIP_FORMAT = 31
"""zlib's wbits for its largest window of 32 KiB in a gzip file."""


def unigram_nats(train_tokens: Tokens, tokens: Tokens, vocab_size: int) -> NDArray[np.float32]:
    """-ln P of each token under the relative frequencies of train, a type that is not in train being counted once.

    That is, with N tokens of train and U of the V types not in it, P(w) = max(c(w), 1) / (N + U), which sums to one.
    Raises DataError for a token that is not in the vocabulary.
    """
    check_text(tokens, vocab_size)
    counts_V = np.maximum(token_counts(train_tokens, vocab_size).numpy(), 1)
    nats_V: NDArray[np.float32] = (np.log(counts_V.sum()) - np.log(counts_V)).astype(np.float32)
    return nats_V[tokens]


def kn5_nats(
    train_tokens: Tokens,
    tokens: Tokens,
    eos_id: int,
    vocab_size: int,
    order: int = 5,
    windows: Windows | None = None,
) -> NDArray[np.float32]:
    """-ln P of each token under the Kneser-Ney model of ``order`` counted on train, the first following ``eos_id``.

    windows: what is scored, each window with a history of its own; None: the text as one. NaN where nothing is scored.
    Counting takes seconds and about 0.2 KB of memory a token of train. Raises DataError for an empty train or a token
    that is not in the vocabulary.
    """
    check_text(tokens, vocab_size)
    model = KneserNey(NgramConfig(order=order), vocab_size)
    model.fit(train_tokens, eos_id=eos_id)
    if len(tokens) == 0:
        return np.zeros(0, dtype=np.float32)
    if windows is None:
        windows = unbroken(Segments.whole(len(tokens), eos_id))
    scores = score(model, tokens, windows, seq_len=PIECE_TOKENS, batch_size=BATCH_WINDOWS, device=CPU)
    return scores.nats_N


def compressed_bits_per_byte(data: bytes) -> dict[str, float]:
    """Bits per byte of the text as compressed by ``xz -9e`` and ``gzip -9``, file headers included.

    No model was trained before: the compressors learn from this text alone, so that short texts look bad. The output
    is counted, not kept; xz needs about twelve times the smaller of the text's size and 64 MiB of memory. Raises
    DataError for an empty text.
    """
    if not data:
        raise DataError("the text to compress is empty", "choose another split or dataset")
    # A dictionary larger than the text changes nothing but the memory that xz takes.
    dictionary = min(XZ_DICTIONARY, max(4096, 1 << (len(data) - 1).bit_length()))
    settings = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}
    return {
        "xz": _bits_per_byte(data, lzma.LZMACompressor(filters=[settings])),
        "gzip": _bits_per_byte(data, zlib.compressobj(9, zlib.DEFLATED, GZIP_FORMAT)),
    }


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


def _bits_per_byte(data: bytes, compressor: _Compressor) -> float:
    size = 0
    for begin in range(0, len(data), PIECE_BYTES):
        size += len(compressor.compress(data[begin : begin + PIECE_BYTES]))
    return 8 * (size + len(compressor.flush())) / len(data)
