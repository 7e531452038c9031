"""Laws of evaluation and sampling: each token once, batch size does not matter, filters keep exactly the stated set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmkit.config.generation import SamplingConfig
from lmkit.config.machine import Precision
from lmkit.device import Device
from lmkit.evaluation.plan import Reach, Segments, sliding, unbroken
from lmkit.evaluation.scoring import TokenScores, perplexity, score
from lmkit.models.base import Head, LanguageModel, Scores, State
from lmkit.sampling import filtered, keep_min_p, keep_top_k, keep_top_p, penalise, sample, uniforms

CPU = Device(torch.device("cpu"), Precision.fp32, False, False, "cpu")
VOCAB, EOS = 23, 1


class ReadBack(Head):
    """'Nats' are the first hidden value, so that a test sees which hidden vector a token was scored from."""

    def loss(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        raise AssertionError("evaluation needs no loss")

    def score(self, hidden_ND: Tensor, targets_N: Tensor) -> Scores:
        return Scores(hidden_ND[:, 0], hidden_ND[:, 1] == targets_N)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        raise AssertionError("evaluation needs no logits")


class Ruler(LanguageModel):
    """Hidden vector: how many tokens were seen up to here, and the last of them."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size, self.context, self.head = VOCAB, None, ReadBack()

    def forward(self, tokens_BT: Tensor, state: Any = None, *, use_state: bool = False) -> tuple[Tensor, Any]:
        seen_BT = torch.arange(1, tokens_BT.shape[1] + 1).expand(tokens_BT.shape)
        return torch.stack([seen_BT.float(), tokens_BT.float()], -1), None


@dataclass(frozen=True)
class Past(State):
    total_BD: Tensor
    num_read: int

    def detach(self) -> Past:
        return self

    def select(self, rows: Tensor) -> Past:
        return Past(self.total_BD[rows], self.num_read)


class SoftHead(Head):
    def __init__(self) -> None:
        super().__init__()
        self.weight_VD = torch.randn(VOCAB, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        raise AssertionError("evaluation needs no loss")

    def score(self, hidden_ND: Tensor, targets_N: Tensor) -> Scores:
        logits_NV = hidden_ND @ self.weight_VD.T
        nats_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
        return Scores(nats_N.float(), logits_NV.argmax(1) == targets_N)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return (hidden_ND @ self.weight_VD.T).float()


class Mean(LanguageModel):
    """Attends to all tokens of its window, or with the state of the text, with equal weight."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size, self.context, self.head = VOCAB, None, SoftHead()
        self.table_VD = torch.randn(VOCAB, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def forward(self, tokens_BT: Tensor, state: Any = None, *, use_state: bool = False) -> tuple[Tensor, Any]:
        total_BTD = self.table_VD[tokens_BT].cumsum(1)
        counts_T = torch.arange(1, tokens_BT.shape[1] + 1, dtype=torch.float64)
        if state is not None:
            total_BTD, counts_T = total_BTD + state.total_BD[:, None], counts_T + state.num_read
        past = Past(total_BTD[:, -1], int(counts_T[-1])) if use_state else None
        return 3 * total_BTD / counts_T[:, None], past


def text(num_tokens: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.random.default_rng(seed).integers(0, VOCAB, num_tokens).astype(np.uint16)


def windows(model: LanguageModel, tokens: Any, context: int, stride: int, batch_size: int) -> TokenScores:
    whole = Segments.whole(len(tokens), EOS)
    return score(model, tokens, sliding(whole, context, stride), seq_len=context, batch_size=batch_size, device=CPU)


def carried(model: LanguageModel, tokens: Any, seq_len: int) -> TokenScores:
    whole = Segments.whole(len(tokens), EOS)
    return score(model, tokens, unbroken(whole), seq_len=seq_len, batch_size=1, device=CPU)


@st.composite
def window_cases(draw: st.DrawFn) -> tuple[int, int, int, int]:
    num_tokens = draw(st.integers(1, 60))
    context = draw(st.integers(1, 25))
    return num_tokens, context, draw(st.integers(1, context)), draw(st.integers(1, 9))


@given(window_cases())
@settings(max_examples=150, deadline=None)
def test_each_token_is_scored_once_in_the_first_window_that_reaches_it(case: tuple[int, int, int, int]) -> None:
    num_tokens, context, stride, batch_size = case
    tokens = text(num_tokens)
    scores = windows(Ruler(), tokens, context, stride, batch_size)
    for i, seen in enumerate(scores.nats_N):
        window = max(0, math.ceil((i + 1 - context) / stride))
        assert seen == i + 1 - window * stride
        assert seen == i + 1 if i < context else context - stride < seen <= context
    inputs = np.concatenate([[EOS], tokens[:-1]])
    assert np.array_equal(scores.correct_N, inputs == tokens), "the last token seen is the one before the target"


@given(window_cases())
@settings(max_examples=60, deadline=None)
def test_sliding_windows_equal_a_loop_over_tokens_for_any_batch_size(case: tuple[int, int, int, int]) -> None:
    num_tokens, context, stride, batch_size = case
    model, tokens = Mean(), text(num_tokens)
    scores = windows(model, tokens, context, stride, batch_size)
    inputs = torch.tensor([EOS, *tokens[:-1].tolist()])
    for i, token in enumerate(tokens.tolist()):
        start = max(0, math.ceil((i + 1 - context) / stride)) * stride
        hidden_BTD, _ = model(inputs[None, start : i + 1])
        assert scores.nats_N[i] == pytest.approx(
            float(model.head.score(hidden_BTD[0, -1:], torch.tensor([token])).nats_N), rel=1e-6
        )


@given(st.integers(1, 80), st.integers(1, 90))
@settings(max_examples=60, deadline=None)
def test_with_carried_state_the_segment_length_does_not_matter(num_tokens: int, seq_len: int) -> None:
    model, tokens = Mean(), text(num_tokens)
    whole = windows(model, tokens, num_tokens, num_tokens, 1)
    pieces = carried(model, tokens, seq_len)
    np.testing.assert_allclose(pieces.nats_N, whole.nats_N, rtol=1e-6)
    assert np.array_equal(pieces.correct_N, whole.correct_N)


@given(window_cases(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_uniform_model_has_the_vocabulary_size_as_its_perplexity(
    case: tuple[int, int, int, int], carries_state: bool
) -> None:
    num_tokens, context, stride, batch_size = case
    model = Mean()
    model.table_VD.zero_()
    reach = Reach(None, None) if carries_state else Reach(context, stride)
    windows_W = reach.windows(Segments.whole(num_tokens, EOS))
    seq_len = stride if carries_state else context
    tally = perplexity(model, text(num_tokens), windows_W, seq_len=seq_len, batch_size=batch_size, device=CPU)
    assert tally.num_tokens == num_tokens
    assert math.exp(tally.loss) == pytest.approx(VOCAB, rel=1e-6)


@given(st.integers(2, 50))
@settings(max_examples=30, deadline=None)
def test_changing_a_token_does_not_move_the_scores_before_it(num_tokens: int) -> None:
    tokens = text(num_tokens)
    changed = tokens.copy()
    at = num_tokens // 2
    changed[at] = (changed[at] + 1) % VOCAB
    for scored in (
        lambda t: windows(Mean(), t, 8, 3, 4),
        lambda t: carried(Mean(), t, 7),
    ):
        assert np.array_equal(scored(tokens).nats_N[:at], scored(changed).nats_N[:at])


# Few distinct values, so that ties are common; -inf as a model that excludes tokens would have it.
logit = st.sampled_from([-math.inf, -4.0, -1.5, -0.5, 0.0, 0.25, 1.0, 1.0, 2.0, 5.0])
logit_rows = st.lists(logit, min_size=1, max_size=12).filter(lambda row: max(row) > -math.inf)


def kept(logits_NV: Tensor) -> list[int]:
    return torch.isfinite(logits_NV[0]).nonzero().flatten().tolist()


def by_probability(row: list[float]) -> list[int]:
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


@given(logit_rows, st.integers(1, 14))
def test_top_k_keeps_the_k_most_probable_the_smaller_id_of_equals(row: list[float], k: int) -> None:
    expected = [i for i in by_probability(row)[:k] if row[i] > -math.inf]
    assert kept(keep_top_k(torch.tensor([row]), k)) == sorted(expected)


@given(logit_rows, st.floats(0.001, 1.0))
def test_top_p_keeps_the_smallest_set_that_reaches_p(row: list[float], p: float) -> None:
    found = kept(keep_top_p(torch.tensor([row]), p))
    probs = torch.tensor(row, dtype=torch.float64).softmax(0).tolist()
    order = by_probability(row)
    assert found == sorted(order[: len(found)])
    assert len(found) >= 1
    assert sum(probs[i] for i in found) >= p - 1e-9
    assert len(found) == 1 or sum(probs[i] for i in order[: len(found) - 1]) < p + 1e-9


@given(logit_rows, st.floats(0.0, 1.0))
def test_min_p_keeps_what_is_at_least_p_times_as_probable_as_the_best(row: list[float], p: float) -> None:
    best = max(row)
    expected = [i for i, x in enumerate(row) if x > -math.inf and math.exp(x - best) >= p]
    found = kept(keep_min_p(torch.tensor([row]), p))
    edge = {i for i, x in enumerate(row) if math.isclose(math.exp(x - best), p, rel_tol=1e-9)}
    assert set(found) - edge == set(expected) - edge


@given(logit_rows, st.floats(1.0, 10.0), st.data())
def test_the_penalty_never_makes_a_seen_token_more_probable_and_leaves_the_others(
    row: list[float], penalty: float, data: st.DataObject
) -> None:
    seen = data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row)))
    after = penalise(torch.tensor([row]), torch.tensor([seen]), penalty)[0].tolist()
    for x, y, was_seen in zip(row, after, seen, strict=True):
        assert y <= x if was_seen else y == x


configs = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0.0, 1e-300, 0.3, 1.0, 2.0, 1e300]),
    top_k=st.none() | st.integers(1, 5),
    top_p=st.none() | st.floats(0.01, 1.0),
    min_p=st.none() | st.floats(0.0, 1.0),
)


@given(logit_rows, configs, st.floats(0, 1, exclude_max=True))
def test_a_draw_is_always_one_of_the_tokens_that_were_kept(row: list[float], config: SamplingConfig, u: float) -> None:
    logits_NV = torch.tensor([row])
    token = int(sample(logits_NV, config, torch.tensor([u], dtype=torch.float64)))
    assert token in kept(filtered(logits_NV, config))


@given(logit_rows, st.floats(0, 1, exclude_max=True))
def test_a_temperature_towards_0_is_greedy(row: list[float], u: float) -> None:
    logits_NV, uniform = torch.tensor([row]), torch.tensor([u], dtype=torch.float64)
    greedy = int(sample(logits_NV, SamplingConfig(temperature=0.0), uniform))
    cold = int(sample(logits_NV, SamplingConfig(temperature=1e-4), uniform))
    assert greedy == row.index(max(row))
    assert row[cold] == max(row)


@given(st.lists(logit_rows, min_size=1, max_size=5), configs, st.integers(0, 1000))
def test_a_draw_does_not_depend_on_the_other_rows(rows: list[list[float]], config: SamplingConfig, seed: int) -> None:
    width = max(map(len, rows))
    logits_NV = torch.tensor([row + [-math.inf] * (width - len(row)) for row in rows])
    draws = uniforms(seed, 0, range(len(rows)), 3)
    together = sample(logits_NV, config, draws).tolist()
    alone = [int(sample(logits_NV[i : i + 1], config, uniforms(seed, 0, range(i, i + 1), 3))) for i in range(len(rows))]
    assert together == alone
