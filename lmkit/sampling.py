"""From logits to the next token: pure functions, randomness as an argument."""

from __future__ import annotations

import torch
from torch import Tensor

from lmkit.config.commands import SamplingConfig
from lmkit.errors import DivergedError
from lmkit.rng import derive_key


def sample(logits_NV: Tensor, config: SamplingConfig, uniforms_N: Tensor, seen_NV: Tensor | None = None) -> Tensor:
    """One token id per row, int64 (N,).

    uniforms_N: float64 in [0, 1), one per row; the token is found by inverting the cumulative distribution there, so a
    row's draw depends on its own logits and number only. seen_NV: bool, tokens that the repetition penalty applies to.
    Raises DivergedError if a row has NaN or no finite logit.
    """
    logits_NV = filtered(logits_NV, config, seen_NV)
    best_N1 = logits_NV.amax(1, keepdim=True)
    if not bool(torch.isfinite(best_N1).all()):
        raise DivergedError("the model's logits are not finite", "use an earlier checkpoint")
    if config.temperature == 0.0:
        return logits_NV.argmax(1)
    cumulative_NV = (logits_NV - best_N1).double().exp_().cumsum(1)
    threshold_N1 = uniforms_N[:, None].to(cumulative_NV) * cumulative_NV[:, -1:]
    return torch.searchsorted(cumulative_NV, threshold_N1, right=True).squeeze(1).clamp_(max=logits_NV.shape[1] - 1)


def filtered(logits_NV: Tensor, config: SamplingConfig, seen_NV: Tensor | None = None) -> Tensor:
    """Logits after penalty, temperature, top-k, top-p and min-p, in this order; what is cut is -inf."""
    if seen_NV is not None and config.repetition_penalty != 1.0:
        logits_NV = penalise(logits_NV, seen_NV, config.repetition_penalty)
    if config.temperature not in (0.0, 1.0):
        logits_NV = logits_NV / config.temperature
    if config.top_k is not None:
        logits_NV = keep_top_k(logits_NV, config.top_k)
    if config.top_p is not None:
        logits_NV = keep_top_p(logits_NV, config.top_p)
    if config.min_p is not None:
        logits_NV = keep_min_p(logits_NV, config.min_p)
    return logits_NV


def penalise(logits_NV: Tensor, seen_NV: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of seen tokens by ``penalty`` and multiply negative ones (Keskar et al. 2019, 4.1)."""
    lowered_NV = torch.where(logits_NV > 0, logits_NV / penalty, logits_NV * penalty)
    return torch.where(seen_NV, lowered_NV, logits_NV)


def keep_top_k(logits_NV: Tensor, k: int) -> Tensor:
    """Keep the k largest logits; of equal ones, those with the smaller id."""
    if k >= logits_NV.shape[1]:
        return logits_NV
    order_NV = logits_NV.argsort(dim=1, descending=True, stable=True)
    return logits_NV.scatter(1, order_NV[:, k:], -torch.inf)


def keep_top_p(logits_NV: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most probable tokens whose probability reaches p (Holtzman et al. 2020, 3.1)."""
    if p >= 1.0:
        return logits_NV
    order_NV = logits_NV.argsort(dim=1, descending=True, stable=True)
    sorted_NV = logits_NV.gather(1, order_NV).double().softmax(1)
    before_NV = sorted_NV.cumsum(1) - sorted_NV
    cut_NV = torch.empty_like(before_NV, dtype=torch.bool).scatter_(1, order_NV, before_NV >= p)
    return logits_NV.masked_fill(cut_NV, -torch.inf)


def keep_min_p(logits_NV: Tensor, p: float) -> Tensor:
    """Keep tokens whose probability is at least p times that of the most probable one (Nguyen et al. 2024)."""
    if p == 0.0:
        return logits_NV
    ratio_NV = (logits_NV - logits_NV.amax(1, keepdim=True)).exp()
    return logits_NV.masked_fill(ratio_NV < p, -torch.inf)


def uniforms(seed: int, prompt: int, num_samples: int, position: int) -> Tensor:
    """The random number in [0, 1) of each sample at a position, float64; a function of its arguments only."""
    keys = [derive_key(seed, "generate", prompt, number, position) for number in range(num_samples)]
    return torch.tensor([(key >> 10) / 2**53 for key in keys], dtype=torch.float64)
