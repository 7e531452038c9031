"""Configuration of the model families. ``build`` imports the family (and with it torch) only when called."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from lmkit.config.check import Problems

if TYPE_CHECKING:
    from lmkit.models.base import LanguageModel


@dataclass(kw_only=True)
class ModelConfig:
    """Base of the ``model`` group."""

    def build(self, vocab_size: int, *, seed: int) -> LanguageModel:
        """Return a freshly initialised model. The same (config, vocab_size, seed) gives the same parameters."""
        raise TypeError(f"{type(self).__name__} is the base of the model group and builds nothing")

    @property
    def carries_state(self) -> bool:
        """True if training and evaluation carry the state from one segment of the text to the next."""
        return False

    @property
    def memory(self) -> str:
        """For people: what of the text before a token a model with carried state sees."""
        return "state carried from start to end"

    @property
    def trains_by_counting(self) -> bool:
        """True if the model is estimated in one pass over the counts of train rather than by gradient."""
        return False


class Activation(Enum):
    """Pointwise non-linearities of the feed-forward block."""

    relu = "relu"
    gelu = "gelu"
    silu = "silu"
    tanh = "tanh"
    sigmoid = "sigmoid"


class Positions(Enum):
    """How a Transformer knows where a token stands."""

    rotary = "rotary"
    learned = "learned"
    sinusoidal = "sinusoidal"


class Norm(Enum):
    """Normalisation layers."""

    rmsnorm = "rmsnorm"
    layernorm = "layernorm"


@dataclass(kw_only=True)
class TransformerConfig(ModelConfig):
    """Decoder-only Transformer. The defaults are Llama-shaped; ``gpt2`` and ``vanilla`` are other settings of it."""

    d_model: int = 256
    """Width of the residual stream."""
    num_layers: int = 6
    """Number of blocks."""
    num_heads: int = 8
    """Query heads; must divide d_model."""
    num_kv_heads: int | None = None
    """Key/value heads for grouped-query attention; must divide num_heads; null: num_heads."""
    d_ff: int | None = None
    """Width of the feed-forward block; null: 8/3 d_model rounded up to 32 if gated, else 4 d_model."""
    context: int = 512
    """Longest sequence (tokens) the model attends over."""
    positions: Positions = Positions.rotary
    """Position information: rotary, learned or sinusoidal."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies (> 0)."""
    norm: Norm = Norm.rmsnorm
    """Normalisation: rmsnorm or layernorm."""
    norm_eps: float = 1e-5
    """Added to the variance in the normalisation (> 0)."""
    pre_norm: bool = True
    """Normalise before each sublayer (true) or after each residual sum, as in the original Transformer (false)."""
    activation: Activation = Activation.silu
    """Non-linearity of the feed-forward block."""
    gated: bool = True
    """Gate the feed-forward block (SwiGLU with silu; Shazeer 2020)."""
    bias: bool = False
    """Biases in the linear layers and in layernorm."""
    tie_embeddings: bool = True
    """Share the input embedding with the output layer."""
    scale_embeddings: bool = False
    """Multiply embeddings by sqrt(d_model) (Vaswani et al. 2017, section 3.4)."""
    dropout: float = 0.0
    """Dropout on the embeddings and on each sublayer's output (0 <= p < 1)."""
    attention_dropout: float = 0.0
    """Dropout on the attention weights (0 <= p < 1)."""

    def __post_init__(self) -> None:
        kv = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        with Problems() as check:
            for name in ("d_model", "num_layers", "num_heads", "context"):
                check(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be >= 1")
            heads = max(self.num_heads, 1)
            check(
                self.d_model % heads == 0,
                "model.d_model",
                self.d_model,
                f"must be a multiple of model.num_heads={heads}",
            )
            if self.positions is Positions.rotary and self.d_model % heads == 0:
                check(
                    self.d_model // heads % 2 == 0,
                    "model.d_model/num_heads",
                    self.d_model // heads,
                    "must be even for rotary positions",
                )
            check(kv >= 1 and heads % max(kv, 1) == 0, "model.num_kv_heads", kv, f"must divide model.num_heads={heads}")
            check(self.d_ff is None or self.d_ff >= 1, "model.d_ff", self.d_ff, "must be >= 1 or null")
            check(self.rope_theta > 0, "model.rope_theta", self.rope_theta, "must be > 0")
            check(0 < self.norm_eps < 1, "model.norm_eps", self.norm_eps, "must be between 0 and 1")
            check(0 <= self.dropout < 1, "model.dropout", self.dropout, "must be at least 0 and below 1")
            check(
                0 <= self.attention_dropout < 1,
                "model.attention_dropout",
                self.attention_dropout,
                "must be at least 0 and below 1",
            )

    def build(self, vocab_size: int, *, seed: int) -> LanguageModel:
        from lmkit.models.transformer import Transformer

        return Transformer(self, vocab_size, seed=seed)


class Cell(Enum):
    """Recurrent cells."""

    lstm = "lstm"
    gru = "gru"


@dataclass(kw_only=True)
class RecurrentConfig(ModelConfig):
    """LSTM or GRU language model with tied weights and variational (locked) dropout (Gal & Ghahramani 2016)."""

    cell: Cell = Cell.lstm
    """Cell: lstm or gru."""
    d_embed: int = 256
    """Width of the embedding and of the last layer's output (they are tied)."""
    d_hidden: int = 256
    """Width of the hidden layers below the last."""
    num_layers: int = 2
    """Number of layers."""
    dropout_embed: float = 0.0
    """Word-type dropout: rows of the embedding table dropped for a whole batch (0 <= p < 1)."""
    dropout_input: float = 0.2
    """Locked dropout on the embedded input: one mask for all time steps (0 <= p < 1)."""
    dropout_hidden: float = 0.2
    """Locked dropout between layers (0 <= p < 1)."""
    dropout_output: float = 0.2
    """Locked dropout on the last layer's output (0 <= p < 1)."""
    dropout_recurrent: float = 0.0
    """DropConnect on the hidden-to-hidden matrices (weight drop; Merity et al. 2018) (0 <= p < 1)."""
    tie_embeddings: bool = True
    """Share the input embedding with the output layer."""

    def __post_init__(self) -> None:
        with Problems() as check:
            for name in ("d_embed", "d_hidden", "num_layers"):
                check(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be >= 1")
            for name in ("dropout_embed", "dropout_input", "dropout_hidden", "dropout_output", "dropout_recurrent"):
                check(
                    0 <= getattr(self, name) < 1, f"model.{name}", getattr(self, name), "must be at least 0 and below 1"
                )

    @property
    def carries_state(self) -> bool:
        return True

    def build(self, vocab_size: int, *, seed: int) -> LanguageModel:
        from lmkit.models.recurrent import Recurrent

        return Recurrent(self, vocab_size, seed=seed)


@dataclass(kw_only=True)
class NgramConfig(ModelConfig):
    """Interpolated modified Kneser-Ney n-gram model (Chen & Goodman 1999), trained by counting."""

    order: int = 5
    """Length of the n-grams (1 to 8)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check(1 <= self.order <= 8, "model.order", self.order, "must be between 1 and 8")

    @property
    def carries_state(self) -> bool:
        return True

    @property
    def memory(self) -> str:
        return f"{self.order}-grams, contexts reach back to the start of the line or document"

    @property
    def trains_by_counting(self) -> bool:
        return True

    def build(self, vocab_size: int, *, seed: int) -> LanguageModel:
        from lmkit.models.ngram import KneserNey

        return KneserNey(self, vocab_size)
