"""Caches against plain loops: what was counted, and what followed where the hidden vector was similar."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmkit.config.machine import Precision
from lmkit.config.model import Cell, NgramConfig, RecurrentConfig, TransformerConfig
from lmkit.device import Device
from lmkit.evaluation import caches
from lmkit.evaluation.caches import NeuralCache, filled, similarities, theta_grid, unigram_cache
from lmkit.evaluation.plan import Indices, Segments, Windows, sliding, unbroken
from lmkit.evaluation.scoring import own_scores, score
from lmkit.models.base import LanguageModel, Scores
from lmkit.models.ngram import KneserNey

CPU = Device(torch.device("cpu"), Precision.fp32, False, False, "cpu")
VOCAB, EOS = 13, 1


def text(num_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, num_tokens).astype(np.uint8)


def model(family: str) -> LanguageModel:
    """With hidden vectors long enough that similarities differ."""
    if family == "transformer":
        config = TransformerConfig(d_model=8, num_layers=1, num_heads=2, context=10)
        return config.build(VOCAB, seed=1).eval()
    made = RecurrentConfig(cell=Cell(family), d_embed=8, d_hidden=8, num_layers=1).build(VOCAB, seed=1)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(3.0)
    return made.eval()


def plan(family: str, num_tokens: int) -> Windows:
    whole = Segments.whole(num_tokens, EOS)
    return sliding(whole, 10, 4) if family == "transformer" else unbroken(whole)


def cached(
    one: LanguageModel, tokens: np.ndarray, windows: Windows, window: int, thetas: list[float], *, seq_len: int = 7
) -> NeuralCache:
    """The cache after the text has been scored through it."""
    cache = NeuralCache(len(tokens), window, thetas)
    seq_len = seq_len if one.context is None else one.context
    scorer = cache.wrap(own_scores(one))
    found = score(one, tokens, windows, seq_len=seq_len, batch_size=1, device=CPU, scorer=scorer)
    plain = score(one, tokens, windows, seq_len=seq_len, batch_size=1, device=CPU)
    assert np.array_equal(found.nats_N, plain.nats_N, equal_nan=True), "the scores of the model itself are not touched"
    return cache


@torch.inference_mode()
def hidden_vectors(one: LanguageModel, tokens: np.ndarray, windows: Windows) -> list[list[float]]:
    """The vector that each token is predicted from, window by window."""
    vectors: dict[int, list[float]] = {}
    for begin, scored, end, prefix in zip(
        windows.begins_W, windows.scored_W, windows.ends_W, windows.prefix_W, strict=True
    ):
        first = int(prefix) if prefix >= 0 else int(tokens[begin - 1])
        inputs = [first, *map(int, tokens[begin : end - 1])]
        hidden_BTD, _ = one(torch.tensor([inputs]))
        for position in range(scored, end):
            vectors[position] = hidden_BTD[0, position - begin].double().tolist()
    return [vectors[i] for i in range(len(tokens))]


def by_loops(vectors: list[list[float]], tokens: np.ndarray, window: int, theta: float) -> list[float]:
    """Grave et al. 2017, equation 3, term by term."""
    nats = [math.nan]
    for t in range(1, len(tokens)):
        total = own = 0.0
        for i in range(max(0, t - window), t):
            weight = math.exp(theta * math.fsum(a * b for a, b in zip(vectors[t], vectors[i], strict=True)))
            total += weight
            if tokens[i] == tokens[t]:
                own += weight
        nats.append(math.inf if own == 0 else math.log(total / own))
    return nats


# The unigram cache


@given(st.lists(st.integers(0, 4), max_size=60), st.integers(1, 70))
def test_the_unigram_cache_counts_the_tokens_of_its_window(ids: list[int], window: int) -> None:
    found = unigram_cache(np.array(ids, dtype=np.uint16), window)
    for i, token in enumerate(ids):
        before = Counter(ids[max(0, i - window) : i])
        if i == 0:
            assert np.isnan(found[i])
        elif before[token] == 0:
            assert found[i] == np.inf
        else:
            assert found[i] == pytest.approx(-math.log(before[token] / before.total()), rel=1e-6, abs=1e-6)


def test_the_unigram_cache_of_an_empty_text_is_empty() -> None:
    assert len(unigram_cache(np.zeros(0, np.uint8), 5)) == 0


# The neural cache


@pytest.mark.parametrize("family", ["lstm", "gru", "transformer"])
@pytest.mark.parametrize("window", [1, 5, 1000])
def test_the_neural_cache_is_its_equation_for_two_thetas_at_once(
    family: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "ROWS", 3)
    one, tokens = model(family), text(41)
    windows = plan(family, len(tokens))
    thetas = [0.1, 0.7]
    cache = cached(one, tokens, windows, window, thetas)
    vectors = hidden_vectors(one, tokens, windows)
    for k, theta in enumerate(thetas):
        expected = by_loops(vectors, tokens, window, theta)
        assert math.isnan(expected[0])
        np.testing.assert_allclose(cache.nats_KN[k], expected, rtol=2e-3, atol=1e-4)
    finite = np.isfinite(cache.nats_KN).all(0)
    if window > 1:
        assert not np.allclose(cache.nats_KN[0, finite], cache.nats_KN[1, finite], rtol=1e-2), "theta matters"


@pytest.mark.parametrize("rows", [1, 2, 512])
@pytest.mark.parametrize("seq_len", [1, 7, 100])
def test_the_neural_cache_does_not_depend_on_how_the_text_is_cut(
    rows: int, seq_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, tokens = model("lstm"), text(60)
    windows = plan("lstm", len(tokens))
    whole = cached(one, tokens, windows, 9, [0.5], seq_len=1000)
    monkeypatch.setattr(caches, "ROWS", rows)
    pieces = cached(one, tokens, windows, 9, [0.5], seq_len=seq_len)
    np.testing.assert_allclose(pieces.nats_KN, whole.nats_KN, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["lstm", "transformer"])
@pytest.mark.parametrize("window", [1, 4, 50, 51, 1000])
def test_with_theta_0_the_neural_cache_is_the_unigram_cache(family: str, window: int) -> None:
    one, tokens = model(family), text(50)
    cache = cached(one, tokens, plan(family, len(tokens)), window, [0.0])
    np.testing.assert_allclose(cache.nats_KN[0], unigram_cache(tokens, window), rtol=1e-5, atol=1e-6)


@given(st.integers(2, 20), st.integers(1, 25), st.floats(0, 3), st.integers(0, 50))
@settings(max_examples=12, deadline=None)
def test_the_probabilities_of_the_cache_sum_to_one(length: int, window: int, theta: float, seed: int) -> None:
    """The same text with each possible last token."""
    one, tokens = model("lstm"), text(length, seed)
    total = 0.0
    for token in range(VOCAB):
        tokens[-1] = token
        cache = cached(one, tokens, plan("lstm", length), window, [theta])
        total += math.exp(-float(cache.nats_KN[0, -1]))
    assert total == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("family", ["lstm", "transformer"])
def test_tokens_come_to_the_scorer_in_the_order_of_the_text(family: str) -> None:
    one, tokens = model(family), text(57)
    seen: list[int] = []

    def scorer(hidden_ND: Tensor, targets_N: Tensor, positions_N: Indices) -> Scores:
        assert targets_N.tolist() == tokens[positions_N].tolist()
        seen.extend(positions_N.tolist())
        return own_scores(one)(hidden_ND, targets_N, positions_N)

    seq_len = 7 if one.context is None else one.context
    score(one, tokens, plan(family, 57), seq_len=seq_len, batch_size=1, device=CPU, scorer=scorer)
    assert seen == list(range(57))


def test_lines_of_different_length_come_in_the_order_of_the_text_too() -> None:
    one, tokens = model("lstm"), text(57)
    segments = Segments.ending_with(tokens == EOS, EOS)
    assert len(set((segments.ends_S - segments.begins_S).tolist())) > 1
    seen: list[int] = []

    def scorer(hidden_ND: Tensor, targets_N: Tensor, positions_N: Indices) -> Scores:
        seen.extend(positions_N.tolist())
        return own_scores(one)(hidden_ND, targets_N, positions_N)

    score(one, tokens, unbroken(segments), seq_len=7, batch_size=1, device=CPU, scorer=scorer)
    assert seen == list(range(57))


def test_tokens_that_are_not_scored_have_no_place_in_the_cache() -> None:
    one, tokens = model("lstm"), text(40)
    windows = unbroken(Segments.stripes(40, 4))
    cache = cached(one, tokens, windows, 1000, [0.0])
    scored = [i for i in range(40) if i % 10]
    expected = np.full(40, np.nan)
    expected[scored] = unigram_cache(tokens[scored], 1000)
    np.testing.assert_allclose(cache.nats_KN[0], expected, rtol=1e-5, atol=1e-6)


def test_similarities_that_would_overflow_are_ordinary_numbers() -> None:
    one, tokens = model("lstm"), np.array([2, 3, 2, 3, 2, 3, 2], dtype=np.uint8)
    found = cached(one, tokens, plan("lstm", 7), 100, [1e6]).nats_KN[0]
    assert np.isnan(found[0])
    assert not np.isnan(found[1:]).any()
    assert (found[1:] >= 0).all()


def test_similarities_are_not_rounded_where_the_model_computes_in_bf16() -> None:
    vectors = 3 * torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    exact = similarities(vectors, vectors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = similarities(vectors, vectors)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact)


def test_a_cache_remembers_no_more_than_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "ROWS", 4)
    cache = cached(model("lstm"), text(60), plan("lstm", 60), 11, [0.5])
    assert cache._hidden_SD is not None
    assert len(cache._hidden_SD) == len(cache._tokens_S) == 11


def test_where_the_cache_is_empty_the_model_speaks_for_it() -> None:
    cache, own = np.array([np.nan, np.inf, 0.5], np.float32), np.array([1.0, 2.0, 3.0], np.float32)
    assert filled(cache, own).tolist() == [1.0, math.inf, 0.5]


def kneser_ney() -> KneserNey:
    one = KneserNey(NgramConfig(order=3), VOCAB)
    one.fit(text(300), eos_id=EOS)
    return one


def test_the_similarity_of_two_histories_is_the_number_of_last_tokens_that_they_share() -> None:
    """-1 stands for no token, which is like nothing, not even itself."""
    histories = torch.tensor([[7, 1, 2], [8, 1, 2], [7, 1, 3], [-1, 1, 2], [-1, -1, 2]])
    expected = [[3, 2, 0, 2, 1], [2, 3, 0, 2, 1], [0, 0, 3, 0, 0], [2, 2, 0, 2, 1], [1, 1, 0, 1, 1]]
    assert similarities(histories, histories).tolist() == expected


def test_an_n_gram_model_has_a_neural_cache_that_prefers_what_followed_the_same_words() -> None:
    one = kneser_ney()
    tokens = np.array([2, 3, 4, 2, 5, 3, 6, 2, 3, 4], dtype=np.uint8)
    found = cached(one, tokens, unbroken(Segments.whole(10, EOS)), 100, [0.0, 5.0])
    np.testing.assert_allclose(found.nats_KN[0], unigram_cache(tokens, 100), rtol=1e-5, atol=1e-6)
    assert found.nats_KN[1, -1] < 0.05 < found.nats_KN[0, -1], "4 followed 2 3 before"


def test_the_thetas_to_try_make_similarities_of_order_one() -> None:
    vectors = 10 * torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    grid = theta_grid(vectors)
    assert grid == sorted(grid)
    mean_square = float(vectors.square().sum(1).mean())
    assert grid[0] * mean_square == pytest.approx(1.0, rel=1e-5)
    assert theta_grid(10 * vectors)[0] == pytest.approx(grid[0] / 100, rel=1e-4)
