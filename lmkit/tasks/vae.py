"""Sentence VAE: sentences are read into a latent vector and written again from it. What objective=vae does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmkit.config.objectives import VaeObjectiveConfig
from lmkit.console import format_number
from lmkit.data.batches import Batch
from lmkit.data.prepared import Split
from lmkit.data.sentences import Sentences
from lmkit.device import Device
from lmkit.evaluation.latent import LatentScores, score_sentences
from lmkit.evaluation.scoring import exp
from lmkit.models.base import State
from lmkit.models.vae import VaeLstm
from lmkit.tasks.base import Validation
from lmkit.tasks.sentences import SentenceTask

ROWS_AT_ONCE = 256
"""Rows of a forward pass in validation."""
PROBED = 32
"""Validation is timed on this many sentences."""


class SentenceVae(SentenceTask):
    """Minimises reconstruction + weight x KL per sentence; validation gives the importance-weighted bound of valid."""

    model: VaeLstm
    config: VaeObjectiveConfig

    def begin(self) -> None:
        super().begin()
        if self.config.plain_share > 0:
            self.model.ignore_latent()

    def loss(
        self, forward: nn.Module, batch: Batch, state: State | None, progress: float
    ) -> tuple[Tensor, State | None]:
        """Reconstruction plus weighted KL of all sentences; what is free of it goes by the means over the rows."""
        if self.config.is_plain(progress):
            hidden_BTD, read = forward(batch.inputs_BT)
            return self.objective.at(progress).of_batch(self.model.head, hidden_BTD, read, batch.targets_BT), None
        posterior = self.model.encode(batch.targets_BT)
        latent_BZ = posterior.draw(torch.randn_like(posterior.mean_BZ))
        hidden_BTD, read = forward(batch.inputs_BT, self.model.start(latent_BZ))
        reconstruction = self.objective.at(progress).of_batch(self.model.head, hidden_BTD, read, batch.targets_BT)
        kl_Z = posterior.kl_BZ().mean(0)
        charged_Z = kl_Z.clamp(min=self.config.free_nats / max(1, len(kl_Z)))
        charged = charged_Z.sum().clamp(min=self.config.target_nats if len(kl_Z) else 0.0)
        return reconstruction + self.config.weight(progress) * batch.num_rows * charged, None

    def validate(self, *, device: Device, micro_batch_size: int, progress: Callable[[int], None]) -> Validation:
        scores = self._score(self.valid, device, progress)
        numbers = latent_numbers(scores, self.prepared.splits["valid"], self.config.num_samples, self.seed)
        return Validation(
            loss=float(scores.bound_S.sum()) / numbers["num_tokens"],
            metrics={
                "valid_ppl_bound": numbers["token_ppl_bound"],
                "valid_kl": numbers["kl_nats"],
                "valid_reconstruction": numbers["reconstruction_nats"],
                "valid_active_units": float(numbers["active_units"]),
                "valid_mutual_information": numbers["mutual_information_nats"],
            },
            text=f"valid ppl <= {format_number(numbers['word_ppl_bound'])} per word  reconstruction"
            f" {numbers['reconstruction_nats']:.2f} + KL {numbers['kl_nats']:.2f} nats a sentence"
            f"  {numbers['active_units']} of {numbers['num_units']} units active",
            result={"dataset": self.prepared.name, "split": "valid", **numbers},
            rows=[(f"valid {name.strip()}", value) for name, value in latent_rows(numbers)],
        )

    def validation_s(self, *, device: Device, micro_batch_size: int) -> float:
        """Seconds that validation will take, from timing a few sentences of all lengths."""
        chosen = np.linspace(0, len(self.valid) - 1, min(PROBED, len(self.valid))).astype(np.int64)
        probe = replace(self.valid, begins_S=self.valid.begins_S[chosen], ends_S=self.valid.ends_S[chosen])
        start = time.monotonic()
        self._score(probe, device, None)
        return (time.monotonic() - start) * float(self.valid.lengths_S.sum() / probe.lengths_S.sum())

    def _score(self, sentences: Sentences, device: Device, progress: Callable[[int], None] | None) -> LatentScores:
        return score_sentences(
            self.model,
            sentences,
            num_samples=self.config.num_samples,
            seed=self.seed,
            batch_size=ROWS_AT_ONCE,
            device=device,
            progress=progress,
        )

    @torch.no_grad()
    def row_losses(self, forward: nn.Module, batch: Batch, state: State | None) -> list[float]:
        """-ELBO of each row with one draw."""
        posterior = self.model.encode(batch.targets_BT)
        latent_BZ = posterior.draw(torch.randn_like(posterior.mean_BZ))
        hidden_BTD, _ = forward(batch.inputs_BT, self.model.start(latent_BZ))
        nats_B = self.model.head.row_nats(hidden_BTD, batch.targets_BT) + posterior.kl_BZ().cpu().double().sum(1)
        rows: list[float] = nats_B.tolist()
        return rows


def latent_numbers(scores: LatentScores, split: Split, num_samples: int, seed: int) -> dict[str, Any]:
    """Sums and means over a split. Names with ``bound`` are upper bounds: the number itself is at most that."""
    nats, num_sentences = float(scores.bound_S.sum()), len(scores.bound_S)
    num_tokens = int(scores.num_tokens_S.sum())
    return {
        "reconstruction_nats": float(scores.reconstruction_S.mean()),
        "kl_nats": float(scores.kl_S.mean()),
        "negative_elbo_nats": float((scores.reconstruction_S + scores.kl_S).mean()),
        "bound_nats": nats / num_sentences,
        "num_samples": num_samples,
        "active_units": scores.active_units,
        "num_units": scores.mean_SZ.shape[1],
        "mutual_information_nats": scores.mutual_information(seed),
        "num_sentences": num_sentences,
        "num_tokens": num_tokens,
        "num_words": split.num_words,
        "word_ppl_bound": exp(nats / split.num_words),
        "token_ppl_bound": exp(nats / num_tokens),
        "elbo_word_ppl_bound": exp(float((scores.reconstruction_S + scores.kl_S).sum()) / split.num_words),
        "bits_per_byte_bound": nats / split.num_bytes / math.log(2),
    }


def latent_rows(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    """The numbers for people; ``<=`` marks a bound."""
    samples = f"importance-weighted bound, {numbers['num_samples']} samples"
    return [
        (f"perplexity per word ({samples})", f"<= {format_number(numbers['word_ppl_bound'])}"),
        ("perplexity per word (ELBO)", f"<= {format_number(numbers['elbo_word_ppl_bound'])}"),
        ("bits per byte", f"<= {numbers['bits_per_byte_bound']:.4f}"),
        ("nats per sentence, importance-weighted", f"<= {numbers['bound_nats']:.3f}"),
        ("nats per sentence, -ELBO", f"<= {numbers['negative_elbo_nats']:.3f}"),
        ("  reconstruction", f"{numbers['reconstruction_nats']:.3f}"),
        ("  KL from the prior", f"{numbers['kl_nats']:.3f}"),
        ("active units", f"{numbers['active_units']} of {numbers['num_units']}"),
        ("mutual information of sentence and latent", f"{numbers['mutual_information_nats']:.3f} nats"),
    ]
