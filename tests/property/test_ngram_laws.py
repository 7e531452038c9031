"""Laws of the Kneser-Ney model: its probabilities are those of the formulas, written down a second time with dicts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkit.config.model import NgramConfig
from lmkit.models.base import IGNORE
from lmkit.models.ngram import NO_TOKEN, KneserNey

EOS = 0
MAX_VOCAB = 6

streams = st.lists(st.integers(0, MAX_VOCAB - 1), min_size=1, max_size=60)
long_streams = st.builds(
    lambda seed, size, p: np.random.default_rng(seed).geometric(p, size).clip(max=MAX_VOCAB) - 1,
    st.integers(0, 10_000),
    st.integers(100, 400),
    st.sampled_from([0.2, 0.4]),
).map(lambda a: [int(i) for i in a])
texts = st.one_of(streams, long_streams)
orders = st.integers(1, 4)


def fitted(text: Sequence[int], order: int, vocab_size: int = MAX_VOCAB) -> KneserNey:
    model = KneserNey(NgramConfig(order=order), vocab_size)
    model.fit(np.array(text, dtype=np.uint8), eos_id=EOS)
    return model


def hidden_of(model: KneserNey, histories: Sequence[tuple[int, ...]]) -> torch.Tensor:
    size = model.config.order - 1
    rows = [([NO_TOKEN] * size + list(history))[len(history) :] for history in histories]
    return torch.tensor(rows, dtype=torch.int64).view(len(histories), size)


BEGIN, END = -7, EOS


class Reference:
    """The model by sentences and sets: a begin symbol of its own, and contexts as tuples."""

    def __init__(self, text: Sequence[int], order: int, vocab_size: int) -> None:
        self.order, self.vocab_size = order, vocab_size
        sentences: list[list[int]] = [[BEGIN]]
        for token in text:
            sentences[-1].append(token)
            if token == END:
                sentences.append([BEGIN])
        occurrences: Counter[tuple[int, ...]] = Counter()
        preceded_by: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for sentence in sentences:
            for end in range(2, len(sentence) + 1):
                for k in range(1, order + 1):
                    if end - k < 0:
                        continue
                    gram = tuple(sentence[end - k : end])
                    occurrences[gram] += 1
                    if end - k > 0:
                        preceded_by[gram].add(sentence[end - k - 1])
        self.counts: dict[tuple[int, ...], int] = {
            gram: n if len(gram) == order or gram[0] == BEGIN else len(preceded_by[gram])
            for gram, n in occurrences.items()
        }
        self.followers: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)
        for gram, n in self.counts.items():
            self.followers[gram[:-1]][gram[-1]] = n
        self.discounts = {k: self._discounts(k) for k in range(1, order + 1)}

    def _discounts(self, k: int) -> list[float]:
        n = [sum(1 for gram, c in self.counts.items() if len(gram) == k and c == i) for i in range(5)]
        if 0 in n[1:]:
            return [0.5, 1.0, 1.5]
        y = n[1] / (n[1] + 2 * n[2])
        found = [i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)]
        return found if all(0 < found[i - 1] < i for i in (1, 2, 3)) else [0.5, 1.0, 1.5]

    def prob(self, history: tuple[int, ...], token: int) -> float:
        """P(token | history); the history is cut at its last END, which is read as BEGIN."""
        for i, earlier in reversed(list(enumerate(history))):
            if earlier == END:
                history = (BEGIN, *history[i + 1 :])
                break
        return self._prob(history[max(0, len(history) - self.order + 1) :], token)

    def _prob(self, history: tuple[int, ...], token: int) -> float:
        lower = self._prob(history[1:], token) if history else 1 / self.vocab_size
        followers = self.followers.get(history)
        if not followers:
            return lower
        discounts = self.discounts[len(history) + 1]
        total = sum(followers.values())
        count = followers.get(token, 0)
        own = count - discounts[min(count, 3) - 1] if count else 0.0
        left = sum(discounts[min(c, 3) - 1] for c in followers.values())
        return own / total + left / total * lower


@settings(max_examples=60, deadline=None)
@given(text=texts, order=orders, others=st.lists(st.integers(0, MAX_VOCAB - 1), max_size=12))
def test_every_probability_is_that_of_the_formulas(text: list[int], order: int, others: list[int]) -> None:
    model, reference = fitted(text, order), Reference(text, order, MAX_VOCAB)
    for read in (text[:25], others):
        hidden, _ = model(torch.tensor([[EOS, *read]]))
        probs = model.head.logits(hidden[0]).double().exp()
        for i, row in enumerate(probs.tolist()):
            expected = [reference.prob((EOS, *read[:i]), token) for token in range(MAX_VOCAB)]
            assert row == pytest.approx(expected, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    text=texts,
    order=orders,
    histories=st.lists(st.lists(st.integers(0, MAX_VOCAB), max_size=3).map(tuple), min_size=1, max_size=8),
)
def test_probabilities_sum_to_one_after_any_history_seen_or_not(
    text: list[int], order: int, histories: list[tuple[int, ...]]
) -> None:
    model = fitted(text, order, MAX_VOCAB + 1)  # token MAX_VOCAB never occurs
    log_probs = model.head.logits(hidden_of(model, [history[len(history) - order + 1 :] for history in histories]))
    assert bool(torch.isfinite(log_probs).all())
    torch.testing.assert_close(log_probs.double().exp().sum(1), torch.ones(len(histories)).double(), atol=1e-5, rtol=0)


@settings(max_examples=40, deadline=None)
@given(text=texts, order=orders, read=streams)
def test_scores_agree_with_logits(text: list[int], order: int, read: list[int]) -> None:
    model = fitted(text, order)
    hidden, _ = model(torch.tensor([[EOS, *read[:-1]]]))
    targets = torch.tensor(read)
    log_probs, scores = model.head.logits(hidden[0]), model.head.score(hidden[0], targets)
    at_target = log_probs.gather(1, targets[:, None]).squeeze(1)
    assert torch.equal(scores.nats_N, -at_target)
    best, second = log_probs.topk(2, dim=1).values.T
    assert not bool((scores.correct_N & (at_target < best - 1e-6)).any())
    assert bool(scores.correct_N[(at_target == best) & (second < best - 1e-6)].all())
    assert float(model.head.loss(hidden[0], targets)) == pytest.approx(float(scores.nats_N.sum()), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(text=texts, order=orders, read=streams)
def test_exactly_one_token_is_the_best(text: list[int], order: int, read: list[int]) -> None:
    model = fitted(text, order)
    hidden, _ = model(torch.tensor([read]))
    correct = torch.stack(
        [model.head.score(hidden[0], torch.full((len(read),), token)).correct_N for token in range(MAX_VOCAB)]
    )
    assert correct.sum(0).tolist() == [1] * len(read)


@settings(max_examples=40, deadline=None)
@given(text=streams, order=st.integers(1, 6), read=streams, cuts=st.lists(st.integers(0, 60), max_size=4))
def test_reading_in_pieces_with_the_state_is_reading_at_once(
    text: list[int], order: int, read: list[int], cuts: list[int]
) -> None:
    model = fitted(text, order)
    tokens = torch.tensor([read, read[::-1]])
    whole, last = model(tokens)
    state, pieces = None, []
    edges = sorted({0, len(read), *(min(c, len(read)) for c in cuts)})
    for start, end in pairwise(edges):
        piece, state = model(tokens[:, start:end], state, use_state=True)
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert state is not None
    assert torch.equal(state.history_BH, last.history_BH)


@settings(max_examples=20, deadline=None)
@given(text=streams, order=st.integers(1, 8), read=streams)
def test_nothing_before_an_eos_is_remembered(text: list[int], order: int, read: list[int]) -> None:
    model = fitted(text, order)
    with_past, _ = model(torch.tensor([[1, 2, 3, EOS, *read]]))
    without, _ = model(torch.tensor([[EOS, *read]]))
    assert torch.equal(with_past[:, 3:], without)


@settings(max_examples=20, deadline=None)
@given(text=texts, order=orders)
def test_a_model_is_its_state_dict(text: list[int], order: int) -> None:
    model, fresh = fitted(text, order), KneserNey(NgramConfig(order=order), MAX_VOCAB)
    fresh.load_state_dict(model.state_dict())
    hidden, _ = fresh(torch.tensor([[EOS, *text[:20]]]))
    assert torch.equal(fresh.head.logits(hidden[0]), model.head.logits(hidden[0]))
    targets = torch.tensor([*text[:20], IGNORE])[: hidden.shape[1]]
    ours, theirs = fresh.head.score(hidden[0], targets), model.head.score(hidden[0], targets)
    assert torch.equal(ours.nats_N, theirs.nats_N)
    assert torch.equal(ours.correct_N, theirs.correct_N)
    assert fresh.num_parameters() == model.num_parameters() > 0


def test_the_reference_uses_estimated_discounts_too() -> None:
    rng = np.random.default_rng(0)
    text = [int(i) for i in rng.zipf(1.5, 4000).clip(max=200) - 1]
    model, reference = fitted(text, 3, 200), Reference(text, 3, 200)
    assert all(found != [0.5, 1.0, 1.5] for found in reference.discounts.values())
    hidden, _ = model(torch.tensor([[EOS, *text[:50]]]))
    nats = model.head.score(hidden[0, :50], torch.tensor(text[:50])).nats_N.tolist()
    expected = [-math.log(reference.prob((EOS, *text[:i]), text[i])) for i in range(50)]
    assert nats == pytest.approx(expected, rel=1e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), branches=st.integers(2, 3))
def test_the_training_text_gets_likelier_with_each_token_of_context_that_matters(seed: int, branches: int) -> None:
    """Each token is one of few that depend on the two before it, so that three is the last order that must help."""
    rng = np.random.default_rng(seed)
    allowed = rng.integers(1, 12, (12, 12, branches))
    text = [1, 2]
    while len(text) < 1500:
        text.append(int(rng.choice(allowed[text[-2], text[-1]])) if len(text) % 40 else EOS)
    nats = []
    for order in (1, 2, 3):
        model = fitted(text, order, 12)
        hidden, _ = model(torch.tensor([[EOS, *text[:-1]]]))
        nats.append(float(model.head.loss(hidden[0], torch.tensor(text))))
    assert nats[0] > nats[1] > nats[2]
