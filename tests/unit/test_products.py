"""Both libraries give the product, and its gradients, whatever the shapes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lmkit import heads, products
from lmkit.heads import Candidates, SoftmaxHead
from lmkit.models.base import IGNORE


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """oneDNN multiplies on every CPU, also where MKL is preferred."""
    if request.param and not torch._C._has_mkldnn:
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(products, "prefers_onednn", lambda: request.param)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")  # with AVX2 it would not sum
    monkeypatch.setattr(products, "has_wide_units", lambda: True)
    return bool(request.param)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(64,), (3, 40), (2, 3, 16), (5,), (1, 1), (0,)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_and_its_gradients_are_those_of_torch_in_double_precision(shape: tuple[int, ...], bias: bool) -> None:
    inputs = [drawn(*shape, 24), drawn(40, 24), *([drawn(40)] if bias else [])]
    ours = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    y, expected = products.linear(*ours), F.linear(*exact)
    close(y, expected)
    weights = drawn(*shape, 40)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(ours, exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        close(a.grad, b.grad)


def test_transposed_and_sliced_operands_are_read_as_they_are() -> None:
    x, w = drawn(48, 100).T[:, 4:28], drawn(24, 40).T
    close(products.linear(x, w), x.double() @ w.double().T)
    close(products.times(x, w.T), x.double() @ w.double().T)
    for a, b in ((x, drawn(100, 40)), (drawn(100, 40), x)):
        close(products.outer(a, b), a.double().T @ b.double())


@pytest.mark.skipif(not torch._C._has_mkldnn, reason="torch was built without oneDNN")
@torch.no_grad()
def test_a_packed_matrix_is_the_same_matrix_for_any_number_of_rows() -> None:
    w, bias = drawn(40, 24), drawn(40)
    packed = products.packed(w, 16)
    for rows in (16, 1, 5, 300):
        x = drawn(rows, 24)
        close(products.onednn(x, packed, bias), F.linear(x.double(), w.double(), bias.double()))


@torch.no_grad()
def test_a_factor_multiplies_any_number_of_rows_and_mkl_writes_where_it_is_asked_to(library: bool) -> None:
    w, bias = drawn(40, 24), drawn(40)
    factor = products.Factor(w, 64)
    assert (factor.packed_OI is not None) == library
    for rows in (64, 1, 31, 300):
        x = drawn(rows, 24)
        expected = F.linear(x.double(), w.double(), bias.double())
        close(factor.product(x, bias), expected)
        close(products.Factor(w.T, rows).product(drawn(rows, 40)), drawn(rows, 40).double() @ w.double())
        if not library:
            out = torch.full((rows + 6, 40), 7.0)
            factor.product(x, bias, out=out[:rows])
            close(out[:rows], expected)
            assert (out[rows:] == 7.0).all()


@pytest.mark.parametrize("rows", [64, 300])
def test_sums_are_added_up_in_place_whatever_the_number_of_rows(rows: int) -> None:
    for inputs, outputs in ((24, 40), (40, 24)):
        total, expected = None, torch.zeros(outputs, inputs, dtype=torch.float64)
        for number in (rows, rows, 5, 300):
            dy, x = drawn(number, outputs), drawn(number, inputs)
            before, total = total, products.add_outer(total, dy, x, torch.float32)
            assert before is None or total is before
            expected += dy.double().T @ x.double()
        close(total / rows, expected / rows)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sums_in_bf16_are_added_up_in_fp32_and_on_a_card_without_a_copy_of_them(device: str) -> None:
    class Copies(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.number += func.overloadpacket is torch.ops.aten._to_copy
            return func(*args, **kwargs or {})

    dy, x, total = drawn(300, 40).bfloat16(), drawn(300, 24).bfloat16(), drawn(40, 24)
    expected = total + (dy.T @ x).float()
    dy, x, total = dy.to(device), x.to(device), total.to(device)
    with Copies() as copies:
        assert products.add_outer(total, dy, x, torch.float32) is total
    assert copies.number == (device == "cpu")
    if device == "cpu":
        assert torch.equal(total, expected)
        assert torch.equal(drawn(40, 24).add_(dy.T @ x), expected)  # as on a card


def test_only_float32_in_eager_mode_on_a_cpu_goes_to_onednn(library: bool) -> None:
    x = drawn(64, 8)
    assert products.by_onednn(x, 64) == library
    assert not products.by_onednn(x, products.MIN_ROWS - 1)
    assert not products.by_onednn(x.double(), 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not products.by_onednn(x, 64)


@pytest.mark.parametrize(
    ("instructions", "wide", "summed", "added"),
    [("AVX512", True, True, True), ("AVX512", False, False, True), ("AVX2", True, False, False)],
)
def test_sums_over_positions_are_left_to_mkl_where_it_is_faster(
    instructions: str, wide: bool, summed: bool, added: bool, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setattr(products, "has_wide_units", lambda: wide)
    calls = []
    onednn = products.onednn
    monkeypatch.setattr(products, "onednn", lambda *args: calls.append(1) or onednn(*args))  # type: ignore[func-returns-value]
    dy, x = drawn(300, 40), drawn(300, 24)
    close(products.outer(dy, x), dy.double().T @ x.double())
    assert len(calls) == (library and summed)
    calls.clear()
    total = products.add_outer(None, dy, x, torch.float32)
    close(products.add_outer(total, dy, x, torch.float32), 2 * (dy.double().T @ x.double()))
    assert len(calls) == 2 * (library and added)


def test_a_frozen_input_costs_no_product() -> None:
    x, layer = drawn(64, 24), nn.Linear(24, 40)
    layer.weight.requires_grad_(False)
    products.apply(layer, x).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    close(layer.bias.grad, torch.full((40,), 64.0))


def test_a_layer_with_a_hook_is_called() -> None:
    layer, seen = nn.Linear(24, 40), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    products.apply(layer, drawn(64, 24))
    assert seen == [1]


def test_other_layers_are_called_as_they_are() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layer, x = Doubled(24, 40), drawn(64, 24)
    close(products.apply(layer, x), 2 * F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("hooked", [False, True])
def test_a_gain_is_that_of_the_inputs_channels_whatever_the_layer(hooked: bool) -> None:
    layer, x, gain = nn.Linear(24, 40), drawn(64, 24), drawn(24)
    if hooked:
        layer.register_forward_hook(lambda *_: None)
    assert products.is_plain(layer) is not hooked
    close(products.apply(layer, x, gain), layer(x * gain))


def test_the_loss_of_the_head_and_its_gradients_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "rows_per_chunk", lambda *_: 48)
    head = SoftmaxHead(nn.Parameter(drawn(300, 24)), bias=True)
    hidden = drawn(100, 24).requires_grad_()
    targets = torch.arange(100) * 3
    targets[7] = IGNORE
    loss = head.loss(hidden, targets)
    loss.backward()
    assert head.bias is not None
    exact = [t.detach().double().requires_grad_() for t in (hidden, head.weight, head.bias)]
    expected = F.cross_entropy(F.linear(*exact), targets, ignore_index=IGNORE, reduction="sum")
    expected.backward()
    close(loss, expected)
    for a, b in zip((hidden, head.weight, head.bias), exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        close(a.grad, b.grad)


def test_a_sampled_loss_does_not_depend_on_the_rounding_of_its_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for multiple in (1, heads.CANDIDATES_MULTIPLE):
        monkeypatch.setattr(heads, "CANDIDATES_MULTIPLE", multiple)
        head = SoftmaxHead(nn.Parameter(drawn(300, 24)), bias=True)
        hidden = drawn(100, 24).requires_grad_()
        candidates = Candidates(torch.arange(0, 300, 3), drawn(100).abs())
        loss = head.sampled_loss(hidden, candidates, torch.arange(100))
        loss.backward()
        assert head.bias is not None
        found.append([loss.detach(), hidden.grad, head.weight.grad, head.bias.grad])
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        assert torch.isfinite(b).all()
        close(a, b)


OTHER_SHAPES = """
import ctypes
import torch
from lmkit import products
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.device import resolve_device

class Account(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c d e f in_use g h".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Account
resolve_device(DeviceConfig(type=DeviceType.cpu, threads=1))
weight = torch.randn(64, 64)
for rows in range(100, 900):
    products.onednn(torch.randn(rows, 64), weight, None)
    if rows == 200:
        before = libc.mallinfo2().in_use
print(libc.mallinfo2().in_use - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc how much memory is in use")
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
def test_shapes_that_do_not_come_back_do_not_fill_the_memory() -> None:
    environment = {k: v for k, v in os.environ.items() if "CACHE_CAPACITY" not in k}
    done = subprocess.run([sys.executable, "-c", OTHER_SHAPES], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 3_000_000
