"""Which library multiplies follows from the CPU's name and its instructions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmkit import products
from lmkit.models.stepping import OneRow, OneRowByParts, Product, product
from lmkit.pages import Shelf


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    products.is_intel.cache_clear()
    products.prefers_onednn.cache_clear()
    yield
    products.is_intel.cache_clear()
    products.prefers_onednn.cache_clear()


@pytest.mark.parametrize(
    ("about", "instructions", "intel", "onednn"),
    [
        ({"cpu_name": "Intel(R) Xeon(R) Processor"}, "AVX512", True, False),
        ({"cpu_name": "AMD EPYC 9R14"}, "AVX512", False, True),
        ({"cpu_name": "AMD EPYC 7R13"}, "AVX2", False, True),
        ({"cpu_name": "Intel(R) Core(TM) i5"}, "AVX2", True, False),
        ({"cpu_name": "Neoverse"}, "SVE256", False, False),
        ({"cpu_name": "AMD Athlon"}, "DEFAULT", False, False),
        ({}, "AVX512", True, False),
    ],
)
def test_the_library_and_the_cut_of_a_matrix(
    about: dict[str, str], instructions: str, intel: bool, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: about, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setattr(torch._C, "_has_mkldnn", True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert products.is_intel() is intel
    assert products.prefers_onednn() is onednn
    sums_rows = isinstance(product(torch.ones(4, 3), None, 1, Shelf()), OneRow)
    assert sums_rows is (onednn and instructions == "AVX512")


@pytest.mark.parametrize("way", [OneRow, OneRowByParts])
@pytest.mark.parametrize("num_out", [6, 7])
@pytest.mark.parametrize("bias", [True, False])
def test_one_row_times_a_matrix_is_the_plain_product_whichever_way_it_is_cut(
    way: Callable[[Tensor, Tensor | None, Shelf], Product], num_out: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    torch.manual_seed(1)
    x_1I, weight_OI, bias_O = torch.randn(1, 5), torch.randn(num_out, 5), torch.randn(num_out) if bias else None
    torch.testing.assert_close(way(weight_OI, bias_O, Shelf())(x_1I), F.linear(x_1I, weight_OI, bias_O))
