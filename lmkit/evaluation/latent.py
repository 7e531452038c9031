"""What a sentence VAE knows and says: bounds on the likelihood of sentences, and how much its latent units carry.

Letters beside those of models/base.py: S sentences, Z latent units, K samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmkit.data.sentences import Sentences
from lmkit.device import Device
from lmkit.errors import DivergedError
from lmkit.evaluation.scoring import mode
from lmkit.models.vae import Posterior, VaeLstm
from lmkit.rng import derive_key

ACTIVE_VARIANCE = 0.01
"""A unit is active if its posterior mean varies more than this over the sentences (Burda et al. 2016, section 5.2)."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LatentScores:
    """Nats of each sentence, and its posterior."""

    reconstruction_S: Floats
    """Mean over the samples of -log p(x | z), z drawn from the posterior."""
    kl_S: Floats
    """KL of the posterior from the prior, in closed form."""
    bound_S: Floats
    """-log of the mean over K draws of p(x | z) p(z) / q(z | x); at least -log p(x) on average (Burda et al. 2016)."""
    mean_SZ: Floats
    log_var_SZ: Floats
    num_tokens_S: NDArray[np.int64]

    @property
    def active_units(self) -> int:
        """Latent units whose posterior mean depends on the sentence."""
        return int((self.mean_SZ.var(0) > ACTIVE_VARIANCE).sum())

    def mutual_information(self, seed: int) -> float:
        """Estimate of the information that z holds about which sentence it is, in nats (Hoffman & Johnson 2016).

        The mean KL of the posteriors from the prior, less the KL of their mixture from it, the latter by one draw from
        each posterior. Cannot exceed log S.
        """
        num_sentences, num_units = self.mean_SZ.shape
        if num_units == 0:
            return 0.0
        noise_SZ = np.random.default_rng(derive_key(seed, "latent", "mixture")).standard_normal(self.mean_SZ.shape)
        z_SZ = self.mean_SZ + np.exp(0.5 * self.log_var_SZ) * noise_SZ
        log_prior_S = -0.5 * (z_SZ**2).sum(1)
        log_mixture_S = np.empty(num_sentences)
        precision_SZ = np.exp(-self.log_var_SZ)
        constant_S = -0.5 * (self.log_var_SZ + self.mean_SZ**2 * precision_SZ).sum(1)
        for first in range(0, num_sentences, 1024):
            z = z_SZ[first : first + 1024]
            log_q = constant_S - 0.5 * (z**2) @ precision_SZ.T + z @ (self.mean_SZ * precision_SZ).T
            top = log_q.max(1)
            log_mixture_S[first : first + 1024] = top + np.log(np.exp(log_q - top[:, None]).mean(1))
        return float(self.kl_S.mean() - (log_mixture_S - log_prior_S).mean())


@torch.inference_mode()
def score_sentences(
    model: VaeLstm,
    sentences: Sentences,
    *,
    num_samples: int,
    seed: int,
    batch_size: int,
    device: Device,
    progress: Callable[[int], None] | None = None,
) -> LatentScores:
    """Score each sentence with ``num_samples`` draws of its latent vector.

    The draws depend on (seed, number of the sentence) only, the first ones are the same for any number of samples, and
    ``batch_size`` (rows read at once) changes no number. Raises DivergedError for scores that are not finite.
    """
    order_S = np.argsort(-sentences.lengths_S, kind="stable")
    num_units = model.config.d_latent
    columns = {name: np.zeros(len(sentences)) for name in ("reconstruction", "kl", "bound")}
    mean_SZ, log_var_SZ = np.zeros((len(sentences), num_units)), np.zeros((len(sentences), num_units))
    num_samples = num_samples if num_units else 1
    at_once = max(1, batch_size // num_samples)
    done = 0
    with mode(model, training=False):
        for first in range(0, len(sentences), at_once):
            chosen = order_S[first : first + at_once]
            batch = sentences.batch(chosen).cut(slice(None), device.torch_device)
            with device.autocast():
                posterior = model.encode(batch.targets_BT)
            noise_BKZ = torch.stack([_noise(seed, int(s), num_samples, num_units) for s in chosen])
            nats_BK, log_ratio_BK = _sampled(
                model, batch.inputs_BT, batch.targets_BT, posterior, noise_BKZ, batch_size, device
            )
            log_weight_BK = log_ratio_BK - nats_BK
            columns["reconstruction"][chosen] = nats_BK.mean(1).numpy()
            columns["kl"][chosen] = posterior.kl_BZ().cpu().double().sum(1).numpy()
            columns["bound"][chosen] = (math.log(num_samples) - log_weight_BK.logsumexp(1)).numpy()
            mean_SZ[chosen] = posterior.mean_BZ.cpu().double().numpy()
            log_var_SZ[chosen] = posterior.log_var_BZ.cpu().double().numpy()
            done += batch.num_targets
            if progress is not None:
                progress(done)
    if not all(np.isfinite(column).all() for column in columns.values()):
        raise DivergedError("scores of sentences are not finite", "use an earlier checkpoint, or a lower optimizer.lr")
    return LatentScores(
        columns["reconstruction"], columns["kl"], columns["bound"], mean_SZ, log_var_SZ, sentences.lengths_S
    )


def _noise(seed: int, sentence: int, num_samples: int, num_units: int) -> Tensor:
    """(K, Z) standard normal numbers of a sentence."""
    generator = torch.Generator().manual_seed(derive_key(seed, "latent", sentence))
    # Fewer than 16 numbers are drawn by another algorithm than more: drawn singly, the first are always the same.
    return torch.stack([torch.randn(num_units, generator=generator) for _ in range(num_samples)])


def _sampled(
    model: VaeLstm,
    inputs_BT: Tensor,
    targets_BT: Tensor,
    posterior: Posterior,
    noise_BKZ: Tensor,
    batch_size: int,
    device: Device,
) -> tuple[Tensor, Tensor]:
    """(B, K) float64 on the CPU: -log p(x | z) and log p(z) - log q(z | x) of each draw."""
    num_rows, num_samples, _ = noise_BKZ.shape
    nats, ratios = [], []
    step = max(1, batch_size // num_rows)
    for first in range(0, num_samples, step):
        noise = noise_BKZ[:, first : first + step].to(device.torch_device)
        k = noise.shape[1]
        repeated = Posterior(posterior.mean_BZ.repeat_interleave(k, 0), posterior.log_var_BZ.repeat_interleave(k, 0))
        latent = repeated.draw(noise.flatten(0, 1))
        targets = targets_BT.repeat_interleave(k, 0)
        with device.autocast():
            hidden, _ = model(inputs_BT.repeat_interleave(k, 0), model.start(latent))
            nats.append(model.head.row_nats(hidden, targets).view(num_rows, k))
        ratios.append(repeated.log_ratio(latent).cpu().double().view(num_rows, k))
    return torch.cat(nats, 1), torch.cat(ratios, 1)
