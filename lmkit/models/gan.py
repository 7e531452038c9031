"""A generator of sentences and the discriminator that it is trained against, after RelGAN.

Source: Nie et al. 2019, "RelGAN: Relational generative adversarial networks for text generation" (several embedded
representations in the discriminator, Gumbel-softmax with growing sharpness, relativistic loss of Jolicoeur-Martineau
2018). The generator here is an LSTM instead of RelGAN's relational memory. Further letters: R representations, E width
of each.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmkit.config.model import RecurrentConfig, RelganConfig
from lmkit.models.base import LanguageModel, State, seeded_generator
from lmkit.models.recurrent import Recurrent, RecurrentState

KERNELS = (2, 3, 4, 5)
"""Lengths of the n-grams that the discriminator's filters see."""
LEAK = 0.2
"""Slope of the discriminator's ReLUs below zero: without it the generator would get no gradient from dead filters."""


class Relgan(LanguageModel):
    """As a language model it is its generator, which reads each sentence from an empty state."""

    def __init__(self, config: RelganConfig, vocab_size: int, *, seed: int) -> None:
        super().__init__()
        self.config, self.vocab_size, self.context = config, vocab_size, None
        self.generator = Recurrent(
            RecurrentConfig(
                d_embed=config.d_embed,
                num_layers=1,
                dropout_input=config.dropout_input,
                dropout_output=config.dropout_output,
            ),
            vocab_size,
            seed=seed,
        )
        self.head = self.generator.head
        self.discriminator = Discriminator(config, vocab_size, seed=seed)

    def forward(
        self, tokens_BT: Tensor, state: RecurrentState | None = None, *, use_state: bool = False
    ) -> tuple[Tensor, RecurrentState]:
        """As LanguageModel.forward: the generator."""
        return self.generator(tokens_BT, state, use_state=use_state)  # type: ignore[no-any-return]

    def state_from_tensors(self, tensors: dict[str, Tensor]) -> State:
        return self.generator.state_from_tensors(tensors)

    def soft_sentences(
        self, num_rows: int, length: int, eos_id: int, inverse_temperature: float, ends_V: Tensor | None = None
    ) -> Tensor:
        """Sentences drawn so that gradients flow through the draw: (B, T, V), rows of probabilities.

        y = softmax((logits + Gumbel noise) x inverse temperature) (Jang et al. 2017); the mean embedding under y is the
        next input. Noise comes from torch's global generator. What follows the end of a sentence is zero. ends_V: bool,
        which types end one; None: eos alone.
        """
        weight_VD, rows = self.generator.embedding.weight, []
        embedded_BD = weight_VD[eos_id].expand(num_rows, -1)
        alive_B1 = weight_VD.new_ones(num_rows, 1)
        (layer,) = self.generator.layers
        state = None
        for _ in range(length):
            hidden_1BD, state = layer(embedded_BD[None], state)
            logits_BV = self.head.logits(hidden_1BD[0])
            noise_BV = -torch.empty_like(logits_BV).exponential_().clamp_(min=1e-20).log_()
            soft_BV = torch.softmax((logits_BV + noise_BV) * inverse_temperature, -1)
            rows.append(soft_BV * alive_B1)
            best_B1 = soft_BV.argmax(1, keepdim=True)
            alive_B1 = alive_B1 * ~(best_B1 == eos_id if ends_V is None else ends_V[best_B1])
            embedded_BD = soft_BV.to(weight_VD.dtype) @ weight_VD
        return torch.stack(rows, 1)


class Discriminator(nn.Module):
    """Logits, one per representation, of a sentence being real: convolutions over R embeddings of the words."""

    def __init__(self, config: RelganConfig, vocab_size: int, *, seed: int) -> None:
        super().__init__()
        self.config = config
        width, filters = config.d_representation, config.num_filters
        self.embedding = nn.Embedding(vocab_size, config.num_representations * width)
        self.filters = nn.ModuleList(nn.Conv1d(width, filters, kernel) for kernel in KERNELS)
        self.hidden = nn.Linear(len(KERNELS) * filters, filters)
        self.logit = nn.Linear(filters, 1)
        with torch.no_grad():
            for name, p in self.named_parameters():
                noise = torch.randn(p.shape, generator=seeded_generator(seed, f"discriminator.{name}"))
                fan_in = 1 if p.ndim == 1 or name.startswith("embedding") else p[0].numel()
                p.copy_(noise / math.sqrt(fan_in) if p.ndim > 1 else torch.zeros_like(p))

    def forward(self, embedded_BTE: Tensor) -> Tensor:
        """(B, R) logits of sentences embedded by ``embedding``; zeros behind their ends."""
        num_rows, length, _ = embedded_BTE.shape
        num = self.config.num_representations
        # Each representation is a row of its own: the filters are shared.
        x_NET = embedded_BTE.view(num_rows, length, num, -1).permute(0, 2, 3, 1).flatten(0, 1)
        x_NET = F.pad(x_NET, (0, max(0, max(KERNELS) - length)))
        pooled = torch.cat([F.leaky_relu(conv(x_NET), LEAK).amax(-1) for conv in self.filters], -1)
        return self.logit(F.leaky_relu(self.hidden(pooled), LEAK)).view(num_rows, num)  # type: ignore[no-any-return]
