"""Products of fp32 matrices on a CPU, by the faster of the two libraries that torch is built with.

torch multiplies with MKL, which uses AVX-512 on the CPUs of Intel only. oneDNN uses it on all that have it, on AMD's at
more than twice the rate, and is somewhat faster with AVX2 or AVX-512 in halves there, too, but for sums over positions;
on Intel's the two are equally fast, and MKL has less to do before it begins. On GPUs, in half precision and in compiled
or traced code these are torch's own. Shape letters: N positions, I inputs, O outputs.
"""

from __future__ import annotations

import functools
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MIN_ROWS = 32
"""With fewer, what oneDNN does before it begins takes longer than the product."""
MIN_ROWS_TO_ADD = 256
"""With fewer, a product that MKL adds in place takes less time than one that oneDNN makes beside it."""


@functools.cache
def prefers_onednn() -> bool:
    """Whether this CPU has AVX2 or AVX-512 and is not Intel's."""
    return torch._C._has_mkldnn and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and not is_intel()


@functools.cache
def is_intel() -> bool:
    """Whether this CPU is Intel's, for which MKL is made, or unknown."""
    about_cpu: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 has no such function
    return "intel" in str(about_cpu.get("cpu_name", "intel")).lower()


def by_onednn(x: Tensor, num_rows: int) -> bool:
    """Whether products of ``num_rows`` rows like ``x`` go to oneDNN."""
    return (
        not torch.compiler.is_compiling()  # first, for what follows cannot be compiled
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and num_rows >= MIN_ROWS
        and prefers_onednn()
        and not torch.is_autocast_enabled("cpu")
    )


def sums_by_onednn(dy_NO: Tensor) -> bool:
    """Whether oneDNN sums over the positions of ``dy_NO``. With AVX2 or AVX-512 in halves MKL takes 0.6 to 1 times as
    long, which needs no transposed copy of a factor."""
    return adds_by_onednn(dy_NO) and has_wide_units()


def adds_by_onednn(dy_NO: Tensor) -> bool:
    """The same for sums of some hundred rows that are added to others: there AVX-512 in halves is enough."""
    return by_onednn(dy_NO, len(dy_NO)) and torch.backends.cpu.get_cpu_capability() != "AVX2"


@functools.cache
def has_wide_units() -> bool:
    """Whether AVX-512 has units of its width. Of AMD's CPUs Zen 4 has not; its successor has AVX-VNNI, too."""
    return bool(torch.cpu.get_capabilities().get("avx_vnni", True))


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """x W^T + b: (..., I) -> (..., O), differentiable. MKL writes a result that is not differentiated to ``out``."""
    if not by_onednn(x, x.numel() // max(1, x.shape[-1])):
        if out is None:
            return F.linear(x, weight_OI, bias_O)
        return torch.mm(x, weight_OI.T, out=out) if bias_O is None else torch.addmm(bias_O, x, weight_OI.T, out=out)
    if torch.is_grad_enabled():
        y: Tensor = _Linear.apply(x, weight_OI, bias_O)  # type: ignore[no-untyped-call]
        return y
    return onednn(x, weight_OI, bias_O)


def apply(layer: nn.Module, x: Tensor, gain_I: Tensor | None = None) -> Tensor:
    """``layer(x)``, by way of ``linear`` if it ``is_plain``. gain: factors of x's channels, for plain layers."""
    if is_plain(layer):
        return linear(x, layer.weight if gain_I is None else layer.weight * gain_I, layer.bias)
    y: Tensor = layer(x if gain_I is None else x * gain_I)
    return y


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is an nn.Linear and nothing more, so that its matrix may be used without it."""
    return type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks


def times(dy: Tensor, weight_OI: Tensor) -> Tensor:
    """dy W: (..., O) -> (..., I), not differentiable."""
    if not by_onednn(dy, dy.numel() // max(1, dy.shape[-1])):
        return dy @ weight_OI
    return onednn(dy, weight_OI.T, None)


def outer(dy: Tensor, x: Tensor) -> Tensor:
    """The sum over all positions of dy x^T: (..., O), (..., I) -> (O, I), not differentiable."""
    dy_NO, x_NI = dy.flatten(0, -2), x.flatten(0, -2)
    return _outer_by_onednn(dy_NO, x_NI) if sums_by_onednn(dy_NO) else dy_NO.T @ x_NI


def _outer_by_onednn(dy_NO: Tensor, x_NI: Tensor) -> Tensor:
    # oneDNN reads the first factor row by row, so that its transposed copy is made: the smaller of the two
    if dy_NO.shape[1] <= x_NI.shape[1]:
        return onednn(dy_NO.T, x_NI.T, None)
    return onednn(x_NI.T, dy_NO.T, None).T


def add_outer(total_OI: Tensor | None, dy_NO: Tensor, x_NI: Tensor, dtype: torch.dtype) -> Tensor:
    """``total_OI`` (of ``dtype``; None: zeros) plus outer(dy, x), in place."""
    large = len(dy_NO) >= MIN_ROWS_TO_ADD and adds_by_onednn(dy_NO)
    if total_OI is None:
        return (_outer_by_onednn(dy_NO, x_NI) if large else outer(dy_NO, x_NI)).to(dtype)
    if large:
        return total_OI.add_(_outer_by_onednn(dy_NO, x_NI).to(dtype))
    if dy_NO.dtype != dtype:
        part_OI = dy_NO.T @ x_NI
        return total_OI.add_(part_OI.to(dtype) if part_OI.device.type == "cpu" else part_OI)  # a card widens as it adds
    return total_OI.addmm_(dy_NO.T, x_NI)


class Factor:
    """A matrix W that several products take, not differentiable: for oneDNN it is put into its order once."""

    def __init__(self, weight_OI: Tensor, num_rows: int) -> None:
        """num_rows: of most of the products."""
        self.weight_OI = weight_OI
        self.packed_OI = packed(weight_OI, num_rows) if by_onednn(weight_OI, num_rows) else None

    def product(self, x_NI: Tensor, bias_O: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
        """x W^T + b: (N, I) -> (N, O). MKL writes it to ``out``."""
        if self.packed_OI is None or len(x_NI) < MIN_ROWS:
            return linear(x_NI, self.weight_OI, bias_O, out=out)
        return onednn(x_NI, self.packed_OI, bias_O)


def packed(weight_OI: Tensor, num_rows: int) -> Tensor:
    """A copy in the order in which oneDNN reads it in products of ``num_rows`` rows; for ``onednn`` alone."""
    copy_OI: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, num_rows)
    return copy_OI


def onednn(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + b; the weight may be ``packed``. The result is no view, so that it may be written over."""
    y_NO: Tensor = torch.ops.mkldnn._linear_pointwise(x.flatten(0, -2), weight_OI, bias_O, "none", [], "")
    y: Tensor = y_NO if x.ndim == 2 else torch.ops.aten._unsafe_view(y_NO, [*x.shape[:-1], len(weight_OI)])
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return onednn(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            times(dy, weight_OI) if needs_x else None,
            outer(dy, x) if needs_weight else None,
            dy.flatten(0, -2).sum(0) if needs_bias else None,
        )
