"""What training on CPUs takes instead of autograd's own: functions that keep less and read memory less often.

They compute what the plain operations of ``transformer`` compute, up to rounding; the tests hold the one against the
other. Shape letters as there; M = (H + 2 K) C rows of the projection to heads, P = (H + K) C / 2 rotated pairs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmkit import products

BLOCK_ELEMENTS = 1_000_000
"""Numbers that are worked on at a time: 4 MB, which caches hold together with what is made of them."""


def trains_on_cpu(x: Tensor) -> bool:
    """Whether the hand-written functions below apply."""
    return (
        x.device.type == "cpu"
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def attention(q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, **options: Any) -> Tensor:
    """torch's scaled_dot_product_attention; trained on a CPU it runs in fp32 also under autocast.

    There its gradient in bf16 takes six times as long (torch 2.13), even where products in bf16 are four times as fast.
    """
    if q_BHTC.device.type == "cpu" and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q_BHTC.float(), k_BKSC.float(), v_BKSC.float(), **options)
    return F.scaled_dot_product_attention(q_BHTC, k_BKSC, v_BKSC, **options)


class UnitRMS(torch.autograd.Function):
    """n = x r with r = (mean(x^2) + eps)^(-1/2), an RMSNorm without its gain; keeps n and r.

    dx = r (dn - n mean(dn n)). Where squares overflow r is NaN, not 0, which would hide it behind zeros.
    """

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, eps: float) -> Tensor:
        squares_BT1 = torch.linalg.vector_norm(x_BTD, dim=-1, keepdim=True).square_()
        rate_BT1 = squares_BT1.div_(x_BTD.shape[-1]).add_(eps).rsqrt_()
        rate_BT1.masked_fill_(rate_BT1 == 0.0, math.nan)
        n_BTD: Tensor = x_BTD * rate_BT1
        ctx.save_for_backward(n_BTD, rate_BT1)
        return n_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dn_BTD: Tensor) -> tuple[Tensor, None]:
        n_BTD, rate_BT1 = ctx.saved_tensors
        along_BT1 = torch.linalg.vecdot(dn_BTD, n_BTD).unsqueeze_(-1).div_(-n_BTD.shape[-1])
        return torch.addcmul(dn_BTD, n_BTD, along_BT1).mul_(rate_BT1), None


class SwigluDown(torch.autograd.Function):
    """y = (silu(gate) * up) W^T + b; keeps gate and up, and makes their product again in the backward pass.

    Some rows at a time: what lies between two products stays in the cache, and needs little memory beside what is kept.
    The gradient takes the place of gate and up, so that there is one backward pass; torch refuses a second one.
    """

    @staticmethod
    def forward(ctx: Any, gate_up_BTF: Tensor, weight_DF: Tensor, bias_D: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up_BTF, weight_DF)
        gate_up_NF = gate_up_BTF.flatten(0, -2)
        y_BTD = gate_up_BTF.new_empty(*gate_up_BTF.shape[:-1], len(weight_DF))
        y_ND = y_BTD.view(-1, len(weight_DF))
        for rows in row_blocks(gate_up_NF):
            gate_RF, up_RF = gate_up_NF[rows].chunk(2, dim=-1)
            y_ND[rows] = products.linear(F.silu(gate_RF).mul_(up_RF), weight_DF, bias_D)
        return y_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTD: Tensor) -> tuple[Tensor | None, ...]:
        gate_up_BTF, weight_DF = ctx.saved_tensors
        needs_gate_up, needs_weight, needs_bias = ctx.needs_input_grad
        gate_up_NF, dy_ND = gate_up_BTF.flatten(0, -2), dy_BTD.flatten(0, -2)
        d_weight_DF: Tensor | None = None
        for rows in row_blocks(gate_up_NF):
            gate_RF, up_RF = gate_up_NF[rows].chunk(2, dim=-1)
            active_RF = F.silu(gate_RF)
            inner_RF = active_RF * up_RF
            if needs_weight:
                d_weight_DF = products.add_outer(d_weight_DF, dy_ND[rows], inner_RF, weight_DF.dtype)
            if needs_gate_up:
                d_inner_RF = products.times(dy_ND[rows], weight_DF)
                d_active_RF = torch.mul(d_inner_RF, up_RF, out=inner_RF)
                torch.mul(d_inner_RF, active_RF, out=up_RF)
                torch.ops.aten.silu_backward.grad_input(d_active_RF, gate_RF, grad_input=gate_RF)
        return (
            gate_up_NF.view(gate_up_BTF.shape) if needs_gate_up else None,
            d_weight_DF,
            dy_ND.sum(0) if needs_bias else None,
        )


def row_blocks(x_NF: Tensor) -> list[slice]:
    """Blocks of about as many rows each, with at most BLOCK_ELEMENTS numbers or one row."""
    number = max(1, -(-x_NF.numel() // BLOCK_ELEMENTS))
    size = max(1, -(-len(x_NF) // number))
    return [slice(start, start + size) for start in range(0, len(x_NF), size)]


class RotaryProjection(torch.autograd.Function):
    """x W^T + b cut into queries, keys and values, the first two rotated; keeps x and the result.

    The rows of W are put in the order in which the two channels of a rotated pair are neighbours, so that a pair is one
    complex number and the rotation one product. Products of queries with keys do not depend on the order.
    M = (H + 2 K) C rows of W; P = (H + K) C / 2 pairs of a position.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BTD: Tensor,
        weight_MD: Tensor,
        bias_M: Tensor | None,
        turns_TP: Tensor,
        num_heads: int,
        num_kv_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        channels = len(weight_MD) // (num_heads + 2 * num_kv_heads)
        rotated = 2 * turns_TP.shape[1]
        weight_MD = reordered(weight_MD, rotated, (-1, 2, channels // 2))
        bias_M = None if bias_M is None else reordered(bias_M, rotated, (-1, 2, channels // 2))
        rows_BTM = products.linear(x_BTD, weight_MD, bias_M)
        as_complex(rows_BTM[..., :rotated]).mul_(turns_TP)
        ctx.save_for_backward(x_BTD, weight_MD, turns_TP)
        ctx.channels = channels
        heads_BTC = rows_BTM.view(*x_BTD.shape[:-1], -1, channels).transpose(1, 2)
        q_BHTC, k_BKTC, v_BKTC = torch.split(heads_BTC, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        return q_BHTC, k_BKTC, v_BKTC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_BHTC: Tensor, dk_BKTC: Tensor, dv_BKTC: Tensor) -> tuple[Tensor | None, ...]:
        x_BTD, weight_MD, turns_TP = ctx.saved_tensors
        rotated, pair = 2 * turns_TP.shape[1], (-1, ctx.channels // 2, 2)
        back_TP = turns_TP.conj().resolve_conj()
        d_rows_BTM = x_BTD.new_empty(*x_BTD.shape[:-1], len(weight_MD))
        start = 0
        for grad in (dq_BHTC, dk_BKTC):
            width = grad.shape[1] * ctx.channels
            rows = d_rows_BTM[..., start : start + width]
            turned = as_complex(grad.transpose(1, 2).flatten(2).contiguous())
            torch.mul(turned, back_TP[:, start // 2 : (start + width) // 2], out=as_complex(rows))
            start += width
        d_rows_BTM[..., start:] = dv_BKTC.transpose(1, 2).flatten(2)
        dx_BTD = d_weight_MD = d_bias_M = None
        if ctx.needs_input_grad[0]:
            dx_BTD = products.times(d_rows_BTM, weight_MD)
        if ctx.needs_input_grad[1]:
            d_weight_MD = reordered(products.outer(d_rows_BTM, x_BTD), rotated, pair)
        if ctx.needs_input_grad[2]:
            d_bias_M = reordered(d_rows_BTM.flatten(0, -2).sum(0), rotated, pair)
        return dx_BTD, d_weight_MD, d_bias_M, None, None, None


def unit_turns(cos_TC: Tensor, sin_TC: Tensor, num_heads: int) -> Tensor:
    """(T, num_heads C/2) complex: exp(i angle) of each pair of channels, the same for every head."""
    half = cos_TC.shape[1] // 2
    return torch.complex(cos_TC[:, :half].contiguous(), sin_TC[:, :half].contiguous()).repeat(1, num_heads)


def as_complex(x: Tensor) -> Tensor:
    """A view: channels 2i and 2i + 1 as real and imaginary part."""
    return torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))


def reordered(rows: Tensor, count: int, shape: tuple[int, int, int]) -> Tensor:
    """A copy whose first ``count`` rows, seen as ``shape``, have their last two axes of it exchanged."""
    return torch.cat([rows[:count].view(*shape, *rows.shape[1:]).transpose(1, 2).flatten(0, 2), rows[count:]])
