"""Output layers: from hidden vectors to a distribution over the vocabulary, never holding N x V values at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmkit import products
from lmkit.models.base import IGNORE, Head, Scores

CHUNK_ELEMENTS_CPU = 4_000_000
"""Logits held at a time on a CPU: 16 MB, few enough for the last-level cache between the product and the softmax, and
at usual vocabularies several hundred rows, enough for the products to run at full speed."""
CHUNK_ELEMENTS_GPU = 128_000_000
"""On a card: 2,544 rows at GPT-2's vocabulary. For each chunk the gradient of the matrix is read and written once."""
MIN_ROWS, MAX_ELEMENTS = 64, 32_000_000
"""At very large vocabularies the weights are read from memory for each chunk, which with few rows takes longer than the
product: 64 are 1.5 x as fast as 16 at 267,735 types. They must not take more than 128 MB."""


def without_autocast(logits: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A head's ``logits`` in the precision of its weight: rounded to bf16 a logit of 20 is up to 0.06 nats off, and so
    would be each score and each probability."""

    @functools.wraps(logits)
    def exact(head: Any, hidden_ND: Tensor) -> Tensor:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return logits(head, hidden_ND.to(head.weight.dtype))

    return exact


def rows_per_chunk(vocab_size: int, device: torch.device) -> int:
    """How many positions are scored at a time."""
    elements = CHUNK_ELEMENTS_CPU if device.type == "cpu" else CHUNK_ELEMENTS_GPU
    return max(1, elements // vocab_size, min(MIN_ROWS, MAX_ELEMENTS // vocab_size))


def drops_unscored(device: torch.device) -> bool:
    """Whether rows without a target are left out of the products. On a card the host would have to wait for it to know
    how many rows those are, in each step; there they are computed and then masked."""
    return device.type == "cpu"


TYPES_MULTIPLE = 64


def spare_types(vocab_size: int, device: torch.device) -> int:
    """How many types of probability 0 stand behind the vocabulary in training. On a card each row of logits is to begin
    at a multiple of 16 bytes: cuBLAS has slower products for others, and GPT-2 has 50,257 types."""
    return 0 if device.type == "cpu" else -vocab_size % TYPES_MULTIPLE


CANDIDATES_MULTIPLE = 128
LEAST_EXACT = 1e-30
"""Probabilities below are too near to the smallest numbers of fp32, 1e-38, to have all of their digits."""


@dataclass(frozen=True)
class Candidates:
    """The part of the vocabulary that a sampled softmax looks at."""

    ids_C: Tensor
    """int64 token ids, each once."""
    log_weight_C: Tensor
    """-log of the probability with which each was included."""


class SoftmaxHead(Head):
    """logits = hidden W^T + b. ``weight`` may be the embedding's (Press & Wolf 2017, "Using the output embedding")."""

    compiled = False
    """Whether torch's compiler is to make the softmax of training; it does on cards."""

    def __init__(self, weight_VD: Tensor, *, bias: bool = False) -> None:
        """weight_VD: the parameter to use, which may be another module's."""
        super().__init__()
        self.weight = weight_VD
        self.bias = nn.Parameter(torch.zeros(weight_VD.shape[0])) if bias else None

    def loss(self, hidden_ND: Tensor, targets_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
        """As Head.loss; the gradients are made chunk by chunk in the forward pass."""
        return linear_cross_entropy(
            hidden_ND, self.weight, self.bias, targets_N, weights_N=weights_N, compiled=self.compiled
        )

    def sampled_loss(self, hidden_ND: Tensor, candidates: Candidates, targets_N: Tensor) -> Tensor:
        """Like ``loss``, but with a partition function that is estimated from some of the vocabulary.

        A candidate that was drawn with probability pi counts 1 / pi times, which makes the estimate of the partition
        function unbiased (Horvitz & Thompson 1952); a target is always a candidate and counts once in its own row.
        targets_N: int64 positions in ``candidates.ids_C``, or IGNORE.
        """
        weight_CD = self.weight.index_select(0, candidates.ids_C)
        bias_C = candidates.log_weight_C
        if self.bias is not None:
            bias_C = self.bias.index_select(0, candidates.ids_C) + bias_C
        # Rounded up by words of probability 0: each new shape of a product takes oneDNN 5 to 10 ms to prepare.
        spare = -len(weight_CD) % CANDIDATES_MULTIPLE
        weight_CD = nn.functional.pad(weight_CD, (0, 0, 0, spare))
        bias_C = nn.functional.pad(bias_C, (0, spare), value=-math.inf)
        own_N = candidates.log_weight_C[targets_N.where(targets_N != IGNORE, 0)]
        return linear_cross_entropy(hidden_ND, weight_CD, bias_C, targets_N, own_N, compiled=self.compiled)

    def lead(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """Summed difference between each target's logit and the mean logit (scalar, differentiable).

        With a share e of each target spread evenly over the vocabulary, the cross-entropy is that of the targets plus e
        times this; the N x V logits are not needed, since the mean logit is that of the mean row of W and b.
        """
        scored_N = targets_N != IGNORE
        targets_N = targets_N.where(scored_N, 0)
        rows_ND = nn.functional.embedding(targets_N, self.weight) - self.weight.mean(0)
        lead_N = (hidden_ND.where(scored_N[:, None], 0.0).float() * rows_ND.float()).sum(1)
        if self.bias is not None:
            lead_N = lead_N + (self.bias[targets_N] - self.bias.mean()).float()
        return lead_N.where(scored_N, 0.0).sum()

    @torch.no_grad()
    def score(self, hidden_ND: Tensor, targets_N: Tensor) -> Scores:
        return score_in_chunks(self, hidden_ND, targets_N, rows_per_chunk(self.weight.shape[0], hidden_ND.device))

    @without_autocast
    def logits(self, hidden_ND: Tensor) -> Tensor:
        return products.linear(hidden_ND, self.weight, self.bias).float()


def score_in_chunks(head: Head, hidden_ND: Tensor, targets_N: Tensor, size: int) -> Scores:
    """Head.score by way of the logits of ``size`` positions at a time."""
    nats_N = torch.zeros(len(targets_N), device=hidden_ND.device)
    correct_N = torch.zeros(len(targets_N), dtype=torch.bool, device=hidden_ND.device)
    if drops_unscored(hidden_ND.device):
        kept = (targets_N != IGNORE).nonzero().squeeze(1)
        if len(kept) < len(targets_N):
            scores = score_in_chunks(head, hidden_ND[kept], targets_N[kept], size)
            nats_N[kept], correct_N[kept] = scores.nats_N, scores.correct_N
            return Scores(nats_N, correct_N)
    # Results are written in place and logits overwritten: small tensors that outlive a chunk would leave holes of
    # its size in the heap, which at large vocabularies add up to gigabytes.
    for first in range(0, len(targets_N), size):
        rows = slice(first, first + size)
        targets = targets_N[rows]
        logits = head.logits(hidden_ND[rows])
        scored = targets != IGNORE
        safe = targets.where(scored, 0)
        at_target, (top, best) = logits.gather(1, safe[:, None]).squeeze(1), logits.max(1)
        log_total = logits.sub_(top[:, None]).exp_().sum(1).log_() + top
        nats_N[rows] = (log_total - at_target).where(scored, 0.0)
        correct_N[rows] = (best == safe) & scored
    return Scores(nats_N, correct_N)


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    own_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    *,
    compiled: bool = False,
) -> Tensor:
    """Sum over N of the cross-entropy of hidden W^T + b with the targets; IGNORE targets count nothing.

    own_N: subtracted from the logit of each row's own target. weights_N: factors of the rows, without a gradient.
    compiled: as of ``SoftmaxHead``; where weights or the gradient of the bias are asked for it makes no difference.
    """
    if not torch.is_grad_enabled():
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    scored_N = None if drops_unscored(hidden_ND.device) else targets_N != IGNORE
    if scored_N is None:
        kept = (targets_N != IGNORE).nonzero().squeeze(1)
        if len(kept) < len(targets_N):
            hidden_ND, targets_N = hidden_ND.index_select(0, kept), targets_N[kept]
            own_N = None if own_N is None else own_N[kept]
            weights_N = None if weights_N is None else weights_N[kept]
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, bias_V, targets_N, own_N, weights_N, scored_N, compiled
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """See linear_cross_entropy; the gradients are computed in the forward pass.

    The gradient of the summed loss is softmax(logits) - onehot(target) per row, so one pass over each chunk of logits,
    while it is in the cache, gives the loss and all gradients; backward only scales them. Under autocast the
    products run in the autocast dtype and the softmax in fp32. scored_N: the rows that count; None: all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        own_N: Tensor | None,
        weights_N: Tensor | None,
        scored_N: Tensor | None,
        compiled: bool,
    ) -> Tensor:
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        hidden, weight, bias = hidden_ND.to(dtype), weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        num_types, spare = len(weight), spare_types(len(weight), hidden.device)
        if spare > 0:  # their logits are set below
            weight = nn.functional.pad(weight, (0, 0, 0, spare))
            bias = None if bias is None else nn.functional.pad(bias, (0, spare))
        if scored_N is not None:  # cheaper to mask the N x D values here and at the end than the N x V between
            hidden, targets_N = hidden.where(scored_N[:, None], 0.0), targets_N.where(scored_N, 0)
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight: Tensor | None = None
        d_bias = bias_V.new_zeros(len(weight)) if needs_bias and bias_V is not None else None
        total = torch.zeros((), device=hidden.device)
        in_one_pass = compiled and scored_N is not None and weights_N is None and d_bias is None
        size = max(1, min(rows_per_chunk(len(weight), hidden.device), len(targets_N)))
        with torch.autocast(device, enabled=False):
            to_vocab = products.Factor(weight, size)
            to_hidden = products.Factor(weight.T, size) if needs_hidden else None
            in_place = to_vocab.packed_OI is None
            buffer = torch.empty(size, len(weight), device=hidden.device, dtype=dtype) if in_place else None
            for start in range(0, len(targets_N), size):
                rows = slice(start, start + size)
                x, y, own = hidden[rows], targets_N[rows, None], None if own_N is None else own_N[rows, None]
                logits = to_vocab.product(x, bias, out=None if buffer is None else buffer[: len(x)])
                if spare > 0:
                    logits[:, num_types:] = -math.inf
                if in_one_pass:
                    nats_C1, delta = _compiled()(logits, y, own)
                else:
                    nats_C1, delta = _softmax_minus_target(logits, y, own, x, weight, bias)
                if weights_N is not None:
                    nats_C1, delta = nats_C1 * weights_N[rows, None], delta.mul_(weights_N[rows, None])
                total += (nats_C1 if scored_N is None else nats_C1.where(scored_N[rows, None], 0.0)).sum()
                if d_bias is not None:
                    d_bias += delta.sum(0) if scored_N is None else scored_N[rows].to(delta.dtype) @ delta
                delta = delta.to(dtype)
                if d_hidden is not None and to_hidden is not None:
                    d_hidden[rows] = to_hidden.product(delta)
                if needs_weight:
                    d_weight = products.add_outer(d_weight, delta, x, weight_VD.dtype)
                del logits, delta  # so that those of the next rows take their place, which is in the cache
        if needs_weight and d_weight is None:
            d_weight = torch.zeros_like(weight_VD)
        if d_hidden is not None and scored_N is not None:
            d_hidden = d_hidden.where(scored_N[:, None], 0.0)
        d_weight, d_bias = (None if d is None else d[:num_types] for d in (d_weight, d_bias))
        ctx.hidden_dtype = hidden_ND.dtype
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        return (
            None if d_hidden is None else (d_hidden * grad).to(ctx.hidden_dtype),
            None if d_weight is None else d_weight * grad,
            None if d_bias is None else d_bias * grad,
            *[None] * 5,
        )


def _softmax_minus_target(
    logits_CV: Tensor,
    targets_C1: Tensor,
    own_C1: Tensor | None,
    hidden_CD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(C, 1) nats of a chunk and the gradient of their sum wrt. its logits, both fp32; fp32 logits are overwritten.

    On a CPU the nats are those of the probabilities that are there anyway, but where these are too small to be exact:
    there they come from the logits of such rows, which are made once more. Elsewhere, where looking for them would be
    waited for, log Z = max(logits) - log(max(softmax)), since the largest probability is 1 / sum(exp(logits - max)).
    Either way the softmax is one fused pass, and no exponential is taken twice.
    """
    logits_CV = _lowered(logits_CV, targets_C1, own_C1)
    if drops_unscored(logits_CV.device):
        torch.softmax(logits_CV, 1, out=logits_CV)
        at_target_C1 = logits_CV.gather(1, targets_C1)
        nats_C1 = at_target_C1.log().neg_()
        rare = (at_target_C1 < LEAST_EXACT).squeeze(1).nonzero().squeeze(1)
        if len(rare) > 0:
            targets_R1 = targets_C1[rare]
            logits_RV = nn.functional.linear(hidden_CD[rare], weight_VD, bias_V)  # of any shape, without preparation
            logits_RV = _lowered(logits_RV, targets_R1, None if own_C1 is None else own_C1[rare])
            nats_C1[rare] = logits_RV.logsumexp(1, keepdim=True) - logits_RV.gather(1, targets_R1)
    else:
        at_target_C1, top_C1 = logits_CV.gather(1, targets_C1), logits_CV.amax(1, keepdim=True)
        torch.softmax(logits_CV, 1, out=logits_CV)
        nats_C1 = top_C1 - at_target_C1 - logits_CV.amax(1, keepdim=True).log()
    return nats_C1, logits_CV.scatter_add_(1, targets_C1, torch.full_like(nats_C1, -1.0))


def _softmax_minus_target_in_one_pass(
    logits_CV: Tensor, targets_C1: Tensor, own_C1: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same, but the gradient in the format of the logits, and nothing overwritten.

    For torch's compiler: it has to read each row from memory once and to write it once, in bf16, where the operations
    above go over it some eight times, most of them in fp32.
    """
    is_target_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device) == targets_C1
    wide_CV = logits_CV.float()
    if own_C1 is not None:
        wide_CV = torch.where(is_target_CV, wide_CV - own_C1.float(), wide_CV)
    top_C1 = wide_CV.amax(1, keepdim=True)
    powers_CV = (wide_CV - top_C1).exp()
    total_C1 = powers_CV.sum(1, keepdim=True)
    delta = powers_CV / total_C1 - is_target_CV.float()
    return total_C1.log() + (top_C1 - wide_CV.gather(1, targets_C1)), delta.to(logits_CV.dtype)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    return torch.compile(_softmax_minus_target_in_one_pass)


def _lowered(logits_CV: Tensor, targets_C1: Tensor, own_C1: Tensor | None) -> Tensor:
    """In fp32, and each target's own lowered by what is given; in place where they are fp32."""
    logits_CV = logits_CV.float()
    return logits_CV if own_C1 is None else logits_CV.scatter_add_(1, targets_C1, -own_C1.to(logits_CV.dtype))
