"""Which head a model has."""

from __future__ import annotations

import torch
from torch import nn

from lmkit.config.model import HeadConfig, ModelConfig
from lmkit.heads import SoftmaxHead
from lmkit.models.adaptive import AdaptiveHead
from lmkit.models.base import Head
from lmkit.models.mixture import MixtureHead


def head_of(config: ModelConfig) -> type[Head]:
    """The kind of head of a neural model of this configuration, without building it."""
    if isinstance(config, HeadConfig) and config.cutoffs:
        return AdaptiveHead
    if isinstance(config, HeadConfig) and config.num_softmaxes > 1:
        return MixtureHead
    return SoftmaxHead


def build_head(config: HeadConfig, embedding: nn.Embedding, *, tied: bool, bias: bool) -> Head:
    """The head of ``config`` for hidden vectors as wide as the embedding, whose weight it shares if ``tied``."""
    vocab_size, width = embedding.weight.shape
    if config.cutoffs:
        return AdaptiveHead(width, vocab_size, config.cutoffs, config.div_value)
    weight_VD = embedding.weight if tied else nn.Parameter(torch.empty(vocab_size, width))
    if config.num_softmaxes > 1:
        return MixtureHead(weight_VD, config.num_softmaxes, bias=bias)
    return SoftmaxHead(weight_VD, bias=bias)
