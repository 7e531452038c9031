"""Baselines: counts and compressors, against numbers worked out by hand."""

from __future__ import annotations

import gzip
import lzma
import math
import random
import tracemalloc

import numpy as np
import pytest

from lmkit.errors import DataError
from lmkit.evaluation import baselines
from lmkit.evaluation.baselines import compressed_bits_per_byte, kn5_nats, unigram_nats
from lmkit.evaluation.plan import Segments, unbroken

TRAIN = np.array([1, 2, 1, 1, 4, 2], dtype=np.uint16)


def test_unigrams_are_relative_frequencies_with_each_unseen_type_counted_once() -> None:
    # Counts 3, 2, 1 of 6 tokens; types 0 and 3 of 5 are not there: 6 + 2 = 8.
    nats = unigram_nats(TRAIN, np.array([1, 2, 4, 0, 3, 1], dtype=np.uint16), 5)
    assert nats.dtype == np.float32
    assert np.exp(-nats).tolist() == pytest.approx([3 / 8, 2 / 8, 1 / 8, 1 / 8, 1 / 8, 3 / 8])


def test_unigrams_are_exactly_relative_frequencies_when_train_has_all_types() -> None:
    nats = unigram_nats(np.array([0, 1, 1, 1]), np.array([0, 1]), 2)
    assert np.exp(-nats).tolist() == pytest.approx([1 / 4, 3 / 4])


def test_unigrams_of_a_long_train_are_counted_in_bounded_memory() -> None:
    train = np.ones(1 << 26, dtype=np.uint8)
    tracemalloc.start()
    try:
        nats = unigram_nats(train, np.array([1, 0]), 2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.exp(-nats).tolist() == pytest.approx([1.0, 2**-26], rel=1e-5)
    assert peak < 4 * len(train), "eight bytes a token would be a corpus of its own"


@pytest.mark.parametrize("vocab_size", [5, 6, 1000])
def test_unigram_probabilities_sum_to_one(vocab_size: int) -> None:
    nats = unigram_nats(TRAIN, np.arange(vocab_size), vocab_size)
    assert np.exp(-nats.astype(np.float64)).sum() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(("train", "tokens"), [([5], [0]), ([0], [5]), ([0], [-1])])
def test_tokens_outside_the_vocabulary_are_refused(train: list[int], tokens: list[int]) -> None:
    with pytest.raises(DataError, match="do not fit a vocabulary of 5"):
        unigram_nats(np.array(train), np.array(tokens), 5)
    with pytest.raises(DataError, match="vocabulary of 5"):
        kn5_nats(np.array(train), np.array(tokens), 0, 5)


def test_an_empty_text_has_no_scores_and_an_empty_train_cannot_be_counted() -> None:
    empty = np.zeros(0, dtype=np.uint16)
    assert len(unigram_nats(TRAIN, empty, 5)) == len(kn5_nats(TRAIN, empty, 0, 5)) == 0
    with pytest.raises(DataError, match="empty"):
        kn5_nats(empty, TRAIN, 0, 5)


def text(num_tokens: int, vocab_size: int) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    """Tokens of which each depends on the one before it."""
    rng = random.Random(7)
    tokens = [0]
    while len(tokens) < num_tokens:
        tokens.append((tokens[-1] * 3 + rng.choice([1, 1, 1, 2, 5])) % vocab_size)
    return np.array(tokens, dtype=np.uint16)


def test_kneser_ney_scores_each_token_given_those_before_it_and_the_first_given_the_end_of_a_line() -> None:
    # The bigram model of "1 0 1 0" after a line end: only the fallback discounts 0.5 and 1.0 are used.
    # Unigrams, by the number of tokens before them: one for 1 (after 0), one for 0 (after 1).
    unigram = (1 - 0.5) / 2 + (2 * 0.5) / 2 / 3
    bigram = (2 - 1.0) / 2 + 1.0 / 2 * unigram
    unseen_after_0 = 1.0 / 2 * (2 * 0.5) / 2 / 3
    nats = kn5_nats(np.array([1, 0, 1, 0]), np.array([1, 0, 1, 0, 2]), 0, 3, order=2)
    assert np.exp(-nats).tolist() == pytest.approx([bigram, bigram, bigram, bigram, unseen_after_0], rel=1e-5)


def test_kneser_ney_does_not_depend_on_how_the_text_is_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    train, tokens = text(3000, 17), text(500, 17)[100:]
    whole = kn5_nats(train, tokens, 0, 17)
    for size in (1, 7, len(tokens)):
        monkeypatch.setattr(baselines, "PIECE_TOKENS", size)
        np.testing.assert_array_equal(kn5_nats(train, tokens, 0, 17), whole)


def test_kneser_ney_begins_each_window_with_a_history_of_its_own() -> None:
    train, tokens = text(3000, 17), text(60, 17)
    windows = unbroken(Segments(np.array([0, 25]), np.array([25, 60]), 0))
    found = kn5_nats(train, tokens, 0, 17, windows=windows)
    alone = [kn5_nats(train, part, 0, 17) for part in (tokens[:25], tokens[25:])]
    np.testing.assert_array_equal(found, np.concatenate(alone))
    assert (found != kn5_nats(train, tokens, 0, 17)).any()


def test_kneser_ney_beats_unigrams_where_tokens_depend_on_each_other() -> None:
    train, tokens = text(3000, 17), text(3500, 17)[3000:]
    assert kn5_nats(train, tokens, 0, 17).mean() < 0.7 * unigram_nats(train, tokens, 17).mean()


def test_compressors_are_those_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    words = [bytes(rng.choices(b"etaoin", k=rng.randint(2, 7))) for _ in range(500)]
    data = b" ".join(rng.choice(words) for _ in range(20_000))
    xz = len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    found = compressed_bits_per_byte(data)
    assert found == {"xz": 8 * xz / len(data), "gzip": 8 * len(gzip.compress(data, 9)) / len(data)}
    monkeypatch.setattr(baselines, "PIECE_BYTES", 1000)
    assert compressed_bits_per_byte(data)["xz"] == found["xz"]


def test_a_text_of_one_repeated_byte_compresses_to_almost_nothing_and_noise_not_at_all() -> None:
    repeated = compressed_bits_per_byte(b"a" * 200_000)
    noise = compressed_bits_per_byte(random.Random(1).randbytes(200_000))
    assert max(repeated.values()) < 0.02
    assert 8 < min(noise.values()) <= max(noise.values()) < 8.02


def test_there_is_nothing_to_compress_in_an_empty_text() -> None:
    with pytest.raises(DataError, match="empty"):
        compressed_bits_per_byte(b"")


def test_uniform_probabilities_are_what_unigrams_of_an_empty_train_are() -> None:
    nats = unigram_nats(np.zeros(0, dtype=np.uint16), np.arange(4), 4)
    assert nats.tolist() == pytest.approx([math.log(4)] * 4)
