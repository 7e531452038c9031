"""Evaluation with real models: whole splits, any cut, the mode restored, and numbers that say per what."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lmkit.config.machine import Precision
from lmkit.config.model import Cell, RecurrentConfig, TransformerConfig
from lmkit.data.prepared import Split
from lmkit.device import Device
from lmkit.errors import ConfigError, DivergedError
from lmkit.evaluation.plan import Reach, Segments, check_window, sliding, unbroken
from lmkit.evaluation.scoring import Tally, perplexity, score, summarize
from lmkit.models.base import LanguageModel

CPU = Device(torch.device("cpu"), Precision.fp32, False, False, "cpu")
VOCAB, EOS = 31, 1


def text(num_tokens: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, VOCAB, num_tokens).astype(np.uint8)


def transformer(context: int = 16) -> LanguageModel:
    config = TransformerConfig(d_model=16, num_layers=2, num_heads=2, context=context, dropout=0.5)
    model = config.build(VOCAB, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5.0)
    return model


def recurrent(cell: Cell) -> LanguageModel:
    return RecurrentConfig(cell=cell, d_embed=12, d_hidden=20, dropout_output=0.5).build(VOCAB, seed=1)


def split(**counts: int) -> Split:
    zeros = dict.fromkeys(("num_lines", "num_documents", "num_unk"), 0)
    return Split(tokens=text(4), document_ends=np.array([4]), text_digest="", **{**zeros, **counts})


def windows(model: LanguageModel, tokens: Any, *, context: int = 16, stride: int = 8, batch_size: int = 3) -> Any:
    whole = Segments.whole(len(tokens), EOS)
    return score(model, tokens, sliding(whole, context, stride), seq_len=context, batch_size=batch_size, device=CPU)


def carried(model: LanguageModel, tokens: Any, seq_len: int) -> Any:
    whole = Segments.whole(len(tokens), EOS)
    return score(model, tokens, unbroken(whole), seq_len=seq_len, batch_size=1, device=CPU)


def test_a_transformer_scored_in_windows_equals_plain_cross_entropy_of_each_window() -> None:
    model, tokens = transformer().eval(), text(61)
    scores = windows(model, tokens)
    inputs = torch.tensor([EOS, *tokens[:-1].tolist()])
    targets = torch.from_numpy(tokens.astype(np.int64))
    expected = torch.full((61,), math.nan)
    for start in range(0, 61, 8):
        hidden_BTD, _ = model(inputs[None, start : start + 16])
        nats_T = torch.nn.functional.cross_entropy(
            model.head.logits(hidden_BTD[0]), targets[start : start + 16], reduction="none"
        )
        for i, nats in enumerate(nats_T.tolist(), start=start):
            if expected[i].isnan():
                expected[i] = nats
    np.testing.assert_allclose(scores.nats_N, expected.numpy(), rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_the_number_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    model, tokens = transformer(), text(123)
    nats = windows(model, tokens, batch_size=batch_size).nats_N.sum(dtype=np.float64)
    assert nats == pytest.approx(windows(model, tokens, batch_size=1).nats_N.sum(dtype=np.float64), rel=1e-6)


@pytest.mark.parametrize("cell", list(Cell))
@pytest.mark.parametrize("seq_len", [1, 7, 64])
def test_carried_state_gives_the_number_of_one_pass_over_the_whole_text(cell: Cell, seq_len: int) -> None:
    model, tokens = recurrent(cell), text(123)
    whole = carried(model, tokens, 1000)
    pieces = carried(model, tokens, seq_len)
    assert pieces.nats_N.sum(dtype=np.float64) == pytest.approx(whole.nats_N.sum(dtype=np.float64), rel=1e-6)


def test_more_context_reaches_a_token_with_a_smaller_stride() -> None:
    model, tokens = transformer(), text(60)
    coarse, fine = windows(model, tokens, stride=16), windows(model, tokens, stride=1)
    assert np.array_equal(coarse.nats_N[:16], fine.nats_N[:16])
    assert not np.allclose(coarse.nats_N[16:], fine.nats_N[16:])


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_evaluated_without_dropout_and_left_in_its_mode(training: bool) -> None:
    model, tokens = transformer().train(training), text(40)
    first, second = windows(model, tokens), windows(model, tokens)
    assert np.array_equal(first.nats_N, second.nats_N)
    assert model.training is training
    assert not any(p.is_inference() for p in model.parameters())


def test_the_mode_is_restored_after_an_error() -> None:
    model = transformer(context=4).train()
    model.context = None  # let a window through that the model then refuses
    with pytest.raises(ValueError, match="context"):
        windows(model, text(40))
    assert model.training


def test_a_model_that_has_diverged_is_refused_and_the_token_named() -> None:
    model = transformer()
    with torch.no_grad():
        model.embedding.weight[7] = math.nan  # type: ignore[index, union-attr]
    tokens = np.zeros(20, dtype=np.uint8)
    tokens[5] = 7
    with pytest.raises(DivergedError, match=r"token 0 is nan"):
        windows(model, tokens)


@pytest.mark.parametrize(
    ("context", "stride", "problem"),
    [(16, 17, "stride=17"), (16, 0, "stride=0"), (17, 8, "context=17"), (0, 1, "context=0")],
)
def test_an_impossible_window_is_a_config_error(context: int, stride: int, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_window(context, stride, 16)


def test_an_empty_text_and_foreign_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="empty"):
        windows(transformer(), text(0))
    with pytest.raises(ConfigError, match=f"vocabulary of {VOCAB}"):
        windows(transformer(), np.array([3, VOCAB]))


@pytest.mark.parametrize("carries_state", [True, False])
def test_progress_grows_to_the_number_of_tokens(carries_state: bool) -> None:
    model = recurrent(Cell.gru) if carries_state else transformer()
    seen: list[int] = []
    reach = Reach(None, None) if carries_state else Reach(16, 5)
    windows_W = reach.windows(Segments.whole(50, EOS))
    seq_len = 9 if carries_state else 16
    tally = perplexity(model, text(50), windows_W, seq_len=seq_len, batch_size=2, device=CPU, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == tally.num_tokens == 50
    assert 0 <= tally.num_correct <= 50


def test_correct_counts_the_tokens_that_were_the_most_probable() -> None:
    model = recurrent(Cell.lstm)
    with torch.no_grad():
        model.head.bias[3] = 100.0  # type: ignore[index, union-attr]
    tokens = np.array([3, 3, 5, 3], dtype=np.uint8)
    scores = carried(model, tokens, 2)
    assert scores.correct_N.tolist() == [True, True, False, True]
    assert scores.nats_N[2] > 50 > 1 > scores.nats_N[0]


def test_the_summary_divides_the_same_nats_by_words_tokens_bytes_and_characters() -> None:
    tally = Tally(nats=60.0, num_tokens=30, num_correct=12, seconds=1.0)
    result = summarize(tally, split(num_tokens=30, num_words=10, num_bytes=50, num_chars=40))
    assert result["word_ppl"] == pytest.approx(math.exp(6))
    assert result["token_ppl"] == pytest.approx(math.exp(2))
    assert result["bits_per_byte"] == pytest.approx(60 / 50 / math.log(2))
    assert result["bits_per_char"] == pytest.approx(60 / 40 / math.log(2))
    assert result["accuracy"] == pytest.approx(0.4)
    assert (result["nats"], result["num_tokens"], result["num_words"], result["num_bytes"]) == (60.0, 30, 10, 50)


def test_a_perplexity_that_overflows_is_infinite() -> None:
    tally = Tally(nats=1e6, num_tokens=10, num_correct=0, seconds=1.0)
    result = summarize(tally, split(num_tokens=10, num_words=10, num_bytes=10, num_chars=10))
    assert result["word_ppl"] == result["token_ppl"] == math.inf
    assert math.isfinite(result["bits_per_byte"])


def test_nats_are_summed_in_double_precision() -> None:
    model, tokens = transformer(), text(3000)
    scores = windows(model, tokens, batch_size=16)
    windows_W = sliding(Segments.whole(len(tokens), EOS), 16, 8)
    tally = perplexity(model, tokens, windows_W, seq_len=16, batch_size=16, device=CPU)
    assert tally.nats == pytest.approx(math.fsum(scores.nats_N.tolist()), rel=1e-12)


def test_a_tensor_of_scores_has_one_float32_per_token() -> None:
    scores = windows(transformer(), text(21))
    assert scores.nats_N.shape == scores.correct_N.shape == (21,)
    assert (scores.nats_N.dtype, scores.correct_N.dtype) == (np.float32, np.bool_)
