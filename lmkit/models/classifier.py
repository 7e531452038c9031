"""What reads a text, or numbers, and says one thing about it: a label or a number. Layer on top of a language model.

Texts are padded on the right. The backbone is causal, so the hidden vectors of real tokens do not depend on padding,
and pooling leaves padding out: a prediction does not depend on what else is in the batch. Letters beside those of
models/base.py: C labels, K numeric columns, P width of what the network reads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmkit.config.tasks import NetworkActivation, NetworkConfig, NetworkInit, Pooling
from lmkit.models.base import LanguageModel, seeded_generator
from lmkit.models.dropout import Dropout

HEAD_STD = 0.02
"""Standard deviation of a classifier's first weights, as those of GPT-2."""


class TextReader(nn.Module):
    """One vector of a text: the backbone's hidden vector at its last token, or the mean over its tokens."""

    def __init__(self, backbone: LanguageModel, pooling: Pooling, dropout: float) -> None:
        super().__init__()
        self.backbone, self.pooling = backbone, pooling
        self.dropout = Dropout(dropout)

    @property
    def width(self) -> int:
        """D of the vector."""
        return int(self.backbone.get_parameter("head.weight").shape[1])

    def read(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """(B, D) of texts of ``lengths_B`` >= 1 tokens (int64) that are padded on the right with any token ids."""
        hidden_BTD = self.backbone(tokens_BT)[0]
        vectors_BD: Tensor = self.dropout(pool(hidden_BTD, lengths_B, self.pooling))
        return vectors_BD


def pool(hidden_BTD: Tensor, lengths_B: Tensor, pooling: Pooling) -> Tensor:
    """(B, D): the vector at the last of the first ``lengths_B`` positions, or their mean (float32)."""
    if pooling is Pooling.last:
        return hidden_BTD[torch.arange(len(hidden_BTD), device=hidden_BTD.device), lengths_B - 1]
    real_BT = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device) < lengths_B[:, None]
    return (hidden_BTD.float() * real_BT[:, :, None]).sum(1) / lengths_B[:, None]


class Classifier(TextReader):
    """Logits of C labels: a linear layer on the text's vector (Radford et al. 2018, section 3.2)."""

    def __init__(
        self, backbone: LanguageModel, num_labels: int, *, pooling: Pooling, dropout: float, seed: int
    ) -> None:
        super().__init__(backbone, pooling, dropout)
        self.head = nn.Linear(self.width, num_labels)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(self.head.weight.shape, generator=seeded_generator(seed, "head.weight")))
            self.head.weight.mul_(HEAD_STD)
            self.head.bias.zero_()

    def forward(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """(B, C) float32 logits."""
        vectors_BD = self.read(tokens_BT, lengths_B)
        with torch.autocast(vectors_BD.device.type, enabled=False):
            logits_BC: Tensor = self.head(vectors_BD.float())
        return logits_BC


class Network(nn.Module):
    """One hidden layer: w2 act(W1 x + b1) + b2, from P numbers to one.

    In fp32 also under autocast: bf16 has less than three digits, of what is read and of what is predicted.
    """

    def __init__(self, config: NetworkConfig, width: int, *, seed: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.hidden = nn.Linear(width, config.d_hidden)
        self.out = nn.Linear(config.d_hidden, 1)
        with torch.no_grad():
            for name, layer in (("hidden", self.hidden), ("out", self.out)):
                std = _initial_std(config.init, layer.in_features, layer.out_features)
                drawn = torch.randn(layer.weight.shape, generator=seeded_generator(seed, f"network.{name}"))
                layer.weight.copy_(drawn * std)
                layer.bias.zero_()

    def forward(self, x_BP: Tensor) -> Tensor:
        """(B,) float32."""
        with torch.autocast(x_BP.device.type, enabled=False):
            x_BH = self.hidden(x_BP.float())
            if self.activation is NetworkActivation.relu:
                x_BH = F.relu(x_BH)
            else:
                x_BH = torch.tanh(x_BH) if self.activation is NetworkActivation.tanh else torch.sigmoid(x_BH)
            y_B: Tensor = self.out(x_BH).squeeze(1)
        return y_B


def _initial_std(init: NetworkInit, fan_in: int, fan_out: int) -> float:
    """Glorot & Bengio 2010 (xavier), He et al. 2015 (kaiming), or 0.01."""
    if init is NetworkInit.normal:
        return 0.01
    return math.sqrt(2 / (fan_in + fan_out)) if init is NetworkInit.xavier else math.sqrt(2 / fan_in)


class NumberRegressor(nn.Module):
    """A number from K standardised numbers."""

    def __init__(self, config: NetworkConfig, num_numeric: int, *, seed: int) -> None:
        super().__init__()
        self.network = Network(config, num_numeric, seed=seed)

    def forward(self, tokens_BT: Tensor, lengths_B: Tensor, numeric_BK: Tensor) -> Tensor:
        """(B,) predictions in standard deviations of the target; there are no tokens to look at."""
        y_B: Tensor = self.network(numeric_BK)
        return y_B


class TextRegressor(TextReader):
    """A number from a text's vector and K standardised numbers beside it (K may be 0)."""

    def __init__(
        self,
        backbone: LanguageModel,
        config: NetworkConfig,
        num_numeric: int,
        *,
        pooling: Pooling,
        dropout: float,
        seed: int,
    ) -> None:
        super().__init__(backbone, pooling, dropout)
        self.network = Network(config, self.width + num_numeric, seed=seed)

    def forward(self, tokens_BT: Tensor, lengths_B: Tensor, numeric_BK: Tensor) -> Tensor:
        """(B,) predictions in standard deviations of the target."""
        vectors_BD = self.read(tokens_BT, lengths_B)
        y_B: Tensor = self.network(torch.cat([vectors_BD.float(), numeric_BK], 1))
        return y_B
