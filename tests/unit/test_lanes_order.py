"""Lanes in another order and of other lengths each epoch: every token once, any step in one go, the same for a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkit.config.training import Shuffle, TrainConfig
from lmkit.data import batches, order
from lmkit.data.batches import Lanes
from lmkit.data.order import Pieces, jittered_edges
from lmkit.errors import ConfigError
from lmkit.explain import explain
from lmkit.models.base import IGNORE
from lmkit.tokenizers.basic import WordTokenizer

EOS = 0


def text(length: int, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Each token tells its place, but for an eos now and then."""
    tokens = np.arange(1, length + 1)
    tokens[np.random.default_rng(seed).random(length) < 0.15] = EOS
    return tokens


def lanes(tokens: np.ndarray[tuple[int], np.dtype[np.int64]], batch: int, seq_len: int, kind: str, seed: int) -> Lanes:
    pieces = {
        "none": None,
        "blocks": Pieces.blocks(len(tokens), 2 * seq_len, seed),
        "documents": Pieces.documents(tokens, EOS, seed),
    }
    return Lanes(tokens, EOS, batch, seq_len, pieces=pieces[kind.split("+")[0]], jitter=seed if "+" in kind else None)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 400),
    batch=st.integers(1, 5),
    seq_len=st.integers(1, 30),
    kind=st.sampled_from(["none", "blocks", "documents", "none+jitter", "blocks+jitter", "documents+jitter"]),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_over_an_epoch_every_token_is_a_target_once_and_its_input_is_the_token_before_it(
    length: int, batch: int, seq_len: int, kind: str, epoch: int, seed: int
) -> None:
    tokens = np.arange(1, length + 1)
    tokens[6::7] = -np.arange(len(tokens[6::7])) - 1  # different, so that each place can be told
    marked = np.where(tokens < 0, EOS, tokens)
    stream = lanes(marked, batch, seq_len, kind, seed)
    found: list[int] = []
    for k in range(stream.steps_per_epoch):
        b = stream[epoch * stream.steps_per_epoch + k]
        assert b.starts_text is (k == 0)
        assert b.inputs_BT.shape[1] >= 1
        scored = b.targets_BT != IGNORE
        targets, inputs = b.targets_BT[scored].tolist(), b.inputs_BT[scored].tolist()
        found += targets
        for target, before in zip(targets, inputs, strict=True):
            if target != EOS:
                assert before == (marked[target - 2] if target > 1 else EOS)
    assert sorted(found) == sorted(marked.tolist())


@pytest.mark.parametrize("kind", ["blocks", "documents"])
def test_the_order_changes_with_the_epoch_and_the_seed_and_with_nothing_else(kind: str) -> None:
    tokens = text(300)
    stream, same, other = (lanes(tokens, 3, 10, kind, seed) for seed in (1, 1, 2))
    steps = stream.steps_per_epoch
    first, second = stream[0].targets_BT, stream[steps].targets_BT
    assert not torch.equal(first, second)
    assert not torch.equal(first, other[0].targets_BT)
    assert torch.equal(stream[0].targets_BT, first)  # in any order
    for step in (2 * steps, 0, steps + 1):
        assert torch.equal(stream[step].targets_BT, same[step].targets_BT)


def test_what_an_epoch_needs_is_made_once_for_all_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **keywords: Any) -> Any:
            made.append(name)
            return original(*args, **keywords)

        return make

    monkeypatch.setattr(batches, "jittered_edges", counted("edges", batches.jittered_edges))
    monkeypatch.setattr(order, "PieceOrder", counted("order", order.PieceOrder))
    stream = lanes(text(300), 3, 10, "documents+jitter", 1)
    seen = [stream[step].targets_BT for step in range(stream.steps_per_epoch)]
    assert sorted(made) == ["edges", "order"]
    monkeypatch.setattr(np, "concatenate", None)  # of all pieces, for one batch
    assert torch.equal(stream[3].targets_BT, seen[3])
    assert sorted(made) == ["edges", "order"]


def test_documents_stay_whole() -> None:
    tokens = text(200)
    tokens[-1] = EOS
    read = lanes(tokens, 1, 200, "documents", 3)[0].targets_BT[0].numpy()
    before, after = ([tuple(d) for d in np.split(t, np.flatnonzero(t == EOS) + 1)] for t in (tokens, read))
    assert before != after
    assert sorted(before) == sorted(after)


def test_documents_are_lines_where_the_tokenizer_is_word_and_the_key_says_so() -> None:
    tokenizer = WordTokenizer(["one", "two", "three", "four"])
    tokens = np.concatenate([tokenizer.encode("one two\nthree\n"), tokenizer.encode("four two\n")])
    pieces = Pieces.documents(tokens, tokenizer.eos_id, seed=1).of_epoch(0)
    assert sorted(pieces.starts_P.tolist()) == [0, 3, 5]
    assert "lines where the tokenizer is word" in " ".join(explain("train.shuffle", "pretrain").split())


def test_lengths_are_spread_around_seq_len_with_some_of_half_of_it() -> None:
    edges = jittered_edges(700_000, 10_000, 70, seed=1, epoch=0)
    lengths = np.diff(edges)
    assert edges[0] == 0
    assert edges[-1] == 700_000
    assert 0.03 < (lengths < 53).mean() < 0.07
    usual = lengths[lengths >= 53]
    assert abs(usual.mean() / lengths.mean() - 1 / 0.975) < 0.005
    assert 4.5 < usual.std() < 5.7
    assert not np.array_equal(lengths, np.diff(jittered_edges(700_000, 10_000, 70, seed=1, epoch=1)))


def test_jitter_of_short_sequences_is_refused() -> None:
    with pytest.raises(ConfigError, match="seq_len=9 must be >= 10"):
        TrainConfig(seq_len=9, seq_len_jitter=True)
    assert TrainConfig(seq_len=9, shuffle=Shuffle.documents).shuffle is Shuffle.documents
