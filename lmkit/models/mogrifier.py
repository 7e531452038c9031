"""The Mogrifier LSTM cell (Melis et al. 2020, section 2): input and state gate each other before the LSTM reads them.

One step of Python a token: with 5 rounds of rank 64 it takes 2.5 times as long as PyTorch's LSTM at width 256 on one
core, batch 32 x 35. More shape letters here: I channels of the input, H channels of the state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MogrifierLSTM(nn.Module):
    """One layer, called like nn.LSTM and with its parameters' names.

    In round 1, 3, ... x = 2 sigmoid(Q_i h) x, in round 2, 4, ... h = 2 sigmoid(R_i x) h; no bias. With a rank, each of
    these matrices is a product of two. No rounds: a plain LSTM.
    """

    def __init__(self, width_in: int, width: int, rounds: int, rank: int | None) -> None:
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.empty(4 * width, width_in))
        self.weight_hh_l0 = nn.Parameter(torch.empty(4 * width, width))
        self.bias_ih_l0 = nn.Parameter(torch.empty(4 * width))
        self.bias_hh_l0 = nn.Parameter(torch.empty(4 * width))
        shapes = [(width, width_in) if i % 2 == 0 else (width_in, width) for i in range(rounds)]
        self.rounds = nn.ModuleList(_gate(read, gated, rank) for read, gated in shapes)

    def forward(
        self, x_TBI: Tensor, before: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Outputs (T, B, H), and last h and c, (1, B, H) each."""
        width = self.weight_hh_l0.shape[1]
        if before is None:
            h_BH = c_BH = x_TBI.new_zeros(x_TBI.shape[1], width)
        else:
            h_BH, c_BH = before[0][0], before[1][0]
        outputs = []
        for x_BI in x_TBI:
            for i, gate in enumerate(self.rounds):
                if i % 2 == 0:
                    x_BI = 2.0 * torch.sigmoid(gate(h_BH)) * x_BI
                else:
                    h_BH = 2.0 * torch.sigmoid(gate(x_BI)) * h_BH
            gates = F.linear(x_BI, self.weight_ih_l0, self.bias_ih_l0)
            i_BH, f_BH, g_BH, o_BH = (gates + F.linear(h_BH, self.weight_hh_l0, self.bias_hh_l0)).chunk(4, 1)
            c_BH = torch.sigmoid(f_BH) * c_BH + torch.sigmoid(i_BH) * torch.tanh(g_BH)
            h_BH = torch.sigmoid(o_BH) * torch.tanh(c_BH)
            outputs.append(h_BH)
        return torch.stack(outputs), (h_BH[None], c_BH[None])


def _gate(read: int, gated: int, rank: int | None) -> nn.Module:
    if rank is None:
        return nn.Linear(read, gated, bias=False)
    return nn.Sequential(nn.Linear(read, rank, bias=False), nn.Linear(rank, gated, bias=False))
