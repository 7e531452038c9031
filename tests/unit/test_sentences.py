"""Sentences of a text and batches of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkit.data.sentences import POOL_BATCHES, SentenceBatches, Sentences
from lmkit.errors import DataError
from lmkit.models.base import IGNORE

EOS, NEWLINE = 0, 1
ENDS_LINE = np.array([True, False, False, False])
ENDS_NEWLINE = np.array([False, True, False, False])


def texts(found: Sentences) -> list[list[int]]:
    return [found.tokens[b:e].tolist() for b, e in zip(found.begins_S, found.ends_S, strict=True)]


def test_a_word_level_text_is_cut_behind_each_eos() -> None:
    tokens = np.array([2, 3, EOS, EOS, 3, EOS], dtype=np.uint8)
    assert texts(Sentences.of(tokens, ENDS_LINE, EOS)) == [[2, 3, EOS], [EOS], [3, EOS]]


def test_other_texts_are_cut_behind_each_newline_and_documents_ends_are_left_out() -> None:
    tokens = np.array([2, 3, NEWLINE, 2, EOS, EOS, 3, NEWLINE, EOS, 2], dtype=np.uint8)
    assert texts(Sentences.of(tokens, ENDS_NEWLINE, EOS)) == [[2, 3, NEWLINE], [2], [3, NEWLINE], [2]]


def test_long_sentences_are_cut_and_a_text_of_nothing_is_an_error() -> None:
    tokens = np.array([2, 3, 2, 3, EOS, 2, EOS], dtype=np.uint8)
    assert texts(Sentences.of(tokens, ENDS_LINE, EOS, longest=2)) == [[2, 3], [2, EOS]]
    for empty in ([], [EOS, EOS]):
        with pytest.raises(DataError, match="no sentences"):
            Sentences.of(np.array(empty, dtype=np.uint8), ENDS_NEWLINE, EOS)


def test_inputs_are_the_tokens_before_and_eos_before_the_first() -> None:
    tokens = np.array([2, 3, EOS, 3, EOS], dtype=np.uint8)
    batch = Sentences.of(tokens, ENDS_LINE, EOS).batch(np.array([1, 0]))
    assert batch.inputs_BT.tolist() == [[EOS, 3, EOS], [EOS, 2, 3]]
    assert batch.targets_BT.tolist() == [[3, EOS, IGNORE], [2, 3, EOS]]
    assert (batch.num_targets, batch.starts_text) == (5, True)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=300), size=st.integers(1, 5), seed=st.integers(0, 99))
def test_over_an_epoch_every_sentence_is_read_exactly_once(lengths: list[int], size: int, seed: int) -> None:
    tokens = np.concatenate([np.append(np.full(n - 1, 2), EOS) for n in lengths]).astype(np.uint8)
    found = Sentences.of(tokens, ENDS_LINE, EOS)
    batches = SentenceBatches(found, size, seed)
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        rows = [row for step in steps for row in (batches[step].targets_BT != IGNORE).sum(1).tolist()]
        assert Counter(rows) == Counter(lengths)


def test_epochs_and_seeds_differ_and_a_step_is_always_the_same() -> None:
    generator = np.random.default_rng(0)
    tokens = np.concatenate([np.append(generator.integers(1, 4, n), EOS) for n in generator.integers(1, 30, 2000)])
    found = Sentences.of(tokens.astype(np.uint8), ENDS_LINE, EOS)
    batches = SentenceBatches(found, 8, 1)
    again, other = SentenceBatches(found, 8, 1), SentenceBatches(found, 8, 2)
    assert batches[37].targets_BT.tolist() == again[37].targets_BT.tolist()
    assert batches[37].targets_BT.tolist() != other[37].targets_BT.tolist()
    assert batches[37].targets_BT.tolist() != batches[37 + batches.steps_per_epoch].targets_BT.tolist()
    with pytest.raises(IndexError):
        batches[-1]


def test_sentences_of_a_batch_have_about_the_same_length_and_batches_come_in_any_order() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 60, 32 * POOL_BATCHES)
    tokens = np.concatenate([np.append(np.full(n - 1, 2), EOS) for n in lengths]).astype(np.uint8)
    batches = SentenceBatches(Sentences.of(tokens, ENDS_LINE, EOS), 32, 1)
    made = [batches[step] for step in range(batches.steps_per_epoch)]
    padded = sum(int((b.targets_BT == IGNORE).sum()) for b in made) / sum(b.targets_BT.numel() for b in made)
    assert padded < 0.05
    widths = [b.targets_BT.shape[1] for b in made]
    assert widths != sorted(widths)
