"""What makes a Transformer that of GPT-2 or the original one, whatever its sizes."""

from __future__ import annotations

from typing import Any

from lmkit.config.model import Activation, Norm, Positions

GPT2: dict[str, Any] = {
    "positions": Positions.learned,
    "norm": Norm.layernorm,
    "activation": Activation.gelu,
    "gated": False,
    "bias": True,
}
VANILLA: dict[str, Any] = {
    "positions": Positions.sinusoidal,
    "norm": Norm.layernorm,
    "pre_norm": False,
    "activation": Activation.relu,
    "gated": False,
    "bias": True,
    "scale_embeddings": True,
}
