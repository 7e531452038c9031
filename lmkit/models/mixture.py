"""Mixture of softmaxes (Yang et al. 2018, "Breaking the softmax bottleneck", section 2.4).

More shape letters here: M softmaxes of the mixture, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lmkit import products
from lmkit.heads import drops_unscored, rows_per_chunk, score_in_chunks, without_autocast
from lmkit.models.base import IGNORE, Head, Scores


class MixtureHead(Head):
    """p(v | h) = sum over m of softmax(P h)[m] softmax(W tanh(L_m h + c_m) + b)[v]. W may be the embedding's.

    What Yang et al. drop out between L and W is not; the model's own dropout is on h.
    """

    def __init__(self, weight_VD: Tensor, num_softmaxes: int, *, bias: bool = False) -> None:
        """weight_VD: the parameter to use, which may be another module's."""
        super().__init__()
        vocab_size, width = weight_VD.shape
        self.weight, self.num_softmaxes = weight_VD, num_softmaxes
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None
        self.latent = nn.Linear(width, num_softmaxes * width)
        self.prior = nn.Linear(width, num_softmaxes, bias=False)

    def loss(self, hidden_ND: Tensor, targets_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
        """As Head.loss; the gradients are made in the forward pass, a chunk of N x M x V values at a time."""
        if drops_unscored(hidden_ND.device):
            kept = (targets_N != IGNORE).nonzero().squeeze(1)
            hidden_ND, targets_N = hidden_ND[kept], targets_N[kept]
            weights_N = None if weights_N is None else weights_N[kept]
        else:
            hidden_ND = hidden_ND.where((targets_N != IGNORE)[:, None], 0.0)
        latent_NMD, log_prior_NM = self._mixed(hidden_ND)
        loss: Tensor = _MixtureCrossEntropy.apply(  # type: ignore[no-untyped-call]
            latent_NMD, log_prior_NM, self.weight, self.bias, targets_N, weights_N
        )
        return loss

    @torch.no_grad()
    def score(self, hidden_ND: Tensor, targets_N: Tensor) -> Scores:
        """As Head.score; exact."""
        size = rows_per_chunk(2 * len(self.weight), hidden_ND.device)
        return score_in_chunks(self, hidden_ND, targets_N, size)

    @without_autocast
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """(N, V) float32 log-probabilities, the softmaxes one after the other."""
        latent_NMD, log_prior_NM = self._mixed(hidden_ND)
        total_NV = torch.full((), -torch.inf, device=hidden_ND.device)
        for m in range(self.num_softmaxes):
            log_probs_NV = F.log_softmax(F.linear(latent_NMD[:, m], self.weight, self.bias).float(), 1)
            total_NV = torch.logaddexp(total_NV, log_probs_NV + log_prior_NM[:, m, None])
        return total_NV

    def _mixed(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """What each softmax reads, and the log of its share."""
        latent_NMD = torch.tanh(self.latent(hidden_ND)).view(-1, self.num_softmaxes, self.weight.shape[1])
        return latent_NMD, F.log_softmax(self.prior(hidden_ND).float(), 1)


class _MixtureCrossEntropy(torch.autograd.Function):
    """Sum over rows of -log sum over m of prior[m] softmax(W latent[m] + b)[target], each times its weight.

    With r[m] the share of softmax m in the probability of the target, the gradient with respect to the logits of m is
    r[m] (softmax - onehot(target)), and that with respect to log prior[m] is -r[m]. Under autocast the products run in
    the autocast dtype and everything else in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        latent_NMD: Tensor,
        log_prior_NM: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        weights_N: Tensor | None,
    ) -> Tensor:
        device = latent_NMD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        latent, weight = latent_NMD.detach().to(dtype), weight_VD.detach().to(dtype)
        bias = None if bias_V is None else bias_V.detach().to(dtype)
        num_softmaxes = latent.shape[1]
        d_latent, d_prior = torch.empty_like(latent), torch.empty_like(log_prior_NM)
        d_weight: Tensor | None = None
        d_bias = None if bias_V is None else torch.zeros_like(bias_V)
        total = torch.zeros((), device=latent.device)
        scored_N1 = (targets_N != IGNORE)[:, None]
        factor_N1 = scored_N1 if weights_N is None else weights_N[:, None].where(scored_N1, 0.0)
        targets_N = targets_N.where(scored_N1.squeeze(1), 0)
        size = rows_per_chunk(num_softmaxes * len(weight), latent.device)
        with torch.autocast(device, enabled=False):
            to_vocab = products.Factor(weight, size * num_softmaxes)
            to_latent = products.Factor(weight.T, size * num_softmaxes)
            for start in range(0, len(targets_N), size):
                rows = slice(start, start + size)
                x_RD = latent[rows].flatten(0, 1)
                y_R1 = targets_N[rows].repeat_interleave(num_softmaxes)[:, None]
                log_probs_RV = F.log_softmax(to_vocab.product(x_RD, bias).float(), 1)
                joint_CM = log_probs_RV.gather(1, y_R1).view(-1, num_softmaxes) + log_prior_NM[rows]
                log_prob_C1 = joint_CM.logsumexp(1, keepdim=True)
                total -= (log_prob_C1 * factor_N1[rows]).sum()
                share_CM = (joint_CM - log_prob_C1).exp_().mul_(factor_N1[rows])
                d_prior[rows] = -share_CM
                share_R1 = share_CM.view(-1, 1)
                delta_RV = log_probs_RV.exp_().mul_(share_R1).scatter_add_(1, y_R1, -share_R1)
                if d_bias is not None:
                    d_bias += delta_RV.sum(0)
                delta_RV = delta_RV.to(dtype)
                d_latent[rows] = to_latent.product(delta_RV).view_as(latent[rows])
                d_weight = products.add_outer(d_weight, delta_RV, x_RD, weight_VD.dtype)
        if d_weight is None:  # of no rows
            d_weight = torch.zeros_like(weight_VD)
        ctx.latent_dtype = latent_NMD.dtype
        ctx.save_for_backward(d_latent, d_prior, d_weight, d_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_latent, d_prior, d_weight, d_bias = ctx.saved_tensors
        d_bias = None if d_bias is None else d_bias * grad
        return (d_latent * grad).to(ctx.latent_dtype), d_prior * grad, d_weight * grad, d_bias, None, None
