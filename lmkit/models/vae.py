"""Sentence VAE: an LSTM reads a sentence into a latent vector, and another writes it again from there.

Sources: Bowman et al. 2016, "Generating sentences from a continuous space" (the model, word dropout); Kingma & Welling
2014 (reparametrisation, closed form of the KL); Long et al. 2020, "Preventing posterior collapse in sequence VAEs with
pooling" (the posterior looks at all of the encoder's outputs); Dieng et al. 2019, "Avoiding latent variable collapse
with generative skip models" (the latent vector also goes straight to the output). Further letter: Z latent units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmkit.config.model import VaeLstmConfig
from lmkit.heads import SoftmaxHead
from lmkit.models.base import IGNORE, LanguageModel, State
from lmkit.models.cells import LSTM
from lmkit.models.dropout import locked_dropout
from lmkit.models.recurrent import initialise


@dataclass(frozen=True)
class Posterior:
    """Normal distributions over the latent units, one for each sentence."""

    mean_BZ: Tensor
    log_var_BZ: Tensor

    def draw(self, noise_BZ: Tensor) -> Tensor:
        """The latent vectors that standard normal noise stands for; differentiable."""
        return self.mean_BZ + torch.exp(0.5 * self.log_var_BZ) * noise_BZ

    def kl_BZ(self) -> Tensor:
        """KL divergence from the standard normal prior in nats, per unit (Kingma & Welling 2014, appendix B)."""
        return 0.5 * (self.mean_BZ.square() + torch.expm1(self.log_var_BZ) - self.log_var_BZ)

    def log_ratio(self, latent_BZ: Tensor) -> Tensor:
        """log prior - log posterior density of latent vectors in nats, summed over the units: (B,)."""
        noise_BZ = (latent_BZ - self.mean_BZ) * torch.exp(-0.5 * self.log_var_BZ)
        return 0.5 * (noise_BZ.square() + self.log_var_BZ - latent_BZ.square()).sum(-1)


@dataclass(frozen=True)
class VaeState(State):
    """What the decoder remembers: the latent vector of the sentence, and the LSTM's two vectors."""

    latent_BZ: Tensor
    hidden_BD: Tensor
    cell_BD: Tensor
    undropped_BTD: Tensor | None = None

    def detach(self) -> VaeState:
        return VaeState(self.latent_BZ.detach(), self.hidden_BD.detach(), self.cell_BD.detach())

    def select(self, rows: Tensor) -> VaeState:
        return VaeState(self.latent_BZ[rows], self.hidden_BD[rows], self.cell_BD[rows])


class VaeLstm(LanguageModel):
    """As a language model it is the decoder: given ``start(latent)`` it writes the sentence of that latent vector.

    Without a state the latent vector is zero, the centre of the prior. With d_latent = 0 there is no encoder, and the
    decoder is an LSTM language model of sentences.
    """

    head: SoftmaxHead

    def __init__(self, config: VaeLstmConfig, vocab_size: int, *, seed: int) -> None:
        super().__init__()
        self.config, self.vocab_size, self.context = config, vocab_size, None
        d, z = config.d_embed, config.d_latent
        self.embedding = nn.Embedding(vocab_size, d)
        self.decoder = LSTM(d + z, d)
        self.encoder = LSTM(d, config.d_encoder) if z else None
        self.posterior = nn.Linear(2 * config.d_encoder, 2 * z) if z else None
        self.initial = nn.Linear(z, 2 * d) if z else None
        self.skip = nn.Linear(z, d, bias=False) if z else None
        self.head = SoftmaxHead(self.embedding.weight, bias=True)
        initialise(self, seed, lambda name: name == "embedding.weight", is_lstm=True)

    @torch.no_grad()
    def ignore_latent(self) -> None:
        """Make the decoder the same for every latent vector, which it can then learn to listen to."""
        if self.initial is not None and self.skip is not None:
            self.initial.weight.zero_()
            self.skip.weight.zero_()
            input_weights: Tensor = self.decoder.weight_ih_l0  # type: ignore[assignment]
            input_weights[:, self.config.d_embed :] = 0.0

    def encode(self, targets_BT: Tensor) -> Posterior:
        """The posterior of sentences, padded with IGNORE behind their ends.

        They are read from their end to their beginning (Sutskever et al. 2014), so that what a decoder is least sure
        of, how a sentence begins, is read last; the posterior sees the last output and the mean of all.
        """
        if self.encoder is None or self.posterior is None:
            nothing = self.head.weight.new_zeros(len(targets_BT), 0)
            return Posterior(nothing, nothing)
        real_BT = targets_BT != IGNORE
        last_B1 = real_BT.sum(1, keepdim=True).clamp(min=1) - 1
        positions_BT = torch.arange(targets_BT.shape[1], device=targets_BT.device).expand_as(targets_BT)
        reversed_BT = targets_BT.clamp(min=0).gather(1, (last_B1 - positions_BT).clamp(min=0))
        outputs_TBH, _ = self.encoder(F.embedding(reversed_BT.T, self.embedding.weight))
        outputs_BTH = outputs_TBH.transpose(0, 1)
        mean_BH = (outputs_BTH * real_BT[:, :, None]).sum(1) / (last_B1 + 1)
        last_BH = outputs_BTH[torch.arange(len(targets_BT), device=targets_BT.device), last_B1[:, 0]]
        read_BI = torch.cat([mean_BH, last_BH], -1)
        mean_BZ, log_var_BZ = self.posterior(read_BI).float().chunk(2, -1)
        return Posterior(mean_BZ, log_var_BZ)

    def start(self, latent_BZ: Tensor) -> VaeState:
        """The decoder's state before the first word."""
        if self.initial is None:
            hidden_BD = cell_BD = self.head.weight.new_zeros(len(latent_BZ), self.config.d_embed)
        else:
            hidden_BD, cell_BD = torch.tanh(self.initial(latent_BZ)).chunk(2, -1)
        return VaeState(latent_BZ, hidden_BD, cell_BD)

    def forward(
        self, tokens_BT: Tensor, state: VaeState | None = None, *, use_state: bool = False
    ) -> tuple[Tensor, VaeState]:
        """As LanguageModel.forward; dropout masks are drawn from torch's global generator."""
        if state is None:
            state = self.start(self.head.weight.new_zeros(len(tokens_BT), self.config.d_latent))
        config, latent_BZ = self.config, state.latent_BZ
        x_TBD = F.embedding(tokens_BT.T, self.embedding.weight)
        if self.training:
            x_TBD = locked_dropout(self._without_words(x_TBD), config.dropout_input)
        x_TBI = torch.cat([x_TBD, latent_BZ.to(x_TBD.dtype).expand(len(x_TBD), -1, -1)], -1)
        y_TBD, (hidden_1BD, cell_1BD) = self.decoder(x_TBI, (state.hidden_BD[None], state.cell_BD[None]))
        if self.skip is not None:
            y_TBD = y_TBD + self.skip(latent_BZ)
        dropped_TBD = locked_dropout(y_TBD, config.dropout_output if self.training else 0.0)
        undropped_BTD = y_TBD.transpose(0, 1) if self.training else None
        return dropped_TBD.transpose(0, 1), VaeState(latent_BZ, hidden_1BD[0], cell_1BD[0], undropped_BTD)

    def _without_words(self, x_TBD: Tensor) -> Tensor:
        """Word dropout: single inputs become zero, the others stay as they are (Bowman et al. 2016, section 3.1)."""
        p = self.config.dropout_word
        return x_TBD if p == 0.0 else x_TBD * (torch.rand(*x_TBD.shape[:2], 1, device=x_TBD.device) >= p)


class GivenLatent(LanguageModel):
    """The language model that the decoder is for one latent vector."""

    def __init__(self, model: VaeLstm, latent_Z: Tensor) -> None:
        super().__init__()
        self.model, self.latent_Z = model, latent_Z
        self.vocab_size, self.context, self.head = model.vocab_size, None, model.head

    def forward(self, tokens_BT: Tensor, state: Any = None, *, use_state: bool = False) -> tuple[Tensor, VaeState]:
        """As LanguageModel.forward."""
        if state is None:
            state = self.model.start(self.latent_Z.expand(len(tokens_BT), -1))
        hidden_BTD, state = self.model(tokens_BT, state)
        return hidden_BTD, state
