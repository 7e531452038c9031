"""Temperature: logits divided by T before the softmax, and the T that undoes a sharpening that is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmkit import heads
from lmkit.config.machine import Precision
from lmkit.config.model import NgramConfig, RecurrentConfig, TransformerConfig
from lmkit.device import Device
from lmkit.evaluation.plan import Segments, sliding, unbroken
from lmkit.evaluation.scoring import score
from lmkit.evaluation.temperature import GRID, TemperatureSearch, tempered
from lmkit.heads import SoftmaxHead
from lmkit.models.base import LanguageModel
from lmkit.models.ngram import KneserNey

CPU = Device(torch.device("cpu"), Precision.fp32, False, False, "cpu")
VOCAB, EOS, WIDTH = 17, 1, 12


class Toy(LanguageModel):
    """Only a head: the tests hand it hidden vectors."""

    def __init__(self, scale: float, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.vocab_size, self.context = VOCAB, None
        self.head = SoftmaxHead(torch.nn.Parameter(scale * torch.randn(VOCAB, WIDTH, generator=generator)))

    def forward(self, tokens_BT: Tensor, state: None = None, *, use_state: bool = False) -> tuple[Tensor, None]:
        raise AssertionError("not called")


def vectors(number: int, seed: int = 1) -> Tensor:
    return torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(seed)) / math.sqrt(WIDTH)


def sampled(model: Toy, hidden_ND: Tensor, seed: int = 2) -> Tensor:
    """Targets drawn from the model's own distribution."""
    probs_NV = torch.softmax(model.head.logits(hidden_ND).detach(), 1)
    return torch.multinomial(probs_NV, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)


def nats_at(model: LanguageModel, hidden_ND: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
    """(N,) float64, by definition."""
    logits_NV = model.head.logits(hidden_ND).detach().double() / temperature
    return -torch.log_softmax(logits_NV, 1)[torch.arange(len(targets_N)), targets_N]


@torch.no_grad()
def best(model: Toy, hidden_ND: Tensor, targets_N: Tensor, pieces: int = 1) -> float:
    search = TemperatureSearch(model)
    for rows in torch.arange(len(targets_N)).tensor_split(pieces):
        search.scorer(hidden_ND[rows], targets_N[rows], rows.numpy())
    return search.best()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_scores_are_those_of_logits_divided_by_the_temperature(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS_CPU", 1)  # 16 rows at a time
    model, hidden_ND = Toy(3.0), vectors(100)
    targets_N = sampled(model, hidden_ND)
    with torch.no_grad():
        found = tempered(model, temperature)(hidden_ND, targets_N, np.arange(100))
    expected = nats_at(model, hidden_ND, targets_N, temperature)
    torch.testing.assert_close(found.nats_N.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.correct_N, model.head.score(hidden_ND, targets_N).correct_N), "the argmax stays"


def kneser_ney() -> LanguageModel:
    model = KneserNey(NgramConfig(order=3), VOCAB)
    model.fit(np.random.default_rng(0).integers(0, VOCAB, 300), eos_id=EOS)
    return model


@pytest.mark.parametrize(
    "model",
    [
        RecurrentConfig(d_embed=8, d_hidden=8).build(VOCAB, seed=1),
        TransformerConfig(d_model=8, num_layers=1, num_heads=2, context=9).build(VOCAB, seed=1),
        kneser_ney(),
    ],
    ids=["lstm", "transformer", "kneser-ney"],
)
def test_temperature_1_gives_the_models_own_scores(model: LanguageModel) -> None:
    tokens = np.random.default_rng(3).integers(0, VOCAB, 70).astype(np.uint8)
    whole = Segments.whole(70, EOS)
    windows = unbroken(whole) if model.context is None else sliding(whole, 9, 4)
    own = score(model, tokens, windows, seq_len=9, batch_size=2, device=CPU)
    same = score(model, tokens, windows, seq_len=9, batch_size=2, device=CPU, scorer=tempered(model, 1.0))
    np.testing.assert_allclose(same.nats_N, own.nats_N, rtol=1e-5, atol=1e-6)
    assert np.array_equal(same.correct_N, own.correct_N)
    again = score(model, tokens, windows, seq_len=9, batch_size=2, device=CPU)
    assert np.array_equal(again.nats_N, own.nats_N), "the model is not changed by it"


@pytest.mark.parametrize("sharpness", [0.65, 0.8, 1.0, 1.15, 1.3, 1.55, 1.68])
def test_the_search_undoes_a_known_sharpening(sharpness: float) -> None:
    """Targets drawn from the model are best predicted at T = 1; multiplied by c, its logits want T = c."""
    true, hidden_ND = Toy(2.0), vectors(20_000)
    targets_N = sampled(true, hidden_ND)
    assert best(Toy(2.0 * sharpness), hidden_ND, targets_N) == pytest.approx(sharpness, rel=0.03)


def test_the_search_finds_the_optimum_of_a_fine_grid() -> None:
    true, model, hidden_ND = Toy(2.0), Toy(2.5, seed=0), vectors(3000)
    targets_N = sampled(true, hidden_ND)
    grid = np.arange(0.6, 1.7, 0.002)
    nats = [float(nats_at(model, hidden_ND, targets_N, t).sum()) for t in grid]
    assert best(model, hidden_ND, targets_N) == pytest.approx(grid[int(np.argmin(nats))], abs=0.003)


@pytest.mark.parametrize("pieces", [1, 2, 7])
def test_the_search_sums_over_the_pieces_of_a_text(pieces: int) -> None:
    true, model, hidden_ND = Toy(2.0), Toy(2.6), vectors(500)
    targets_N = sampled(true, hidden_ND)
    search = TemperatureSearch(model)
    with torch.no_grad():
        for rows in torch.arange(500).tensor_split(pieces):
            search.scorer(hidden_ND[rows], targets_N[rows], rows.numpy())
    for temperature, nats in zip(GRID, search.nats, strict=True):
        assert nats == pytest.approx(float(nats_at(model, hidden_ND, targets_N, temperature).sum()), rel=1e-6)


@given(
    st.floats(0.05, 30.0),
    st.floats(0.05, 30.0),
    st.integers(1, 300),
    st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_the_temperature_found_is_never_worse_than_1_and_within_the_grid(
    true_scale: float, scale: float, number: int, seed: int
) -> None:
    true, model, hidden_ND = Toy(true_scale, seed), Toy(scale, seed), vectors(number, seed)
    targets_N = sampled(true, hidden_ND, seed)
    temperature = best(model, hidden_ND, targets_N)
    assert GRID[0] - 1e-9 <= temperature <= GRID[-1] + 1e-9
    found, one = (float(nats_at(model, hidden_ND, targets_N, t).sum()) for t in (temperature, 1.0))
    assert found <= one * (1 + 1e-6) + 1e-5


@given(st.integers(0, 1000), st.floats(0.5, 60.0))
@settings(max_examples=60, deadline=None)
def test_with_targets_from_elsewhere_it_is_never_worse_than_1_either(seed: int, scale: float) -> None:
    """A few confident mistakes make the sum of nats kinked, nothing like a parabola."""
    model, hidden_ND = Toy(scale, seed), vectors(20, seed)
    logits_NV = model.head.logits(hidden_ND).detach()
    targets_N = logits_NV.argmax(1)
    targets_N[::7] = logits_NV[::7].argsort(1)[:, -2]
    temperature = best(model, hidden_ND, targets_N)
    found, one = (float(nats_at(model, hidden_ND, targets_N, t).sum()) for t in (temperature, 1.0))
    assert found <= one * (1 + 1e-6) + 1e-5


def test_a_uniform_model_is_the_same_at_any_temperature() -> None:
    model, hidden_ND = Toy(0.0), vectors(50)
    targets_N = torch.zeros(50, dtype=torch.int64)
    temperature = best(model, hidden_ND, targets_N)
    assert float(nats_at(model, hidden_ND, targets_N, temperature).mean()) == pytest.approx(math.log(VOCAB))
