"""Mixtures against plain probabilities: what EM finds is what a search finds, and nothing is lost by mixing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkit.evaluation.mixture import averaged, best_weights, mixed

NUM_TOKENS = 300


def nats(seed: int, mean: float = 2.0, num_tokens: int = NUM_TOKENS) -> np.ndarray:
    """Nats like those of a model: mostly small, some large."""
    return np.random.default_rng(seed).gamma(1.5, mean / 1.5, num_tokens).astype(np.float32)


def cost(members: list[np.ndarray], weights: tuple[float, ...]) -> float:
    """Nats of a mixture by plain arithmetic on probabilities."""
    total = 0.0
    for token in zip(*members, strict=True):
        total -= math.log(sum(w * math.exp(-float(n)) for w, n in zip(weights, token, strict=True)))
    return total


@given(st.integers(0, 1000), st.integers(1, 4), st.data())
@settings(max_examples=40, deadline=None)
def test_a_mixture_is_the_weighted_sum_of_probabilities(seed: int, number: int, data: st.DataObject) -> None:
    members = [nats(seed + k, num_tokens=20) for k in range(number)]
    shares = data.draw(st.lists(st.floats(0, 1), min_size=number, max_size=number).filter(lambda s: sum(s) > 0.1))
    weights = [share / sum(shares) for share in shares]
    probs = sum(w * np.exp(-m.astype(np.float64)) for w, m in zip(weights, members, strict=True))
    np.testing.assert_allclose(mixed(members, weights), -np.log(probs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_weights_of_two_are_those_of_a_grid_search(seed: int) -> None:
    members = [nats(seed, 2.0), nats(seed + 50, 2.0 + seed / 2)]
    grid = [i / 1000 for i in range(1001)]
    probs = [np.exp(-m.astype(np.float64)) for m in members]
    costs = [-np.log(w * probs[0] + (1 - w) * probs[1]).sum() for w in grid]
    assert best_weights(members)[0] == pytest.approx(grid[int(np.argmin(costs))], abs=2e-3)


def test_the_weights_of_two_that_are_much_alike_have_the_digits_that_are_shown() -> None:
    """The nats hardly change around them, while the weights still do."""
    first = nats(1, 2.0)
    members = [first, (first + np.float32(0.2) * (nats(2, 2.0) - 2)).clip(0)]
    probs = [np.exp(-m.astype(np.float64)) for m in members]
    low, high = 0.0, 1.0
    while high - low > 1e-6:  # where the slope of the likelihood, which is concave, is zero
        w = (low + high) / 2
        slope = ((probs[0] - probs[1]) / (w * probs[0] + (1 - w) * probs[1])).sum()
        low, high = (w, high) if slope > 0 else (low, w)
    assert 0.1 < low < 0.9
    assert best_weights(members)[0] == pytest.approx(low, abs=1e-4)


def test_no_weights_of_three_on_a_grid_are_better() -> None:
    members = [nats(1, 2.0), nats(2, 2.5), nats(3, 4.0)]
    found = cost(members, tuple(best_weights(members)))
    steps = [i / 20 for i in range(21)]
    for a, b in itertools.product(steps, steps):
        if a + b <= 1:
            assert found <= cost(members, (a, b, max(0.0, 1 - a - b))) + 1e-6 * NUM_TOKENS


@given(st.integers(0, 10_000), st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_the_best_weights_sum_to_one_and_are_never_worse_than_the_best_member(seed: int, number: int) -> None:
    members = [nats(seed + k, 1.0 + k) for k in range(number)]
    weights = best_weights(members)
    assert math.fsum(weights) == pytest.approx(1, abs=1e-12)
    assert min(weights) >= 0
    best = min(float(m.sum(dtype=np.float64)) for m in members)
    assert mixed(members, weights).sum(dtype=np.float64) <= best * (1 + 1e-7)


def test_a_member_that_is_better_everywhere_gets_all_the_weight() -> None:
    good = nats(1)
    for worse in (0.5, 1e-3):
        weights = best_weights([good + np.float32(worse), good])
        assert weights == [0.0, 1.0]
        np.testing.assert_allclose(mixed([good + np.float32(worse), good], weights), good, rtol=1e-6)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_mixture_of_the_same_member_is_that_member(number: int) -> None:
    one = nats(7)
    np.testing.assert_allclose(averaged([one] * number), one, rtol=1e-6)
    weights = best_weights([one] * number)
    np.testing.assert_allclose(mixed([one] * number, weights), one, rtol=1e-6)


def test_a_weight_of_one_is_the_member_itself() -> None:
    first, second = nats(1), nats(2)
    np.testing.assert_allclose(mixed([first, second], [1.0, 0.0]), first, rtol=1e-6)
    np.testing.assert_allclose(mixed([first, second], [0.0, 1.0]), second, rtol=1e-6)


def test_a_token_that_a_member_does_not_score_is_not_scored_and_does_not_count() -> None:
    first, second = nats(1), nats(2)
    holes = first.copy()
    holes[::3] = np.nan
    assert np.array_equal(np.isnan(mixed([holes, second], [0.5, 0.5])), np.isnan(holes))
    assert np.array_equal(np.isnan(mixed([second, holes], [1.0, 0.0])), np.isnan(holes))
    kept = ~np.isnan(holes)
    assert best_weights([holes, second]) == pytest.approx(best_weights([first[kept], second[kept]]), abs=1e-9)


def test_infinite_nats_are_probability_zero() -> None:
    first, second = nats(1), nats(2)
    second[5] = np.inf
    together = mixed([first, second], [0.25, 0.75])
    assert together[5] == pytest.approx(first[5] + math.log(4), rel=1e-6)
    assert mixed([first, second], [0.0, 1.0])[5] == np.inf
    both = mixed([second, second], [0.5, 0.5])
    assert both[5] == np.inf
    np.testing.assert_allclose(np.delete(both, 5), np.delete(second, 5), rtol=1e-6)


def test_a_member_with_impossible_tokens_keeps_less_than_all_of_the_weight() -> None:
    sure, cache = nats(1, 4.0), np.full(NUM_TOKENS, np.inf, dtype=np.float32)
    cache[::2] = 0.1  # right half of the time, impossible otherwise
    weights = best_weights([sure, cache])
    probs = np.exp(-sure.astype(np.float64)), np.exp(-cache.astype(np.float64))
    grid = [i / 1000 for i in range(1, 1000)]
    costs = [-np.log((1 - w) * probs[0] + w * probs[1]).sum() for w in grid]
    assert weights[1] == pytest.approx(grid[int(np.argmin(costs))], abs=2e-3)


def test_tokens_that_no_member_thinks_possible_leave_the_weights_to_the_others() -> None:
    first, second = nats(1), nats(2)
    expected = best_weights([first[1:], second[1:]])
    first[0] = second[0] = np.inf
    assert best_weights([first, second]) == pytest.approx(expected, abs=1e-6)


def test_nats_so_large_that_their_probability_underflows_are_mixed_all_the_same() -> None:
    first, second = np.array([2000.0, 1500.0], np.float32), np.array([2001.0, 1.0], np.float32)
    expected = 2000 - math.log(0.5 + 0.5 * math.exp(-1))
    assert mixed([first, second], [0.5, 0.5]).tolist() == pytest.approx([expected, 1 + math.log(2)], rel=1e-6)
    assert all(map(math.isfinite, best_weights([first, second])))
