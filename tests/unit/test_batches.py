"""Batches: known shapes and fixed orders. The laws are in tests/property/test_batch_laws.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmkit.data.batches import Lanes, Restarted, Windows, to_device
from lmkit.data.order import Permutation, epoch_rows
from lmkit.errors import DataError
from lmkit.models.base import IGNORE

EOS = 9


def test_lanes_read_contiguous_parts_side_by_side() -> None:
    lanes = Lanes(np.arange(10, dtype=np.uint8), EOS, batch_size=2, seq_len=3)
    first, second = lanes[0], lanes[1]
    assert lanes.steps_per_epoch == 2
    assert first.targets_BT.tolist() == [[0, 1, 2], [5, 6, 7]]
    assert first.inputs_BT.tolist() == [[EOS, 0, 1], [4, 5, 6]]
    assert second.targets_BT.tolist() == [[3, 4, IGNORE], [8, 9, IGNORE]]
    assert second.inputs_BT.tolist() == [[2, 3, EOS], [7, 8, EOS]]


def test_state_is_reset_at_the_start_of_each_epoch_of_lanes_and_before_each_batch_of_windows() -> None:
    tokens = np.arange(10)
    lanes, windows = Lanes(tokens, EOS, 2, 3), Windows(tokens, EOS, 2, 3, seed=0)
    assert [lanes[step].starts_text for step in range(5)] == [True, False, True, False, True]
    assert all(windows[step].starts_text for step in range(5))


@pytest.mark.parametrize("make", [lambda t: Lanes(t, EOS, 4, 8), lambda t: Windows(t, EOS, 4, 8, seed=1)])
def test_a_stream_of_one_token_makes_one_padded_batch(make) -> None:
    batches = make(np.array([3], np.uint16))
    batch = batches[0]
    assert batches.steps_per_epoch == 1
    assert batch.targets_BT.shape == batch.inputs_BT.shape == (4, 8)
    assert batch.targets_BT[batch.targets_BT != IGNORE].tolist() == [3]
    assert batch.inputs_BT.dtype == batch.targets_BT.dtype == torch.int64


def test_an_empty_stream_is_refused() -> None:
    with pytest.raises(DataError, match="no tokens"):
        Lanes(np.array([], np.uint16), EOS, 4, 8)


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(IndexError):
        Lanes(np.arange(5), EOS, 1, 2)[-1]


def test_the_permutation_never_changes() -> None:
    assert Permutation(10, 0)(np.arange(10)).tolist() == [4, 6, 9, 2, 1, 8, 5, 3, 0, 7]
    assert Permutation(1_000_000, 2**62)(np.array([0, 1, 2, 999_999])).tolist() == [868447, 741355, 286703, 843684]


@pytest.mark.parametrize("index", [-1, 10, 15, 16, 2**40])
def test_an_index_outside_of_a_permutation_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match=r"outside \[0, 10\)"):
        Permutation(10, 0)(np.array([3, index]))
    assert Permutation(10, 0)(np.arange(0)).tolist() == []


@pytest.mark.parametrize(("num_rows", "sizes"), [(10, [4, 4, 2]), (8, [4, 4]), (3, [3])])
def test_over_an_epoch_each_row_comes_once_and_only_the_last_batch_may_be_smaller(
    num_rows: int, sizes: list[int]
) -> None:
    for epoch in range(3):
        steps = range(epoch * len(sizes), (epoch + 1) * len(sizes))
        batches = [epoch_rows(step, len(sizes), num_rows, 4, seed=1) for step in steps]
        assert [len(rows) for rows in batches] == sizes
        assert sorted(row for rows in batches for row in rows) == list(range(num_rows))


def test_the_order_of_windows_never_changes() -> None:
    windows = Windows(np.arange(20), EOS, batch_size=2, seq_len=4, seed=7)
    firsts = [windows[step].targets_BT[:, 0].tolist() for step in range(2 * windows.steps_per_epoch)]
    assert firsts == [[14, 18], [10, 2], [6, 0], [3, 15], [19, 0], [7, 11]]


def test_an_order_that_begins_anew_begins_with_an_epoch_that_is_in_no_other_order() -> None:
    windows = Windows(np.arange(20), EOS, batch_size=2, seq_len=4, seed=7)
    orders = [Restarted(windows, number=number, first_step=5) for number in (1, 2)]
    assert [order.steps_per_epoch for order in orders] == [windows.steps_per_epoch] * 2
    firsts = [[order[step].targets_BT[:, 0].tolist() for step in range(5, 8)] for order in orders]
    assert firsts == [[[0, 14], [6, 2], [18, 10]], [[10, 6], [2, 14], [18, 0]]]  # as it will be for ever
    assert firsts[0] != firsts[1]
    lanes = Restarted(Lanes(np.arange(10, dtype=np.uint8), EOS, 2, 3), number=1, first_step=5)
    assert [lanes[step].starts_text for step in range(5, 9)] == [True, False, True, False]
    assert lanes[5].targets_BT.tolist() == [[0, 1, 2], [5, 6, 7]]


def test_before_an_order_begins_its_data_were_others() -> None:
    batches = Restarted(Lanes(np.arange(10), EOS, 2, 3), number=1, first_step=5)
    with pytest.raises(DataError, match="the batch of step 5 was of other data: the run has had these since step 5"):
        batches[4]


def test_a_late_step_costs_no_more_than_an_early_one() -> None:
    windows = Windows(np.arange(1000), EOS, 4, 8, seed=1)
    assert windows[10**15].targets_BT.shape == (4, 8)


def test_window_edges_move_between_epochs() -> None:
    for n in (64, 61, 1003):
        windows = Windows(np.arange(n), EOS, batch_size=1, seq_len=8, seed=3)
        edges = set()
        for step in range(20 * windows.steps_per_epoch):
            edges.add(int(windows[step].targets_BT[0, 0]) % 8)
        assert len(edges) >= 4, n


def test_what_goes_to_a_card_starts_from_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        done.append("pinned")
        return tensor

    def to(tensor: torch.Tensor, device: torch.device, *, non_blocking: bool) -> torch.Tensor:
        done.append(f"{device} {non_blocking}")
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    for kind in ("cpu", "cuda"):
        to_device(torch.ones(2), torch.device(kind))
    assert done == ["cpu True", "pinned", "cuda True"]
