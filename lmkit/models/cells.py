"""torch's recurrent layers, in fp32 where autocast to bf16 would make something else of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def bf16_is_missing(x: Tensor) -> bool:
    """Whether autocast to bf16 is on and has no bf16 for a recurrent layer.

    On CUDA it would make it fp16, in which small gradients become zero without a gradient scaler. On CPUs without
    AVX-512 oneDNN refuses.
    """
    kind = x.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return False
    return torch.get_autocast_dtype(kind) is torch.bfloat16 and (
        kind == "cuda" or torch.backends.cpu.get_cpu_capability() != "AVX512"
    )


class _Wide(nn.RNNBase):
    """Computes in fp32 (on cards: TF32) where bf16 is missing."""

    def forward(self, x_TBD: Tensor, state: Any = None) -> Any:
        """As the layer of torch. state: None, (hidden,) as a tensor, or (hidden, cell); cuDNN, but not the layer of a
        CPU, refuses one that is not contiguous."""
        if state is not None:
            state = tuple(t.contiguous() for t in state) if isinstance(state, tuple) else state.contiguous()
        if not bf16_is_missing(x_TBD):
            return super().forward(x_TBD, state)
        with torch.autocast(x_TBD.device.type, enabled=False):
            wide = tuple(t.float() for t in state) if isinstance(state, tuple) else state
            return super().forward(x_TBD.float(), wide.float() if isinstance(wide, Tensor) else wide)


class LSTM(_Wide, nn.LSTM):  # type: ignore[misc]
    """See nn.LSTM."""


class GRU(_Wide, nn.GRU):  # type: ignore[misc]
    """See nn.GRU."""
