"""Keyed orders: which comes where, as a function of a seed and an epoch, with nothing to store and nothing to replay.

The values are fixed for ever: tests hold golden vectors, and runs that go on expect the order that they had.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmkit.rng import derive_key

Indices = NDArray[np.int64]


class Permutation:
    """A keyed bijection on [0, size): a Feistel network on the next power of four, with cycle walking.

    Luby and Rackoff 1988; Black and Rogaway 2002 for the walk. The round function is the finaliser of splitmix64
    (Steele et al. 2014).
    """

    ROUNDS = 6

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self._half_bits = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
        self._mask = (np.uint64(1) << self._half_bits) - np.uint64(1)
        counters = (key + np.arange(1, self.ROUNDS + 1, dtype=object) * 0x9E3779B97F4A7C15) % 2**64
        self._keys = _mix(counters.astype(np.uint64))

    def __call__(self, indices: Indices) -> Indices:
        """The images of indices in [0, size). Raises IndexError for others, whose walk might never end."""
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.size:
            raise IndexError(f"an index is outside [0, {self.size})")
        values = indices.astype(np.uint64)
        outside = np.ones(values.shape, bool)
        while outside.any():  # each walk returns to [0, size) since it started there
            values[outside] = self._encrypt(values[outside])
            outside = values >= self.size
        return values.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        return (left << self._half_bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def epoch_of(step: int, steps_per_epoch: int) -> tuple[int, int]:
    """The epoch of a step, and which of its batches it is. IndexError below 0: there is no end to count from."""
    if step < 0:
        raise IndexError(f"step {step} is negative")
    return divmod(step, steps_per_epoch)


def epoch_rows(step: int, steps_per_epoch: int, num_rows: int, batch_size: int, seed: int) -> list[int]:
    """Rows of the batch of a step: each row once an epoch, in an order of its own; the last batch may be smaller."""
    epoch, k = epoch_of(step, steps_per_epoch)
    places = np.arange(k * batch_size, min((k + 1) * batch_size, num_rows))
    rows: list[int] = Permutation(num_rows, derive_key(seed, "order", epoch))(places).tolist()
    return rows


class Pieces:
    """A text cut into pieces that come in another order each epoch: a keyed permutation, so nothing is stored."""

    def __init__(self, starts_P: Indices, num_tokens: int, seed: int) -> None:
        """starts_P: where each piece begins, rising from 0."""
        self._starts_P, self._lengths_P = starts_P, np.diff(starts_P, append=num_tokens)
        self._seed = seed
        self._epochs: dict[int, PieceOrder] = {}

    @classmethod
    def blocks(cls, num_tokens: int, length: int, seed: int) -> Pieces:
        """Pieces of ``length`` tokens; the last may be shorter."""
        return cls(np.arange(0, num_tokens, length, dtype=np.int64), num_tokens, seed)

    @classmethod
    def documents(cls, tokens: NDArray[np.integer], eos_id: int, seed: int) -> Pieces:
        """Pieces that end with an eos each, and with the text."""
        starts_P = np.concatenate([[0], np.flatnonzero(tokens == eos_id) + 1]).astype(np.int64)
        return cls(starts_P[starts_P < len(tokens)], len(tokens), seed)

    def of_epoch(self, epoch: int) -> PieceOrder:
        """Their order in an epoch; that of the last one asked for is kept."""
        order = self._epochs.get(epoch)
        if order is None:
            number = len(self._starts_P)
            chosen_P = Permutation(number, derive_key(self._seed, "pieces", epoch))(np.arange(number, dtype=np.int64))
            lengths_P = self._lengths_P[chosen_P]
            ends_P = np.cumsum(lengths_P)
            order = PieceOrder(self._starts_P[chosen_P], ends_P - lengths_P, ends_P)
            self._epochs = {epoch: order}
        return order


@dataclass(frozen=True)
class PieceOrder:
    """Where the pieces begin in the text, in the order in which they are read, and where each is in that order."""

    starts_P: Indices
    begins_P: Indices
    ends_P: Indices

    def __call__(self, positions: Indices) -> Indices:
        """Positions in the text, from positions in the order of reading."""
        piece = np.searchsorted(self.ends_P, positions, side="right")
        places: Indices = self.starts_P[piece] + positions - self.begins_P[piece]
        return places


def jittered_edges(lane_len: int, num_steps: int, seq_len: int, seed: int, epoch: int) -> Indices:
    """(num_steps + 1,) where the batches of an epoch begin and end in a lane, rising from 0 to ``lane_len``.

    As in AWD-LSTM (Merity et al. 2018, section 5) lengths are drawn from a normal of deviation 5 around ``seq_len``,
    or with probability 0.05 around half of it, and are at least 5; ours are then scaled to fill the lane in
    ``num_steps`` steps, so that every epoch has as many.
    """
    counters = (np.arange(3 * num_steps, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    words = _mix(counters + np.uint64(derive_key(seed, "lengths", epoch) % 2**64))
    which, radius, angle = ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(3, num_steps)
    normal = np.sqrt(-2.0 * np.log1p(-radius)) * np.cos(2.0 * np.pi * angle)  # Box & Muller 1958
    lengths = np.maximum(5.0, np.floor(np.where(which < 0.95, seq_len, seq_len / 2) + 5.0 * normal))
    share = np.concatenate([[0.0], np.cumsum(lengths) / lengths.sum()])
    share[-1] = 1.0
    steps = np.arange(num_steps + 1, dtype=np.int64)  # at least one token each
    edges: Indices = steps + np.floor(share * (lane_len - num_steps)).astype(np.int64)
    return edges
