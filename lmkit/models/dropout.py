"""What training drops at random: values, word types, channels for a whole sequence, sublayers.

All draw from torch's generator.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 1 << 16
"""On a CPU the probability of being kept is rounded to a multiple of 1 / LEVELS, and the gain fits what it became."""


def dropout(x: Tensor, p: float) -> Tensor:
    """Each value is 0 with probability p, else scaled up, so that the mean stays (Srivastava et al. 2014).

    On a CPU a value takes 16 random bits: a fifth of the time of torch's own, which draws a Bernoulli number for each
    (AMD, torch 2.13).
    """
    num_kept = round((1 - p) * LEVELS)
    if num_kept == LEVELS:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    if num_kept == 0:
        return x * 0.0
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None).view(torch.int16)
    keep = bits[: x.numel()].view(x.shape) < num_kept - LEVELS // 2
    return x * keep.to(x.dtype).mul_(LEVELS / num_kept)


class Dropout(nn.Dropout):
    """``dropout``, in training only."""

    def forward(self, x: Tensor) -> Tensor:
        """A tensor of any shape -> the same shape."""
        return dropout(x, self.p) if self.training else x


def embed_with_dropout(tokens: Tensor, weight_VD: Tensor, p: float) -> Tensor:
    """Embed ids of any shape; whole word types are dropped, the others scaled up (Merity et al. 2018, section 4.3)."""
    if p == 0.0:
        return F.embedding(tokens, weight_VD)
    keep_V1 = torch.rand(len(weight_VD), 1, device=tokens.device) >= p
    return F.embedding(tokens, weight_VD) * (keep_V1[tokens] / (1 - p))


def locked_dropout(x_TBD: Tensor, p: float) -> Tensor:
    """Dropout with one mask (B, D) for all time steps (Gal & Ghahramani 2016, section 4)."""
    if p == 0.0:
        return x_TBD
    keep_1BD = torch.rand(1, *x_TBD.shape[1:], device=x_TBD.device) >= p
    return x_TBD * (keep_1BD.to(x_TBD.dtype) / (1 - p))


class LockedDropout(nn.Module):
    """locked_dropout of (B, T, D), in training only."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return locked_dropout(x_BTD.transpose(0, 1), self.p if self.training else 0.0).transpose(0, 1)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): what a sublayer adds is left out for whole sequences, in training only.

    They scale by the probability of survival in evaluation; ours scales by its inverse in training.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        if self.p == 0.0 or not self.training:
            return x_BTD
        keep_B11 = torch.rand(len(x_BTD), 1, 1, device=x_BTD.device) >= self.p
        return x_BTD * (keep_B11.to(x_BTD.dtype) / (1 - self.p))
