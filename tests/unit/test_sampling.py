"""Sampling: worked examples, frequencies, determinism, and what is refused. The laws are in property/test_eval_laws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lmkit.config.generation import SamplingConfig
from lmkit.errors import DivergedError
from lmkit.sampling import filtered, keep_min_p, keep_top_k, keep_top_p, penalise, sample, uniforms

PROBS = [0.4, 0.3, 0.2, 0.1]


def logits(probs: list[float]) -> Tensor:
    return torch.tensor([probs], dtype=torch.float64).log().float()


def kept(logits_NV: Tensor) -> list[int]:
    return torch.isfinite(logits_NV[0]).nonzero().flatten().tolist()


@pytest.mark.parametrize(("p", "expected"), [(0.01, [0]), (0.39, [0]), (0.5, [0, 1]), (0.85, [0, 1, 2]), (1.0, None)])
def test_top_p_worked_by_hand(p: float, expected: list[int] | None) -> None:
    assert kept(keep_top_p(logits(PROBS), p)) == (expected or [0, 1, 2, 3])


def test_min_p_and_top_k_worked_by_hand() -> None:
    assert kept(keep_min_p(logits(PROBS), 0.45)) == [0, 1, 2]
    assert kept(keep_top_k(logits(PROBS), 2)) == [0, 1]
    assert kept(keep_top_k(logits([0.25] * 4), 3)) == [0, 1, 2]


def test_rows_are_cut_separately() -> None:
    both = torch.cat([logits([0.97, 0.01, 0.01, 0.01]), logits([0.25] * 4)])
    assert torch.isfinite(keep_top_p(both, 0.9)).sum(1).tolist() == [1, 4]


def test_filters_apply_in_the_order_of_the_keys() -> None:
    hot = SamplingConfig(temperature=1e6, top_p=0.5)
    assert kept(filtered(logits(PROBS), hot)) == [0, 1], "temperature first: nearly uniform, so half the tokens"
    after_k = SamplingConfig(top_k=2, top_p=0.5)
    assert kept(filtered(logits(PROBS), after_k)) == [0], "top-p sees what top-k left: 0.4 of 0.7 is over half"


def test_the_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens_only() -> None:
    x = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalise(x, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]
    config = SamplingConfig(temperature=0.0, repetition_penalty=2.0)
    assert sample(x, config, torch.zeros(1, dtype=torch.float64), seen).tolist() == [2]


def test_an_extreme_penalty_or_temperature_still_draws() -> None:
    x = torch.tensor([[-3.0, -1.0]])
    draw = torch.tensor([0.9], dtype=torch.float64)
    for config in (SamplingConfig(repetition_penalty=1e200), SamplingConfig(temperature=1e-320)):
        assert int(sample(x, config, draw, torch.ones(1, 2, dtype=torch.bool))) in (0, 1)


def test_draws_have_the_frequencies_of_the_distribution() -> None:
    num = 4000
    draws = uniforms(1, 0, range(num), 0)
    found = sample(logits(PROBS).expand(num, -1), SamplingConfig(), draws).bincount(minlength=4) / num
    torch.testing.assert_close(found, torch.tensor(PROBS), atol=0.03, rtol=0)


@pytest.mark.parametrize(("u", "expected"), [(0.0, 1), (0.2999, 1), (0.3001, 3), (1 - 2**-53, 3)])
def test_a_number_at_the_edge_never_draws_an_impossible_token(u: float, expected: int) -> None:
    x = torch.tensor([[-math.inf, math.log(0.3), -math.inf, math.log(0.7), -math.inf]])
    assert sample(x, SamplingConfig(), torch.tensor([u], dtype=torch.float64)).tolist() == [expected]


def test_uniforms_depend_on_seed_prompt_sample_and_position_and_on_nothing_else() -> None:
    base = uniforms(1, 0, range(4), 0)
    assert torch.equal(base[2:], uniforms(1, 0, range(2, 4), 0))
    others = [uniforms(2, 0, range(4), 0), uniforms(1, 1, range(4), 0), uniforms(1, 0, range(4), 1)]
    values = torch.cat([base, *others])
    assert values.dtype == torch.float64
    assert len(values.unique()) == 16
    assert bool(((values >= 0) & (values < 1)).all())


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: list[float], temperature: float) -> None:
    config = SamplingConfig(temperature=temperature, top_p=0.9)
    with pytest.raises(DivergedError, match="not finite"):
        sample(torch.tensor([bad]), config, torch.zeros(1, dtype=torch.float64))
