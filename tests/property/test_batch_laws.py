"""Laws of batches, for any stream, batch size and length."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkit.data.batches import Batch, Lanes, Restarted, Windows
from lmkit.data.order import Permutation
from lmkit.models.base import IGNORE

LAW = settings(max_examples=50, deadline=None)

lengths = st.integers(1, 200)
batch_sizes = st.integers(1, 9)
seq_lens = st.integers(1, 12)
seeds = st.integers(0, 2**31)


def stream(n: int) -> np.ndarray:
    """Tokens that are their own position, so that a target names its place; eos_id is n."""
    return np.arange(n, dtype=np.uint16)


def pairs(batches: Lanes | Windows, epoch: int) -> list[tuple[int, int]]:
    """(input, target) of every scored position of one epoch."""
    found = []
    for step in range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch):
        batch = batches[step]
        scored = batch.targets_BT != IGNORE
        assert scored.any(), "a batch without targets"
        found += list(zip(batch.inputs_BT[scored].tolist(), batch.targets_BT[scored].tolist(), strict=True))
    return found


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.inputs_BT, b.inputs_BT) and torch.equal(a.targets_BT, b.targets_BT)


@LAW
@given(lengths, batch_sizes, seq_lens, seeds, st.integers(0, 3))
def test_over_one_epoch_each_token_is_a_target_exactly_once(n: int, b: int, t: int, seed: int, epoch: int) -> None:
    for batches in (Lanes(stream(n), n, b, t), Windows(stream(n), n, b, t, seed)):
        assert sorted(target for _, target in pairs(batches, epoch)) == list(range(n))
        assert batches.num_tokens == n


@LAW
@given(lengths, batch_sizes, seq_lens, seeds, st.integers(1, 5), st.integers(0, 10**9))
def test_an_order_that_begins_anew_has_whole_epochs(n: int, b: int, t: int, seed: int, number: int, first: int) -> None:
    for batches in (Lanes(stream(n), n, b, t), Windows(stream(n), n, b, t, seed)):
        anew = Restarted(batches, number=number, first_step=first)
        for epoch in range(2):
            found = []
            for step in range(first + epoch * anew.steps_per_epoch, first + (epoch + 1) * anew.steps_per_epoch):
                targets_BT = anew[step].targets_BT
                found += targets_BT[targets_BT != IGNORE].tolist()
            assert sorted(found) == list(range(n))
        assert anew[first].starts_text


@LAW
@given(lengths, batch_sizes, seq_lens, seeds)
def test_the_input_is_the_token_before_the_target_and_eos_before_the_first(n: int, b: int, t: int, seed: int) -> None:
    for batches in (Lanes(stream(n), n, b, t), Windows(stream(n), n, b, t, seed)):
        assert all(source == (target - 1 if target else n) for source, target in pairs(batches, 0))


@LAW
@given(lengths, batch_sizes, seq_lens, seeds, st.integers(0, 10**12))
def test_a_batch_is_a_function_of_seed_and_step(n: int, b: int, t: int, seed: int, step: int) -> None:
    used = Windows(stream(n), n, b, t, seed)
    used[step + 1], used[0]
    assert same(used[step], Windows(stream(n), n, b, t, seed)[step])


@LAW
@given(lengths, batch_sizes, seq_lens)
def test_joining_the_lanes_gives_the_stream_back(n: int, b: int, t: int) -> None:
    lanes = Lanes(stream(n), n, b, t)
    rows = torch.cat([lanes[step].targets_BT for step in range(lanes.steps_per_epoch)], dim=1).flatten()
    assert rows[rows != IGNORE].tolist() == list(range(n))


@LAW
@given(lengths, batch_sizes, seq_lens, seeds, st.integers(0, 3))
def test_a_window_is_contiguous_and_padded_at_its_end_only(n: int, b: int, t: int, seed: int, epoch: int) -> None:
    windows = Windows(stream(n), n, b, t, seed)
    for step in range(epoch * windows.steps_per_epoch, (epoch + 1) * windows.steps_per_epoch):
        for row in windows[step].targets_BT.tolist():
            size = sum(target != IGNORE for target in row)
            assert row == [*range(row[0], row[0] + size), *[IGNORE] * (t - size)]


@LAW
@given(batch_sizes, seeds)
def test_epochs_and_seeds_differ_in_their_order(b: int, seed: int) -> None:
    n, t = 400, 5
    windows, other = Windows(stream(n), n, b, t, seed), Windows(stream(n), n, b, t, seed + 1)
    first = pairs(windows, 0)
    assert first != pairs(windows, 1)
    assert first != pairs(other, 0)


@LAW
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
def test_the_permutation_is_a_bijection(size: int, key: int) -> None:
    assert sorted(Permutation(size, key)(np.arange(size)).tolist()) == list(range(size))


@LAW
@given(st.integers(2**40, 2**60), st.integers(0, 2**63 - 1))
def test_the_permutation_of_a_huge_range_stays_in_it(size: int, key: int) -> None:
    images = Permutation(size, key)(np.array([0, 1, size // 2, size - 1]))
    assert len(set(images.tolist())) == 4
    assert ((images >= 0) & (images < size)).all()
