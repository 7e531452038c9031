"""How a Transformer is told where a token stands, where that is computed and not learned.

Shape letters: T positions, C channels of a head, D the model's width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(context: int, channels: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position x theta^(-2i/C), (T, C), both halves alike (Su et al. 2021, section 3.4.2)."""
    rates_C = theta ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angles_TC = torch.arange(context, dtype=torch.float64)[:, None] * torch.cat([rates_C, rates_C])
    return angles_TC.cos().float(), angles_TC.sin().float()


def rotate(x_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Rotate channel i together with channel i + C/2, which is the layout of Hugging Face's Llama."""
    first, second = x_BHTC.chunk(2, dim=-1)
    return (x_BHTC * cos_TC + torch.cat([-second, first], dim=-1) * sin_TC).to(x_BHTC.dtype)


def sinusoidal_table(context: int, d_model: int) -> Tensor:
    """(T, D): sin in the even channels, cos in the odd ones (Vaswani et al. 2017, section 3.5)."""
    rates = 10000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angles = torch.arange(context, dtype=torch.float64)[:, None] * rates
    table_TD = torch.zeros(context, d_model, dtype=torch.float64)
    table_TD[:, 0::2] = angles.sin()
    table_TD[:, 1::2] = angles.cos()[:, : d_model // 2]
    return table_TD.float()
