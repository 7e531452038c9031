"""Models that cheat are refused, each by its own proof, honest ones pass, and the proofs cost little."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import shapes
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lmkit.config.machine import Precision
from lmkit.config.model import Cell, NgramConfig, RecurrentConfig, TransformerConfig
from lmkit.device import Device
from lmkit.errors import CheckpointError, ConfigError
from lmkit.evaluation import checks
from lmkit.evaluation.checks import check_vocabulary, line_hashes, look_for_leak, overlap, prove, sample_windows
from lmkit.evaluation.plan import Segments, Windows, rolling, sliding, strided, unbroken
from lmkit.heads import SoftmaxHead
from lmkit.models.base import Head, LanguageModel, Scores
from lmkit.models.ngram import KneserNey

CPU = Device(torch.device("cpu"), Precision.fp32, False, False, "cpu")
BF16 = Device(torch.device("cpu"), Precision.bf16, False, False, "cpu, bf16")
VOCAB, EOS, WIDTH = 19, 1, 8


def text(num_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, num_tokens).astype(np.uint8)


def run(
    model: LanguageModel,
    windows: Windows | None = None,
    *,
    num_tokens: int = 600,
    seq_len: int = 1024,
    device: Device = CPU,
) -> Any:
    """prove with the usual settings; windows of the context, or one over the whole text."""
    whole = Segments.whole(num_tokens, EOS)
    if model.context is not None:
        seq_len = model.context
        windows = windows or sliding(whole, model.context, model.context // 2)
    return prove(
        model, text(num_tokens), windows or unbroken(whole), seq_len=seq_len, batch_size=16, device=device, seed=1
    )


# Honest models


def sharpened(model: LanguageModel) -> LanguageModel:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    return model


def kneser_ney() -> LanguageModel:
    model = KneserNey(NgramConfig(order=4), VOCAB)
    model.fit(text(2000, seed=7), eos_id=EOS)
    return model


def transformer(**fields: Any) -> LanguageModel:
    config = TransformerConfig(d_model=16, num_layers=2, num_heads=4, context=32, dropout=0.3, **fields)
    return sharpened(config.build(VOCAB, seed=1))


HONEST: dict[str, Callable[[], LanguageModel]] = {
    "llama": transformer,
    "grouped": lambda: transformer(num_kv_heads=2),
    "gpt2": lambda: transformer(**shapes.GPT2),
    "vanilla": lambda: transformer(**shapes.VANILLA),
    "lstm": lambda: sharpened(RecurrentConfig(d_embed=12, d_hidden=14, num_layers=2).build(VOCAB, seed=1)),
    "gru": lambda: sharpened(RecurrentConfig(cell=Cell.gru, d_embed=12, d_hidden=14).build(VOCAB, seed=1)),
    "kneser-ney": kneser_ney,
}


@pytest.mark.parametrize("family", HONEST)
def test_an_honest_model_of_every_family_passes_with_no_more_than_rounding(family: str) -> None:
    model = HONEST[family]().train()
    found = run(model)
    assert found.leak == 0.0
    assert found.batch_difference < 1e-4
    assert found.softmax_difference < 1e-4
    assert found.seconds >= 0
    assert model.training, "the mode is put back"
    assert set(found.as_dict()) == {"batch_difference", "softmax_difference", "leak", "seconds"}


@pytest.mark.parametrize(
    "windows",
    [
        unbroken(Segments.whole(300, EOS)),
        unbroken(Segments.stripes(600, 2)),
        unbroken(Segments.ending_with(text(600) == 5, EOS)),
        strided(600, 300, 100),
        strided(600, 20, 20),
    ],
    ids=["whole", "stripes", "sentences", "long windows", "short windows"],
)
def test_an_honest_model_passes_whatever_the_protocol(windows: Windows) -> None:
    assert run(HONEST["lstm"](), windows).leak == 0.0
    short = windows.longest <= 32
    if short:
        assert run(HONEST["llama"](), windows).leak == 0.0


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 40])
@pytest.mark.parametrize("family", ["llama", "lstm", "kneser-ney"])
def test_a_very_short_text_passes_too(num_tokens: int, family: str) -> None:
    model = HONEST[family]()
    whole = Segments.whole(num_tokens, EOS)
    windows = unbroken(whole) if model.context is None else sliding(whole, 32, 16)
    assert run(model, windows, num_tokens=num_tokens).leak == 0.0


# Models that see the future


class Cheat(LanguageModel):
    """An embedding, some mixing over time that the tests choose, and a softmax."""

    def __init__(self, mix: Callable[[Tensor], Tensor], context: int | None = 32) -> None:
        super().__init__()
        self.vocab_size, self.context, self.mix = VOCAB, context, mix
        generator = torch.Generator().manual_seed(1)
        self.table_VD = torch.randn(VOCAB, WIDTH, generator=generator)
        self.head = SoftmaxHead(nn.Parameter(torch.randn(VOCAB, WIDTH, generator=generator)))

    def forward(self, tokens_BT: Tensor, state: Any = None, *, use_state: bool = False) -> tuple[Tensor, Any]:
        return self.mix(self.table_VD[tokens_BT]), None


def with_the_next(x_BTD: Tensor) -> Tensor:
    """Peeks one token ahead."""
    return x_BTD + F.pad(x_BTD[:, 1:], (0, 0, 0, 1))


def without_a_mask(x_BTD: Tensor) -> Tensor:
    """Attention over the whole window."""
    return F.scaled_dot_product_attention(x_BTD, x_BTD, x_BTD)


def with_the_last(x_BTD: Tensor) -> Tensor:
    """Sees the last token of the window."""
    return x_BTD + x_BTD[:, -1:]


def normalised_over_time(x_BTD: Tensor) -> Tensor:
    return (x_BTD - x_BTD.mean(1, keepdim=True)) / (x_BTD.std(1, keepdim=True) + 1e-3)


def with_the_block(size: int) -> Callable[[Tensor], Tensor]:
    """Sees all of its block of ``size`` tokens, as a mask that is causal only between blocks lets it."""

    def mix(x_BTD: Tensor) -> Tensor:
        length = x_BTD.shape[1]
        padded = F.pad(x_BTD, (0, 0, 0, -length % size)).unflatten(1, (-1, size))
        return x_BTD + padded.sum(2, keepdim=True).expand_as(padded).flatten(1, 2)[:, :length]

    return mix


CHEATS = {
    "next": with_the_next,
    "no mask": without_a_mask,
    "last": with_the_last,
    "normalised over time": normalised_over_time,
    **{f"blocks of {size}": with_the_block(size) for size in (2, 3, 4, 7, 8, 16)},
}


@pytest.mark.parametrize("cheat", CHEATS)
@pytest.mark.parametrize("context", [32, 16, 9])
def test_a_model_that_sees_the_future_is_refused(cheat: str, context: int) -> None:
    with pytest.raises(CheckpointError, match="sees the future"):
        run(Cheat(CHEATS[cheat], context))


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_model_without_a_context_that_sees_the_future_is_refused(cheat: str) -> None:
    with pytest.raises(CheckpointError, match="sees the future"):
        run(Cheat(CHEATS[cheat], context=None))


def test_a_mixing_that_is_causal_is_no_cheat() -> None:
    def before(x_BTD: Tensor) -> Tensor:
        return x_BTD.cumsum(1) / (1 + torch.arange(x_BTD.shape[1]))[:, None]

    assert run(Cheat(before)).leak == 0.0


def test_a_transformer_without_its_causal_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = F.scaled_dot_product_attention

    def unmasked(*args: Any, is_causal: bool = False, **kwargs: Any) -> Tensor:
        return attention(*args, **kwargs)

    model = transformer()
    assert run(model).leak == 0.0
    monkeypatch.setattr(F, "scaled_dot_product_attention", unmasked)
    with pytest.raises(CheckpointError, match="sees the future"):
        run(model)


class BothWays(LanguageModel):
    """An LSTM whose second layer reads backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size, self.context = VOCAB, None
        torch.manual_seed(1)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)
        self.head = SoftmaxHead(nn.Parameter(3 * torch.randn(VOCAB, WIDTH)))

    def forward(self, tokens_BT: Tensor, state: Any = None, *, use_state: bool = False) -> tuple[Tensor, Any]:
        return self.lstm(self.embedding(tokens_BT), state)


def test_an_lstm_that_also_reads_backwards_is_refused() -> None:
    with pytest.raises(CheckpointError, match="sees the future"):
        run(BothWays())


def test_a_leak_that_makes_nonsense_is_infinite_and_not_overlooked() -> None:
    def nonsense(x_BTD: Tensor) -> Tensor:
        return x_BTD / (x_BTD[:, -1:] - x_BTD[:, -1:])

    windows = sliding(Segments.whole(600, EOS), 32, 16)
    assert look_for_leak(Cheat(nonsense), text(600), windows, length=256, device=CPU, seed=1) == math.inf


# Models whose numbers are no probabilities, or not their own


class Wrong(SoftmaxHead):
    """A head whose scores the tests bend."""

    def __init__(self, bend: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(nn.Parameter(torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(1))))
        self.bend = bend

    @torch.no_grad()
    def score(self, hidden_ND: Tensor, targets_N: Tensor) -> Scores:
        scores = super().score(hidden_ND, targets_N)
        return Scores(self.bend(scores.nats_N, targets_N), scores.correct_N)


def shifted(x_BTD: Tensor) -> Tensor:
    return x_BTD + F.pad(x_BTD[:, :-1], (0, 0, 1, 0))


@pytest.mark.parametrize(
    "bend",
    [
        lambda nats, targets: nats - 0.1,
        lambda nats, targets: nats * 0.9,
        lambda nats, targets: torch.where(targets % 4 == 0, nats / 2, nats),
    ],
    ids=["too probable", "too sharp", "some tokens"],
)
def test_a_head_whose_scores_are_not_those_of_its_logits_is_refused(
    bend: Callable[[Tensor, Tensor], Tensor],
) -> None:
    model = Cheat(shifted)
    assert run(model).softmax_difference < 1e-5
    model.head = Wrong(bend)
    with pytest.raises(CheckpointError, match="the softmax does not sum to one"):
        run(model)


class NotNormalised(Head):
    """Scores and logits agree on 'log-probabilities' that sum to more than one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_VD = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(1))

    def loss(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        raise AssertionError("evaluation needs no loss")

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return F.logsigmoid(hidden_ND @ self.weight_VD.T)

    def score(self, hidden_ND: Tensor, targets_N: Tensor) -> Scores:
        logs_NV = self.logits(hidden_ND)
        return Scores(-logs_NV.gather(1, targets_N[:, None]).squeeze(1), logs_NV.argmax(1) == targets_N)


def test_scores_that_do_not_sum_to_one_are_refused() -> None:
    model = Cheat(shifted)
    model.head = NotNormalised()
    with pytest.raises(CheckpointError, match="the softmax does not sum to one"):
        run(model)


@pytest.mark.parametrize("context", [32, None])
def test_a_model_whose_numbers_depend_on_the_other_rows_of_the_batch_is_refused(context: int | None) -> None:
    with pytest.raises(CheckpointError, match="scored one by one differs by"):
        run(Cheat(lambda x_BTD: x_BTD + x_BTD.mean(0, keepdim=True), context))


def test_a_batch_norm_that_was_left_in_training_mode_is_refused() -> None:
    def normalised(x_BTD: Tensor) -> Tensor:
        return F.batch_norm(x_BTD.transpose(1, 2), None, None, training=True).transpose(1, 2)

    with pytest.raises(CheckpointError, match="sees the future"):
        run(Cheat(normalised))


class Forgetful(LanguageModel):
    """A model that carries a state but loses it from one piece to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = HONEST["lstm"]()
        self.vocab_size, self.context, self.head = VOCAB, None, self.inner.head

    def forward(self, tokens_BT: Tensor, state: Any = None, *, use_state: bool = False) -> tuple[Tensor, Any]:
        return self.inner(tokens_BT, None, use_state=use_state)


@pytest.mark.parametrize("seq_len", [20, 1024, 4096])
def test_a_model_that_loses_its_state_between_pieces_is_refused(seq_len: int) -> None:
    with pytest.raises(CheckpointError, match="scored one by one differs by"):
        run(Forgetful(), num_tokens=3000, seq_len=seq_len)


def test_a_refusal_says_that_the_number_cannot_be_trusted() -> None:
    with pytest.raises(CheckpointError, match="its perplexity cannot be trusted"):
        run(Cheat(with_the_next))


# In half precision


@pytest.mark.parametrize("family", HONEST)
def test_in_bf16_nothing_leaks_either_and_scores_are_those_of_the_logits(family: str) -> None:
    found = run(HONEST[family](), device=BF16)
    assert found.leak == 0.0
    assert found.softmax_difference < 1e-4


def test_a_little_of_the_future_and_scores_a_little_too_good_are_refused_in_bf16_too() -> None:
    with pytest.raises(CheckpointError, match="sees the future"):
        run(Cheat(lambda x_BTD: x_BTD + 0.005 * F.pad(x_BTD[:, 1:], (0, 0, 0, 1))), device=BF16)
    model = Cheat(shifted)
    model.head = Wrong(lambda nats, targets: nats - 0.1)
    with pytest.raises(CheckpointError, match="the softmax does not sum to one"):
        run(model, device=BF16)


def test_a_little_of_the_other_rows_is_refused_in_bf16_too_whose_rounding_would_hide_it() -> None:
    with pytest.raises(CheckpointError, match="scored one by one differs by"):
        run(Cheat(lambda x_BTD: x_BTD + 0.01 * x_BTD.mean(0, keepdim=True)), device=BF16)


# What it costs


class Counting(LanguageModel):
    """Counts the tokens that it reads and scores."""

    def __init__(self, inner: LanguageModel) -> None:
        super().__init__()
        self.inner, self.read, self.longest = inner, 0, 0
        self.vocab_size, self.context, self.head = inner.vocab_size, inner.context, CountingHead(inner.head)

    def forward(self, tokens_BT: Tensor, state: Any = None, *, use_state: bool = False) -> tuple[Tensor, Any]:
        self.read += tokens_BT.numel()
        self.longest = max(self.longest, tokens_BT.shape[1])
        return self.inner(tokens_BT, state, use_state=use_state)


class CountingHead(Head):
    def __init__(self, inner: Head) -> None:
        super().__init__()
        self.inner, self.scored, self.rows = inner, 0, 0

    def loss(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        raise AssertionError("evaluation needs no loss")

    def score(self, hidden_ND: Tensor, targets_N: Tensor) -> Scores:
        self.scored += len(targets_N)
        return self.inner.score(hidden_ND, targets_N)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        self.rows += len(hidden_ND)
        return self.inner.logits(hidden_ND)


def costs() -> dict[str, tuple[str, Windows, int]]:
    """Family, windows, and how many tokens are read in scoring the whole text."""
    number = 60_000
    whole = Segments.whole(number, EOS)
    lines = Segments.ending_with(text(number) == 5, EOS)
    found = {
        "lstm, stream": ("lstm", unbroken(whole)),
        "lstm, stripes": ("lstm", unbroken(Segments.stripes(number, 10))),
        "lstm, sentences": ("lstm", unbroken(lines)),
        "lstm, strided": ("lstm", strided(number, 1024, 512)),
        "transformer, stream": ("llama", sliding(whole, 32, 16)),
        "transformer, stride 1": ("llama", sliding(whole, 32, 1)),
        "transformer, disjoint": ("llama", sliding(whole, 32, 32)),
        "transformer, documents": ("llama", rolling(lines, 32)),
    }
    return {
        name: (family, windows, int((windows.ends_W - windows.begins_W).sum()))
        for name, (family, windows) in found.items()
    }


@pytest.mark.parametrize("name", costs())
def test_the_proofs_read_two_in_a_hundred_of_what_scoring_reads(name: str) -> None:
    family, windows, reads = costs()[name]
    model = Counting(HONEST[family]())
    run(model, windows, num_tokens=60_000)
    window = min(windows.longest, checks.MAX_WINDOW)
    wanted = max(checks.MIN_SAMPLE, checks.SAMPLE_SHARE * windows.num_scored)
    wanted = min(wanted, checks.MAX_WINDOWS * reads / len(windows.begins_W))
    assert isinstance(model.head, CountingHead)
    assert 0.4 * wanted <= model.head.scored / 2 <= wanted + 2 * window
    assert model.read <= 0.02 * reads
    assert model.longest <= window
    assert model.head.rows <= 2 * wanted + 3 * checks.ROWS


@given(st.lists(st.integers(1, 700), min_size=1, max_size=12), st.booleans(), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_a_sample_scores_each_of_its_tokens_once_and_lies_within_the_windows(
    lengths: list[int], unbounded: bool, overlapping: int
) -> None:
    ends = np.cumsum(lengths)
    segments = Segments(np.append(0, ends)[:-1], ends, EOS)
    windows = unbroken(segments) if overlapping == 0 else sliding(segments, 300, 50 * overlapping)
    sample = sample_windows(windows, unbounded)
    spans = [range(a, b) for a, b in zip(sample.scored_W.tolist(), sample.ends_W.tolist(), strict=True)]
    positions = [p for span in spans for p in span]
    assert len(positions) == len(set(positions)) == sample.num_scored > 0
    assert (sample.begins_W <= sample.scored_W).all()
    scored = windows.positions_in_context(int(ends[-1])) >= 0
    assert all(scored[p] for p in positions)
    # a window without a prefix reads the token before it, which must be there
    assert all(begin > 0 or prefix >= 0 for begin, prefix in zip(sample.begins_W, sample.prefix_W, strict=True))
    if len(windows.begins_W) > 1 or (windows.longest > checks.MAX_WINDOW and unbounded):
        assert len(sample.begins_W) >= 2, "else nothing is compared between batches"


def test_short_windows_are_few_and_all_of_their_tokens_count() -> None:
    sample = sample_windows(sliding(Segments.whole(1_000_000, EOS), 16, 1), False)
    assert len(sample.begins_W) == checks.MAX_WINDOWS
    assert sample.num_scored == checks.MAX_WINDOWS * 16


def test_windows_that_overlap_almost_entirely_give_whole_pieces() -> None:
    sample = sample_windows(sliding(Segments.whole(10_000, EOS), 64, 1), False)
    assert (sample.ends_W - sample.scored_W).tolist() == [checks.MIN_SAMPLE // 2] * 2


def test_a_sample_of_one_long_window_is_taken_from_its_start_and_its_end() -> None:
    sample = sample_windows(unbroken(Segments.whole(82_430, EOS)), True)
    assert sample.begins_W[0] == 0
    assert sample.prefix_W.tolist() == [EOS, -1]
    assert sample.ends_W[-1] > 82_000
    assert sample.num_scored == pytest.approx(0.004 * 82_430, abs=2)


# Vocabulary, and lines of the text that train holds too


def test_a_token_that_the_model_does_not_know_is_named() -> None:
    model = HONEST["llama"]()
    check_vocabulary(model, text(50), "test")
    check_vocabulary(model, text(0), "test")
    with pytest.raises(ConfigError, match=f"ptb test holds token {VOCAB}, the model knows {VOCAB}"):
        check_vocabulary(model, np.array([3, VOCAB]), "ptb test")


ENDS = np.arange(6) == 1


def lines_of(ids: list[int]) -> list[tuple[int, ...]]:
    lines: list[tuple[int, ...]] = []
    line: list[int] = []
    for token in ids:
        line.append(token)
        if ENDS[token]:
            lines.append(tuple(line))
            line = []
    return [*lines, tuple(line)] if line else lines


tokens = st.lists(st.integers(0, 5), max_size=120)


@given(tokens, st.integers(1, 130))
@settings(max_examples=200)
def test_equal_lines_have_equal_hashes_and_different_lines_different_ones(ids: list[int], chunk: int) -> None:
    lines = lines_of(ids)
    found = line_hashes(np.array(ids, np.uint16), ENDS, chunk)
    hashes = found.hashes
    assert found.lengths.tolist() == [len(line) for line in lines]
    assert hashes.tolist() == line_hashes(np.array(ids, np.uint16), ENDS).hashes.tolist(), "however the text is cut"
    by_line: dict[tuple[int, ...], int] = {}
    for line, value in zip(lines, hashes.tolist(), strict=True):
        assert by_line.setdefault(line, value) == value
    assert len(set(by_line.values())) == len(by_line)


@st.composite
def texts_in_common(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Train and test made of a few lines, so that many are in both."""
    pool = draw(st.lists(st.lists(st.sampled_from([0, 2, 3, 4, 5]), max_size=12), min_size=1, max_size=6))
    picks = st.lists(st.integers(0, len(pool) - 1), max_size=10)
    first, second = (
        [token for i in draw(picks) for token in [*pool[i], 1]] + draw(st.sampled_from([[], [2], [2] * 9]))
        for _ in range(2)
    )
    return first, second


@given(texts_in_common(), st.integers(1, 12))
@settings(max_examples=200)
def test_the_overlap_is_that_of_sets_of_lines(texts: tuple[list[int], list[int]], shortest: int) -> None:
    train, test = texts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "MIN_LINE", shortest)
        found = overlap(np.array(train, np.uint16), np.array(test, np.uint16), ENDS)
    known = {line for line in lines_of(train) if len(line) >= shortest}
    counted = [line for line in lines_of(test) if len(line) >= shortest]
    seen = [line for line in counted if line in known]
    assert (found.num_lines, found.num_seen) == (len(counted), len(seen))
    total = sum(map(len, counted))
    assert found.share_of_tokens == pytest.approx(sum(map(len, seen)) / total if total else 0.0)


def test_lines_with_the_same_words_in_another_order_or_number_are_different() -> None:
    one = [2, 3, 4, 5, 2, 3, 4, 5, 1]
    for other in ([3, 2, 4, 5, 2, 3, 4, 5, 1], [2, 3, 4, 5, 2, 3, 4, 1], [2, 3, 4, 5, 2, 3, 4, 5, 5, 1]):
        assert overlap(np.array(one), np.array(other), ENDS).num_seen == 0
    assert overlap(np.array(one), np.array(one * 3), ENDS).num_seen == 3
