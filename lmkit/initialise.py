"""Initial parameters taken from counts of the training text, so that the first epochs need not learn them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmkit.config.start import BiasInit, EmbeddingInit, InitConfig
from lmkit.errors import ConfigError
from lmkit.heads import SoftmaxHead
from lmkit.ids import check_ids
from lmkit.models.adaptive import AdaptiveHead
from lmkit.models.base import LanguageModel, seeded_generator
from lmkit.models.mixture import MixtureHead

NUM_CONTEXTS = 2500
"""Neighbours that are counted: the most frequent tokens."""
OFFSETS = (-2, -1, 1, 2)
MAX_TOKENS = 20_000_000
"""Of a longer text only the first tokens are counted."""
TABLE_BYTES = 2_000_000_000
"""Most that the table of tokens and their neighbours at all offsets takes, in fp32: 50,000 tokens with 2,500 each."""
CHUNK_ELEMENTS = 25_000_000
"""Entries of the table that are counted at a time; the int64 counts of so many take 200 MB."""


def token_counts(tokens: NDArray[np.integer[Any]], vocab_size: int) -> Tensor:
    """How often each token id occurs, int64 (V,), counted in bounded memory. Raises DataError for one outside of V."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), 1 << 24):
        piece = tokens[start : start + (1 << 24)]
        check_ids(piece, vocab_size, tokens, range(start, start + len(piece)))
        counts += np.bincount(piece, minlength=vocab_size)
    return torch.from_numpy(counts)


@torch.no_grad()
def initialise_from_text(
    model: LanguageModel, config: InitConfig, tokens: NDArray[np.integer[Any]], counts_V: Tensor, *, seed: int
) -> None:
    """Overwrite embeddings and output biases as configured; the scale of the embeddings stays what it was.

    Raises ConfigError if co-occurrence embeddings are asked of a model that has no embedding table.
    """
    head, log_frequency = model.head, config.output_bias is BiasInit.log_frequency
    if isinstance(head, AdaptiveHead):
        head.set_counts(counts_V, biases=log_frequency)
    elif isinstance(head, SoftmaxHead | MixtureHead) and head.bias is not None and log_frequency:
        head.bias.copy_(torch.log(counts_V.double().clamp(min=0.5) / counts_V.sum()))
    if config.embeddings is EmbeddingInit.cooccurrence:
        table = getattr(model, "embedding", None)
        if not isinstance(table, nn.Embedding):
            raise ConfigError(f"init.embeddings=cooccurrence needs an embedding table; {type(model).__name__} has none")
        new_VD = cooccurrence_embeddings(tokens, counts_V, table.embedding_dim, seed=seed)
        if new_VD.any():  # nothing tells tokens apart in a text of one type
            table.weight.copy_(new_VD * (table.weight.std() / new_VD.std()))


def cooccurrence_embeddings(tokens: NDArray[np.integer[Any]], counts_V: Tensor, width: int, *, seed: int) -> Tensor:
    """Embeddings (V, D) from positive pointwise mutual information with the tokens up to two places away.

    Levy & Goldberg 2014 (PPMI, smoothed by the power 3/4, and the square root of the singular values); the singular
    vectors by randomised subspace iteration (Halko et al. 2011), turned by a random rotation so that no coordinate is
    special. Deterministic for a seed. Columns beyond the rank are zero before the rotation.

    The table of tokens and neighbours is dense. With more than 50,000 tokens fewer neighbours are counted, so that it
    stays within 2 GB: 466 of the most frequent at the 267,735 types of WikiText-103.
    """
    vocab_size = len(counts_V)
    affordable = TABLE_BYTES // (4 * len(OFFSETS) * vocab_size)
    num_contexts = min(NUM_CONTEXTS, vocab_size, max(1, affordable))
    frequent_K = counts_V.argsort(descending=True, stable=True)[:num_contexts]
    column_V = torch.full((vocab_size,), -1, dtype=torch.int64)
    column_V[frequent_K] = torch.arange(num_contexts)
    text_N = torch.from_numpy(np.asarray(tokens[:MAX_TOKENS]).astype(np.int64))
    ppmi = torch.empty(vocab_size, len(OFFSETS) * num_contexts)
    for block_VK, offset in zip(torch.split(ppmi, num_contexts, 1), OFFSETS, strict=True):
        _put_ppmi(block_VK, text_N, column_V, offset)
    generator = seeded_generator(seed, "cooccurrence")
    basis = torch.randn(ppmi.shape[1], min(width + 20, vocab_size, ppmi.shape[1]), generator=generator)
    for _ in range(2):
        basis = torch.linalg.qr(ppmi.T @ (ppmi @ basis)).Q
    left, values, _ = torch.linalg.svd(ppmi @ basis, full_matrices=False)
    rank = min(width, left.shape[1])
    vectors_VD = torch.zeros(vocab_size, width)
    vectors_VD[:, :rank] = left[:, :rank] * values[:rank].sqrt()
    rotation_DD: Tensor = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return vectors_VD @ rotation_DD


def _put_ppmi(block_VK: Tensor, text_N: Tensor, column_V: Tensor, offset: int) -> None:
    """Fill in max(0, log P(context | token) / P(context)) for the context ``offset`` places from the token.

    Some rows at a time: the counts of all would take as much again, three times over.
    """
    here, there = (text_N[:-offset], text_N[offset:]) if offset > 0 else (text_N[-offset:], text_N[:offset])
    columns = column_V[there]
    kept = columns >= 0
    columns, num_contexts = columns[kept], block_VK.shape[1]
    flat = here[kept] * num_contexts + columns
    context_K = torch.bincount(columns, minlength=num_contexts).float().pow(0.75)
    context_K = (context_K / context_K.sum().clamp(min=1.0)).clamp(min=1e-9)
    first = 0
    for rows_RK in torch.split(block_VK, max(1, CHUNK_ELEMENTS // num_contexts)):
        after = first + rows_RK.numel()
        inside = flat[(flat >= first) & (flat < after)] - first
        counts_RK = torch.bincount(inside, minlength=rows_RK.numel()).view(rows_RK.shape).float()
        counts_RK /= counts_RK.sum(1, keepdim=True).clamp(min=1.0)
        rows_RK.copy_(counts_RK.div_(context_K).clamp_(min=1.0).log_())
        first = after
