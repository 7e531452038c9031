"""From logits to the next token: pure functions, randomness as an argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmkit.config.generation import SamplingConfig
from lmkit.errors import DivergedError
from lmkit.rng import derive_key


def sample(logits_NV: Tensor, config: SamplingConfig, uniforms_N: Tensor, seen_NV: Tensor | None = None) -> Tensor:
    """One token id per row, int64 (N,).

    uniforms_N: float64 in [0, 1), one per row; the token is found by inverting the cumulative distribution there, so a
    row's draw depends on its own logits and number only. seen_NV: bool, tokens that the repetition penalty applies to.
    Greedy, that is temperature 0, takes the smallest id of equally probable tokens. Raises DivergedError if a row has a
    logit of NaN or +infinity, or no finite one.
    """
    best_N1 = logits_NV.amax(1, keepdim=True)
    if not bool(torch.isfinite(best_N1).all()):
        raise DivergedError("the model's logits are not finite", "the model has diverged: use an earlier checkpoint")
    filtered_NV = filtered(logits_NV, config, seen_NV)
    if config.temperature == 0.0:
        return filtered_NV.argmax(1)
    if filtered_NV is not logits_NV:
        best_N1 = filtered_NV.amax(1, keepdim=True)
    cumulative_NV = (filtered_NV - best_N1).exp_().cumsum(1, dtype=torch.float64)
    total_N1 = cumulative_NV[:, -1:]
    below_total_N1 = torch.nextafter(total_N1, torch.zeros_like(total_N1))
    threshold_N1 = torch.minimum(uniforms_N[:, None] * total_N1, below_total_N1)
    return torch.searchsorted(cumulative_NV, threshold_N1, right=True).squeeze(1)


def filtered(logits_NV: Tensor, config: SamplingConfig, seen_NV: Tensor | None = None) -> Tensor:
    """Logits after penalty, temperature, top-k, top-p and min-p, in this order; what is cut is -inf."""
    if seen_NV is not None and config.repetition_penalty != 1.0:
        logits_NV = penalise(logits_NV, seen_NV, config.repetition_penalty)
    if config.temperature not in (0.0, 1.0):
        # The best logit becomes 0, so that a tiny temperature cannot overflow.
        logits_NV = ((logits_NV - logits_NV.amax(1, keepdim=True)).double() / config.temperature).float()
    if config.top_k is not None:
        logits_NV = keep_top_k(logits_NV, config.top_k)
    if config.top_p is not None:
        logits_NV = keep_top_p(logits_NV, config.top_p)
    if config.min_p is not None:
        logits_NV = keep_min_p(logits_NV, config.min_p)
    return logits_NV


def penalise(logits_NV: Tensor, seen_NV: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of seen tokens by ``penalty`` and multiply negative ones (Keskar et al. 2019, 4.1)."""
    limit = torch.finfo(logits_NV.dtype)
    lowered_NV = torch.where(logits_NV > 0, logits_NV / penalty, logits_NV * penalty).clamp_(limit.min, limit.max)
    return torch.where(seen_NV & logits_NV.isfinite(), lowered_NV, logits_NV)


def keep_top_k(logits_NV: Tensor, k: int) -> Tensor:
    """Keep the k largest logits; of equal ones, those with the smaller id."""
    if k >= logits_NV.shape[1]:
        return logits_NV
    return _cut_below(logits_NV, logits_NV.topk(k, dim=1).values[:, -1:], k)


def keep_top_p(logits_NV: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most probable tokens whose probability reaches p (Holtzman et al. 2020, 3.1).

    At least one token is kept; of equally probable ones at the edge, those with the smaller id.
    """
    if p >= 1.0:
        return logits_NV
    probs_NV = logits_NV.double().softmax(1)
    # Tokens below (1 - p) / V have less than 1 - p together, so that none of them is in the set.
    num_candidates = int((probs_NV >= (1 - p) / probs_NV.shape[1]).sum(1).amax())
    sorted_NM, order_NM = probs_NV.topk(num_candidates, dim=1)
    before_NM = sorted_NM.cumsum(1) - sorted_NM
    before_NM[:, 0] = 0.0
    kept_N1 = (before_NM < p).sum(1, keepdim=True)
    return _cut_below(logits_NV, logits_NV.gather(1, order_NM.gather(1, kept_N1 - 1)), kept_N1)


def _cut_below(logits_NV: Tensor, least_N1: Tensor, num_kept: int | Tensor) -> Tensor:
    """Cut what is below ``least_N1``, and of the tokens equal to it so many of the largest ids that num_kept remain."""
    above_NV, equal_NV = logits_NV > least_N1, logits_NV == least_N1
    room_N1 = num_kept - above_NV.sum(1, keepdim=True)
    kept_NV = above_NV | (equal_NV & (equal_NV.cumsum(1) <= room_N1))
    return logits_NV.masked_fill(~kept_NV, -torch.inf)


def keep_min_p(logits_NV: Tensor, p: float) -> Tensor:
    """Keep tokens whose probability is at least p times that of the most probable one (Nguyen et al. 2024)."""
    if p == 0.0:
        return logits_NV
    ratio_NV = (logits_NV - logits_NV.amax(1, keepdim=True)).double().exp_()
    return logits_NV.masked_fill(ratio_NV < p, -torch.inf)


def uniforms(seed: int, prompt: int, samples: Sequence[int], position: int) -> Tensor:
    """The random number in [0, 1) of each sample of a prompt at a position, float64; each depends on its place only."""
    keys = [derive_key(seed, "generate", prompt, number, position) for number in samples]
    return torch.tensor([(key >> 10) / 2**53 for key in keys], dtype=torch.float64)
