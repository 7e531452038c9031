"""Sentences of a text, and batches of sentences of about the same length as a function of the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmkit.data.batches import Batch
from lmkit.data.order import Permutation, epoch_of
from lmkit.errors import DataError
from lmkit.ids import check_ids, check_text
from lmkit.models.base import IGNORE
from lmkit.rng import derive_key

POOL_BATCHES = 64
"""Batches that are drawn together and then sorted by length: more waste less padding, fewer are more random."""


@dataclass(frozen=True)
class Sentences:
    """Parts of a text that know nothing of each other, by where they begin and end (exclusive). S sentences."""

    tokens: NDArray[np.integer[Any]]
    begins_S: NDArray[np.int64]
    ends_S: NDArray[np.int64]
    eos_id: int
    vocab_size: int

    @classmethod
    def of(
        cls, tokens: NDArray[np.integer[Any]], ends_line_V: NDArray[np.bool_], eos_id: int, longest: int | None = None
    ) -> Sentences:
        """The lines of a text, each with the token that ends it, cut after ``longest`` tokens.

        ends_line_V: which types end a line. An eos that does not is an end of a document, which is left out: it also
        ends a last line that has no end of its own. Raises DataError if nothing is left, or for a token that is not in
        the vocabulary.
        """
        check_text(tokens, len(ends_line_V))
        is_end_N = ends_line_V[tokens]
        is_text_N = np.ones(len(tokens), np.bool_) if ends_line_V[eos_id] else np.asarray(tokens != eos_id)
        ends_S = np.flatnonzero(is_end_N | ~is_text_N) + 1
        if len(tokens) and (len(ends_S) == 0 or ends_S[-1] != len(tokens)):
            ends_S = np.append(ends_S, len(tokens))
        begins_S = np.append(0, ends_S)[:-1]
        ends_S = ends_S - ~is_text_N[ends_S - 1]
        if longest is not None:
            ends_S = np.minimum(ends_S, begins_S + longest)
        filled = ends_S > begins_S
        if not filled.any():
            raise DataError("there are no sentences to learn from", "check the split's text")
        begins_S, ends_S = begins_S[filled].astype(np.int64), ends_S[filled].astype(np.int64)
        return cls(tokens, begins_S, ends_S, eos_id, len(ends_line_V))

    @property
    def lengths_S(self) -> NDArray[np.int64]:
        """Tokens of each."""
        return self.ends_S - self.begins_S

    def __len__(self) -> int:
        return len(self.begins_S)

    def batch(self, chosen: NDArray[np.int64]) -> Batch:
        """Some of them side by side, padded with IGNORE; the first token of each is predicted from eos.

        Raises DataError for a token that is not in the vocabulary.
        """
        begins_B, ends_B = self.begins_S[chosen], self.ends_S[chosen]
        positions_BT = begins_B[:, None] + np.arange(int((ends_B - begins_B).max()), dtype=np.int64)
        real_BT = positions_BT < ends_B[:, None]
        positions_BT = np.where(real_BT, positions_BT, begins_B[:, None])
        targets_BT = np.where(real_BT, self._read(positions_BT), IGNORE)
        before_BT = self._read(np.maximum(positions_BT - 1, 0))
        inputs_BT = np.where(real_BT & (positions_BT > begins_B[:, None]), before_BT, self.eos_id)
        return Batch(torch.from_numpy(inputs_BT), torch.from_numpy(targets_BT), starts_text=True)

    def _read(self, positions_BT: NDArray[np.int64]) -> NDArray[np.int64]:
        ids_BT = self.tokens[positions_BT].astype(np.int64)
        check_ids(ids_BT, self.vocab_size, self.tokens, positions_BT)
        return ids_BT


class SentenceBatches:
    """Every sentence once an epoch, in random order without replacement, short ones with short ones.

    The order is a keyed permutation, cut into pools of ``pool_batches`` batches; a pool is sorted by length, cut into
    batches, and these are shuffled. A step thus takes the lengths of one pool, wherever it is. The last
    batch may be smaller.
    """

    def __init__(self, sentences: Sentences, batch_size: int, seed: int, *, pool_batches: int = POOL_BATCHES) -> None:
        self.sentences, self._batch_size, self._seed, self._pool_batches = sentences, batch_size, seed, pool_batches
        self.steps_per_epoch = -(-len(sentences) // batch_size)
        """Batches per epoch."""

    def __getitem__(self, step: int) -> Batch:
        """The batch of any step >= 0; epoch ``step // steps_per_epoch``."""
        epoch, k = epoch_of(step, self.steps_per_epoch)
        pool, slot = divmod(k, self._pool_batches)
        order = Permutation(len(self.sentences), derive_key(self._seed, "order", epoch))
        first = pool * self._pool_batches * self._batch_size
        last = min(first + self._pool_batches * self._batch_size, len(self.sentences))
        pooled = order(np.arange(first, last, dtype=np.int64))
        by_length = pooled[np.argsort(self.sentences.lengths_S[pooled], kind="stable")]
        num_batches = -(-len(pooled) // self._batch_size)
        shuffled = Permutation(num_batches, derive_key(self._seed, "order", epoch, "pool", pool))
        place = int(shuffled(np.array([slot], dtype=np.int64))[0])
        return self.sentences.batch(by_length[place * self._batch_size : (place + 1) * self._batch_size])
