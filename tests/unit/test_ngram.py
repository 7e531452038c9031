"""The Kneser-Ney model: worked examples, damaged tables, and the published perplexities."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lmkit.config.model import NgramConfig
from lmkit.errors import DataError
from lmkit.models.base import IGNORE
from lmkit.models.counts import FALLBACK_DISCOUNTS, discounts
from lmkit.models.ngram import NO_TOKEN, KneserNey

EOS, VOCAB = 0, 5
TEXT = np.array([1, 2, 3, 0, 1, 2, 2, 0, 0, 3, 1, 2, 3], dtype=np.uint16)


def fitted(order: int = 3) -> KneserNey:
    model = KneserNey(NgramConfig(order=order), VOCAB)
    model.fit(TEXT, eos_id=EOS)
    return model


def test_a_unigram_model_is_discounted_counts_and_a_share_for_every_token() -> None:
    model = fitted(order=1)
    hidden, _ = model(torch.tensor([[EOS]]))
    assert hidden.shape == (1, 1, 0)
    # Counts 3, 3, 4, 3, 0 of 13; none occurs once, so that D(3 and more) is the fallback.
    share = 4 * FALLBACK_DISCOUNTS[2] / 13 / VOCAB
    expected = [(c - FALLBACK_DISCOUNTS[2]) / 13 + share for c in (3, 3, 4, 3)] + [share]
    assert model.head.logits(hidden[0]).exp()[0].tolist() == pytest.approx(expected)


def test_discounts_follow_from_the_counts_of_counts() -> None:
    counts = np.repeat([1, 2, 3, 4, 9], [40, 20, 10, 6, 3])
    y = 40 / (40 + 2 * 20)
    assert discounts(counts) == pytest.approx((1 - 2 * y * 20 / 40, 2 - 3 * y * 10 / 20, 3 - 4 * y * 6 / 10))


@pytest.mark.parametrize("numbers", [[5, 0, 0, 0], [0, 5, 5, 5], [5, 5, 5, 0], [1, 1, 50, 1], [50, 1, 5, 5]], ids=str)
def test_discounts_that_cannot_be_estimated_are_the_fallback(numbers: list[int]) -> None:
    assert discounts(np.repeat([1, 2, 3, 4], numbers)) == FALLBACK_DISCOUNTS


def test_before_counting_every_token_is_equally_probable() -> None:
    model = KneserNey(NgramConfig(order=4), VOCAB)
    hidden, _ = model(torch.tensor([[1, 2, 0, 3]]))
    scores = model.head.score(hidden[0], torch.tensor([0, 1, 2, IGNORE]))
    assert scores.nats_N.tolist() == pytest.approx([math.log(VOCAB)] * 3 + [0.0])
    assert scores.correct_N.tolist() == [True, False, False, False]
    torch.testing.assert_close(model.head.logits(hidden[0]).exp(), torch.full((4, VOCAB), 1 / VOCAB))
    assert model.num_parameters() == 0


def test_the_hidden_vector_is_the_history_and_restarts_with_eos() -> None:
    hidden, state = fitted(order=4)(torch.tensor([[1, 2, 3, 4, 0, 2, 0, 0, 1]]))
    none = NO_TOKEN
    assert hidden[0].tolist() == [
        [none, none, 1],
        [none, 1, 2],
        [1, 2, 3],
        [2, 3, 4],
        [none, none, 0],
        [none, 0, 2],
        [none, none, 0],
        [none, none, 0],
        [none, 0, 1],
    ]
    assert state.history_BH.tolist() == [[none, 0, 1]]


def test_the_state_can_be_selected_stored_and_restored() -> None:
    model = fitted()
    _, state = model(torch.tensor([[1, 2], [3, 1]]))
    assert state.detach().select(torch.tensor([1, 1, 0])).history_BH.tolist() == [[3, 1], [3, 1], [1, 2]]
    assert torch.equal(model.state_from_tensors(state.tensors()).history_BH, state.history_BH)


def test_ignored_targets_cost_nothing_and_are_never_correct() -> None:
    model = fitted()
    hidden, _ = model(torch.tensor([[0, 1, 2, 3]]))
    targets = torch.tensor([1, IGNORE, IGNORE, 0])
    scores = model.head.score(hidden[0], targets)
    assert scores.nats_N[1:3].tolist() == [0.0, 0.0]
    assert not scores.correct_N[1:3].any()
    assert float(model.head.loss(hidden[0], targets)) == pytest.approx(float(scores.nats_N.sum()))


def test_a_long_monotonous_text_still_leaves_every_token_a_finite_score() -> None:
    model = KneserNey(NgramConfig(order=8), 10)
    model.fit(np.tile(np.arange(10, dtype=np.uint8), 20_000), eos_id=0)
    hidden, _ = model(torch.tensor([list(range(10))]))
    scores = model.head.score(hidden[0], torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 8, 0]))
    assert scores.correct_N.tolist() == [True] * 8 + [False, True]
    assert 10 < float(scores.nats_N[8]) < 100


@pytest.mark.parametrize(
    ("text", "said"),
    [([], "the training text is empty"), ([1, 2, VOCAB], f"{VOCAB} at position 2"), ([1, -1], "-1 at position 1")],
    ids=["empty", "too large", "negative"],
)
def test_a_text_that_cannot_be_counted_is_refused(text: list[int], said: str) -> None:
    model = KneserNey(NgramConfig(order=2), VOCAB)
    with pytest.raises(DataError, match=said):
        model.fit(np.array(text, dtype=np.int64), eos_id=EOS)


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    model = fitted()
    with pytest.raises(IndexError):
        model(torch.tensor([[1, token]]))
    hidden, _ = model(torch.tensor([[1, 2]]))
    with pytest.raises(IndexError):
        model.head.score(hidden[0], torch.tensor([1, token]))


def _set(index: int, value: float) -> Callable[[Tensor], Tensor]:
    def damaged(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return damaged


DAMAGES: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("eos", lambda t: torch.tensor(VOCAB)),
    ("eos", lambda t: torch.tensor(-2)),
    ("eos", lambda t: t[None]),
    ("eos", lambda t: t.float()),
    ("contexts_1", _set(0, 1)),
    ("contexts_1", lambda t: t[:0]),
    ("contexts_2", lambda t: t.flip(0)),
    ("contexts_2", _set(0, -1)),
    ("contexts_3", _set(-1, 10**6)),
    ("contexts_3", lambda t: t[:-1]),
    ("ngrams_2", lambda t: t.flip(0)),
    ("ngrams_2", lambda t: t.repeat_interleave(2)),
    ("ngrams_1", _set(-1, VOCAB)),
    ("ngrams_3", _set(0, -1)),
    ("ngrams_3", lambda t: t.int()),
    ("log_probs_1", lambda t: t[:-1]),
    ("log_probs_2", _set(0, math.nan)),
    ("log_probs_3", _set(0, -math.inf)),
    ("log_probs_3", _set(-1, 0.5)),
    ("log_probs_3", lambda t: t[:, None]),
    ("log_probs_3", lambda t: t.double()),
    ("log_backoffs_1", _set(0, 0.5)),
    ("log_backoffs_2", _set(0, math.nan)),
    ("log_backoffs_3", _set(0, math.inf)),
    ("log_backoffs_3", lambda t: torch.cat([t, t[:1]])),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=[f"{i}-{d[0]}" for i, d in enumerate(DAMAGES)])
def test_damaged_tables_are_refused_by_name_and_change_nothing(name: str, damage: Callable[[Tensor], Tensor]) -> None:
    stored = {key: value.clone() for key, value in fitted().state_dict().items()}
    stored[f"head.{name}"] = damage(stored[f"head.{name}"])
    fresh = KneserNey(NgramConfig(order=3), VOCAB)
    with pytest.raises(RuntimeError, match=rf"head\.\w+_?{name[-1]} "):
        fresh.load_state_dict(stored)
    assert fresh.num_parameters() == 0


def test_missing_and_unexpected_tables_are_refused() -> None:
    stored = fitted(order=3).state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        KneserNey(NgramConfig(order=4), VOCAB).load_state_dict(stored)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        KneserNey(NgramConfig(order=2), VOCAB).load_state_dict(stored)
    with pytest.raises(RuntimeError, match="is not within"):
        KneserNey(NgramConfig(order=3), VOCAB - 2).load_state_dict(stored)


def test_loading_copies_and_the_tables_hold_no_infinity() -> None:
    model, fresh = fitted(), KneserNey(NgramConfig(order=3), VOCAB)
    stored = model.state_dict()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in stored.values())
    assert {str(tensor.dtype) for tensor in stored.values()} == {"torch.int64", "torch.float32"}
    fresh.load_state_dict(stored)
    stored["head.log_probs_1"].zero_()
    assert bool((fresh.head.level(1).log_probs_G < 0).all())


def test_an_uncounted_model_can_be_stored_and_loaded_into_a_counted_one() -> None:
    model = fitted()
    model.load_state_dict(KneserNey(NgramConfig(order=3), VOCAB).state_dict())
    assert model.num_parameters() == 0


def read_words(paths: list[Path]) -> tuple[dict[str, int], list[np.ndarray]]:
    ids: dict[str, int] = {}
    texts = []
    for path in paths:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        words = (word for line in lines for word in [*line.split(), "<eos>"])
        texts.append(np.array([ids.setdefault(word, len(ids)) for word in words], dtype=np.uint16))
    return ids, texts


needs_corpora = pytest.mark.skipif(
    "LMKIT_DATA" not in os.environ, reason="LMKIT_DATA does not name a folder with the corpora"
)


def perplexity_and_accuracy(model: KneserNey, text: np.ndarray, eos_id: int) -> tuple[float, float]:
    targets = torch.from_numpy(text.astype(np.int64))
    hidden, _ = model(torch.cat([torch.tensor([eos_id]), targets[:-1]])[None])
    scores = model.head.score(hidden[0], targets)
    return math.exp(float(scores.nats_N.double().mean())), float(scores.correct_N.double().mean())


@pytest.mark.corpora
@needs_corpora
@pytest.mark.parametrize(
    ("folder", "names", "published"),
    [
        ("ptb", "ptb.{}.txt", (148.41, 141.46)),
        ("wikitext-2", "wiki.{}.tokens", (233.93, 219.27)),
    ],
)
def test_perplexities_are_within_one_percent_of_the_published(
    folder: str, names: str, published: tuple[float, float]
) -> None:
    root = Path(os.environ["LMKIT_DATA"]) / folder
    ids, (train, *others) = read_words([root / names.format(split) for split in ("train", "valid", "test")])
    model = KneserNey(NgramConfig(), len(ids))
    model.fit(train, eos_id=ids["<eos>"])
    for text, expected in zip(others, published, strict=True):
        perplexity, accuracy = perplexity_and_accuracy(model, text, ids["<eos>"])
        assert perplexity == pytest.approx(expected, rel=0.01)
        assert 0.2 < accuracy < 0.25


@pytest.mark.corpora
@needs_corpora
def test_the_perplexity_of_the_training_text_falls_with_every_order() -> None:
    ids, (train,) = read_words([Path(os.environ["LMKIT_DATA"]) / "ptb" / "ptb.train.txt"])
    perplexities = []
    for order in range(1, 6):
        model = KneserNey(NgramConfig(order=order), len(ids))
        model.fit(train, eos_id=ids["<eos>"])
        perplexities.append(perplexity_and_accuracy(model, train, ids["<eos>"])[0])
    assert perplexities == sorted(perplexities, reverse=True)
