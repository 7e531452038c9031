"""Memory straight from the system."""

from __future__ import annotations

import mmap

import pytest
import torch

from lmkit import pages


def test_memory_is_whole_pages_of_zeros() -> None:
    for shared in (False, True):
        room = pages.memory(5, shared=shared)
        assert len(room) == mmap.PAGESIZE
        assert room[:] == bytes(mmap.PAGESIZE)


def test_memory_that_the_system_does_not_give_is_a_memory_error_that_says_how_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(MemoryError, match=r"2\.0 MB"):
        pages.memory(2_000_000)


def test_a_shelf_holds_contiguous_copies_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages.Shelf, "MIN_BYTES", mmap.PAGESIZE)
    shelf = pages.Shelf()
    wide, row, large = torch.arange(8.0).view(4, 2), torch.ones(4), torch.rand(2, mmap.PAGESIZE)
    first, second, third = shelf.copy(wide.T), shelf.copy(row), shelf.copy(large)
    assert first.is_contiguous()
    assert torch.equal(first, wide.T)
    assert torch.equal(second, row)
    assert torch.equal(third, large)
    assert second.data_ptr() == first.data_ptr() + 8 * 4
    assert shelf.copy(torch.empty(0, 3)).shape == (0, 3)
