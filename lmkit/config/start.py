"""Configuration of what weights start from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lmkit.config.check import Problems


class EmbeddingInit(Enum):
    """Where embeddings start."""

    random = "random"
    cooccurrence = "cooccurrence"


class BiasInit(Enum):
    """Where the biases of the output layer start."""

    zero = "zero"
    log_frequency = "log_frequency"


@dataclass(kw_only=True)
class StartConfig:
    """A model to start from; on the command line ``init=hf:NAME_OR_DIR`` is short for ``init.weights=...``."""

    weights: str | None = None
    """hf:NAME_OR_DIR: model and tokenizer of a Hugging Face folder or of the hub; null: none."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check(
                self.weights is None or (self.weights.startswith("hf:") and len(self.weights) > 3),
                "init.weights",
                self.weights,
                "must be hf:NAME_OR_DIR or null",
            )

    @property
    def hf_name(self) -> str | None:
        """NAME_OR_DIR of ``weights``."""
        return None if self.weights is None else self.weights.removeprefix("hf:")


@dataclass(kw_only=True)
class InitConfig(StartConfig):
    """What the parameters are before the first step: those of another model, or in part taken from the text."""

    embeddings: EmbeddingInit = EmbeddingInit.random
    """random, or cooccurrence: a singular value decomposition of the counts of neighbouring tokens."""
    output_bias: BiasInit = BiasInit.log_frequency
    """zero, or log_frequency: the log of each token's share of train, where the model has output biases."""
