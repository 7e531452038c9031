"""Ids outside a vocabulary are named, wherever in a text they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lmkit import ids
from lmkit.errors import DataError
from lmkit.ids import check_ids, check_text, file_of
from lmkit.initialise import token_counts


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64])
def test_ids_of_the_vocabulary_are_fine(dtype: type) -> None:
    check_text(np.arange(100, dtype=dtype), 100)
    check_ids(np.zeros((0, 4), dtype), 1, None, np.zeros((0, 4), np.int64))
    check_text(np.zeros(0, dtype), 5)


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
@pytest.mark.parametrize("position", [0, 7, 8, 19])
def test_the_first_id_outside_is_named_with_its_place(monkeypatch: pytest.MonkeyPatch, bad: int, position: int) -> None:
    monkeypatch.setattr(ids, "PIECE", 8)
    tokens = np.arange(20) % 5
    tokens[position] = bad
    tokens[19] = bad
    with pytest.raises(DataError, match=f"the text: .* vocabulary of 5: {bad:,} at position {position};"):
        check_text(tokens, 5)


def test_positions_are_those_that_were_read() -> None:
    with pytest.raises(DataError, match="vocabulary of 5: 9 at position 1,003;"):
        check_ids(np.array([[1, 2], [9, 9]]), 5, None, np.array([[1001, 1002], [1003, 1004]]))


def test_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.tokens"
    np.array([1, 2, 7], "<u2").tofile(path)
    tokens = np.memmap(path, "<u2", mode="r")
    assert file_of(tokens) == str(path)
    assert file_of(np.arange(3)) is None
    with pytest.raises(DataError, match=f"{path}: .*: 7 at position 2"):
        check_text(tokens, 5)


def test_counting_looks_at_the_ids_first() -> None:
    with pytest.raises(DataError, match="4,294,967,295 at position 1"):  # whose count alone would take 32 GB
        token_counts(np.array([3, 2**32 - 1], np.uint32), 5)
