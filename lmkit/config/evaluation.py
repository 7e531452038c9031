"""How eval-ppl scores and counts (``protocol``), and what it does beyond static scoring (``dynamic``, ``cache``)."""

from __future__ import annotations

from dataclasses import dataclass

from lmkit.config.check import Problems


@dataclass(kw_only=True)
class ProtocolConfig:
    """Base of the ``protocol`` group."""


@dataclass(kw_only=True)
class StreamProtocolConfig(ProtocolConfig):
    """The text as one stream; every token scored once, the first given the end token."""


@dataclass(kw_only=True)
class MikolovProtocolConfig(StreamProtocolConfig):
    """``stream`` for word-level text: perplexity per word, ends of line counted (Mikolov et al. 2010)."""


@dataclass(kw_only=True)
class SentenceProtocolConfig(ProtocolConfig):
    """Each line on its own, its first token given the end token."""


@dataclass(kw_only=True)
class StripesProtocolConfig(ProtocolConfig):
    """Base of protocols that cut the text into equal stripes and leave out the rest."""

    valid_stripes: int = 10
    """Stripes of the validation text (>= 1)."""
    test_stripes: int = 10
    """Stripes of any other text (>= 1)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.at_least(1, "protocol", self, "valid_stripes", "test_stripes")


@dataclass(kw_only=True)
class AwdLstmProtocolConfig(StripesProtocolConfig):
    """As the code of AWD-LSTM counts (Merity et al. 2018)."""


@dataclass(kw_only=True)
class TransformerXlProtocolConfig(StripesProtocolConfig):
    """As the code of Transformer-XL counts (Dai et al. 2019)."""


@dataclass(kw_only=True)
class HfStridedProtocolConfig(ProtocolConfig):
    """The strided loop of Hugging Face's documentation."""

    max_length: int = 1024
    """Tokens of a window (>= 2); at most the model's context."""
    stride: int = 512
    """Tokens from one window to the next (1 to max_length)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.at_least(2, "protocol", self, "max_length")
            check(
                1 <= self.stride <= self.max_length,
                "protocol.stride",
                self.stride,
                f"must be between 1 and protocol.max_length={self.max_length}",
            )


@dataclass(kw_only=True)
class LmEvalWikitextProtocolConfig(ProtocolConfig):
    """The ``wikitext`` task of lm-evaluation-harness, version 2."""


@dataclass(kw_only=True)
class Gpt2PaperProtocolConfig(ProtocolConfig):
    """Detokenised text, perplexity per original word (Radford et al. 2019)."""

    stride: int = 32
    """Tokens from one window to the next (1 to context)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.at_least(1, "protocol", self, "stride")


@dataclass(kw_only=True)
class DynamicConfig:
    """Base of the ``dynamic`` group: the model goes on learning from the text that it has scored."""

    seq_len: int = 20
    """Tokens scored before each update of a model with carried state (>= 1); of others, the stride is."""
    lr: float = 2e-4
    """Learning rate (> 0)."""
    decay: float = 8e-3
    """Share of the way back to the trained weights that each update takes (0 to 1)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.at_least(1, "dynamic", self, "seq_len")
            check.positive("dynamic", self, "lr")
            check(0 <= self.decay <= 1, "dynamic.decay", self.decay, "must be between 0 and 1")


@dataclass(kw_only=True)
class DynamicSgdConfig(DynamicConfig):
    """Gradient descent."""


@dataclass(kw_only=True)
class DynamicRmsConfig(DynamicConfig):
    """Gradients and decay scaled by the root mean square of gradients on train."""

    epsilon: float = 2e-5
    """Added to the root mean square (> 0)."""
    statistics_tokens: int = 100_000
    """Tokens of train that the statistics are taken from (>= 1)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.positive("dynamic", self, "epsilon")
            check.at_least(1, "dynamic", self, "statistics_tokens")
        super().__post_init__()


@dataclass(kw_only=True)
class CacheConfig:
    """Base of the ``cache`` group: a distribution over recent tokens, mixed with the model's."""

    window: int = 2000
    """Tokens that it looks back on (>= 1)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.at_least(1, "cache", self, "window")


@dataclass(kw_only=True)
class UnigramCacheConfig(CacheConfig):
    """How often each token came among the last ones (Kuhn & De Mori 1990)."""


@dataclass(kw_only=True)
class NeuralCacheConfig(CacheConfig):
    """What followed where the hidden vector was similar (Grave et al. 2017)."""

    theta: float | None = None
    """Flatness: what similarities are multiplied by (>= 0); null: the best one on valid."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check(
                self.theta is None or 0 <= self.theta < float("inf"),
                "cache.theta",
                self.theta,
                "must be >= 0 and finite, or null",
            )
        super().__post_init__()
