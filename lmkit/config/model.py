"""Configuration of the model families. ``build`` imports the family (and with it torch) only when called."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from lmkit.config.check import Problems, check_cutoffs

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

    @property
    def objective(self) -> str:
        """Name of the ``objective`` that trains it."""
        return "lm"


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
class HeadConfig(ModelConfig):
    """What the output layers of neural language models have in common."""

    num_softmaxes: int = 1
    """Softmaxes whose mixture the output layer is (>= 1; Yang et al. 2018)."""
    cutoffs: list[int] = field(default_factory=list)
    """Adaptive softmax: frequency ranks at which clusters of rarer tokens begin, rising; softmax=adaptive sets them."""
    div_value: float = 4.0
    """Adaptive softmax: each cluster is this many times narrower than the one before it (>= 1)."""

    def _check_head(self, check: Problems, *, tied: bool) -> None:
        check.at_least(1, "model", self, "num_softmaxes")
        check_cutoffs(check, "model.cutoffs", self.cutoffs)
        check(1 <= self.div_value < float("inf"), "model.div_value", self.div_value, "must be >= 1 and finite")
        if self.cutoffs:
            check(self.num_softmaxes == 1, "model.num_softmaxes", self.num_softmaxes, "must be 1 with softmax=adaptive")
            check(not tied, "model.tie_embeddings", tied, "must be false with softmax=adaptive")


REGULARISERS = ("dropout", "attention_dropout", "dropout_embed", "dropout_locked", "drop_path")
"""Keys of a Transformer that change its training and none of its parameters: any weights go with any values of them."""


@dataclass(kw_only=True)
class TransformerConfig(HeadConfig):
    """Decoder-only Transformer. The defaults are Llama-shaped; ``gpt2`` and ``vanilla`` are other settings of it."""

    d_model: int = 256
    """Width of the residual stream (>= 1)."""
    num_layers: int = 6
    """Number of blocks (>= 1)."""
    num_heads: int = 8
    """Query heads (>= 1); must divide d_model unless head_channels is given."""
    num_kv_heads: int | None = None
    """Key/value heads for grouped-query attention; must divide num_heads; null: num_heads."""
    head_channels: int | None = None
    """Channels of a head (>= 1); null: d_model / num_heads."""
    d_ff: int | None = None
    """Width of the feed-forward block (>= 1); null: 8/3 d_model rounded up to 32 if gated, else 4 d_model."""
    context: int = 512
    """Longest sequence that the model attends over, in tokens (>= 1)."""
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
    qkv_bias: bool | None = None
    """Biases of the query, key and value projections (Qwen2); null: as ``bias``."""
    qk_norm: bool | None = None
    """RMSNorm over the channels of each query and key head (Qwen3; Henry et al. 2020); null: none."""
    tie_embeddings: bool = True
    """Share the input embedding with the output layer."""
    scale_embeddings: bool = False
    """Multiply embeddings by sqrt(d_model) (Vaswani et al. 2017, section 3.4)."""
    dropout: float = 0.0
    """Dropout on the embeddings and on each sublayer's output (0 <= p < 1)."""
    attention_dropout: float = 0.0
    """Dropout on the attention weights (0 <= p < 1)."""
    memory_tokens: int = 0
    """Tokens before each that it sees whatever the segment, through a carried memory (>= 0); 0: windows begin anew."""
    dropout_embed: float = 0.0
    """Word-type dropout: rows of the embedding table dropped for a whole batch (0 <= p < 1)."""
    dropout_locked: bool = False
    """One mask of ``dropout`` for all positions of a sequence (Gal & Ghahramani 2016) in place of one for each."""
    drop_path: float = 0.0
    """Stochastic depth: a sequence skips the last block's sublayers with this probability, others less (0 <= p < 1)."""

    def __post_init__(self) -> None:
        kv = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        with Problems() as check:
            check.at_least(1, "model", self, "d_model", "num_layers", "num_heads", "context")
            heads = max(self.num_heads, 1)
            check.at_least(1, "model", self, "head_channels", or_null=True)
            check(
                self.head_channels is not None or self.d_model % heads == 0,
                "model.d_model",
                self.d_model,
                f"must be a multiple of model.num_heads={heads}",
            )
            if self.positions is Positions.rotary and (self.head_channels is not None or self.d_model % heads == 0):
                check(
                    (self.head_channels or self.d_model // heads) % 2 == 0,
                    "model.d_model/num_heads" if self.head_channels is None else "model.head_channels",
                    self.head_channels or self.d_model // heads,
                    "must be even for rotary positions",
                )
            check(kv >= 1 and heads % max(kv, 1) == 0, "model.num_kv_heads", kv, f"must divide model.num_heads={heads}")
            check.at_least(1, "model", self, "d_ff", or_null=True)
            check(self.rope_theta > 0, "model.rope_theta", self.rope_theta, "must be > 0")
            check(0 < self.norm_eps < 1, "model.norm_eps", self.norm_eps, "must be above 0 and below 1")
            check.at_least(0, "model", self, "memory_tokens")
            if self.memory_tokens > 0:
                rotary = self.positions is Positions.rotary
                check(rotary, "model.positions", self.positions, "must be rotary with model.memory_tokens > 0")
            check.below_one("model", self, "dropout", "attention_dropout", "dropout_embed", "drop_path")
            self._check_head(check, tied=self.tie_embeddings)

    @property
    def channels(self) -> int:
        """Channels of a head."""
        return self.head_channels or self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def carries_state(self) -> bool:
        return self.memory_tokens > 0

    @property
    def memory(self) -> str:
        return f"each layer sees {self.memory_tokens} tokens back, across all segments"

    def build(self, vocab_size: int, *, seed: int) -> LanguageModel:
        from lmkit.models.transformer import Transformer
        from lmkit.models.transformer_xl import MemoryTransformer

        if self.memory_tokens > 0:
            return MemoryTransformer(self, vocab_size, seed=seed)
        return Transformer(self, vocab_size, seed=seed)


def with_regularisers(model: TransformerConfig, asked: ModelConfig) -> TransformerConfig:
    """A model that comes from elsewhere with the regularisers that are asked for: those not at their defaults."""
    if not isinstance(asked, TransformerConfig):
        return model
    values = {name: getattr(asked, name) for name in REGULARISERS}
    return replace(model, **{name: v for name, v in values.items() if v != getattr(TransformerConfig, name)})


class Cell(Enum):
    """Recurrent cells."""

    lstm = "lstm"
    gru = "gru"


@dataclass(kw_only=True)
class RecurrentConfig(HeadConfig):
    """LSTM or GRU language model with tied weights and variational (locked) dropout (Gal & Ghahramani 2016)."""

    cell: Cell = Cell.lstm
    """Cell: lstm or gru."""
    d_embed: int = 256
    """Width of the embedding and of the last layer's output (>= 1)."""
    d_hidden: int = 256
    """Width of the hidden layers below the last (>= 1)."""
    num_layers: int = 2
    """Number of layers (>= 1)."""
    mogrifier_rounds: int = 0
    """Rounds in which input and state of an LSTM gate each other before each step (>= 0; Melis et al. 2020); slow."""
    mogrifier_rank: int | None = None
    """Rank of the matrices of these rounds (>= 1); null: full."""
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
            check.at_least(1, "model", self, "d_embed", "d_hidden", "num_layers")
            check.at_least(0, "model", self, "mogrifier_rounds")
            plain = self.cell is Cell.lstm or self.mogrifier_rounds == 0
            check(plain, "model.cell", self.cell, "must be lstm with model.mogrifier_rounds > 0")
            check.at_least(1, "model", self, "mogrifier_rank", or_null=True)
            rates = "dropout_embed", "dropout_input", "dropout_hidden", "dropout_output", "dropout_recurrent"
            check.below_one("model", self, *rates)
            self._check_head(check, tied=self.tie_embeddings)

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


@dataclass(kw_only=True)
class VaeLstmConfig(ModelConfig):
    """Sentence VAE with an LSTM encoder and an LSTM decoder, tied weights (Bowman et al. 2016)."""

    d_embed: int = 256
    """Width of the embedding and of the decoder, which are tied (>= 1)."""
    d_encoder: int = 256
    """Width of the encoder (>= 1)."""
    d_latent: int = 32
    """Latent units (>= 0); 0: none, that is an LSTM language model of sentences of the same size."""
    dropout_word: float = 0.0
    """Words that the decoder does not see as its input (0 <= p < 1; Bowman et al. 2016)."""
    dropout_input: float = 0.3
    """Locked dropout on the decoder's embedded input (0 <= p < 1)."""
    dropout_output: float = 0.4
    """Locked dropout on the decoder's output (0 <= p < 1)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.at_least(1, "model", self, "d_embed", "d_encoder")
            check.at_least(0, "model", self, "d_latent")
            check.below_one("model", self, "dropout_word", "dropout_input", "dropout_output")

    @property
    def memory(self) -> str:
        return "state carried from start to end of a sentence"

    @property
    def objective(self) -> str:
        return "vae"

    def build(self, vocab_size: int, *, seed: int) -> LanguageModel:
        from lmkit.models.vae import VaeLstm

        return VaeLstm(self, vocab_size, seed=seed)


@dataclass(kw_only=True)
class RelganConfig(ModelConfig):
    """LSTM generator and convolutional discriminator (after Nie et al. 2019); a language model of sentences."""

    d_embed: int = 256
    """Width of the generator: its embedding and its only layer, which are tied (>= 1)."""
    dropout_input: float = 0.3
    """Locked dropout on the generator's input while it learns by maximum likelihood (0 <= p < 1)."""
    dropout_output: float = 0.4
    """Locked dropout on its output then (0 <= p < 1)."""
    num_representations: int = 8
    """Embeddings of a sentence that the discriminator judges one by one (>= 1)."""
    d_representation: int = 8
    """Width of each (>= 1)."""
    num_filters: int = 64
    """Convolution filters of each length from 2 to 5 words (>= 1)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.at_least(1, "model", self, "d_embed", "num_representations", "d_representation", "num_filters")
            check.below_one("model", self, "dropout_input", "dropout_output")

    @property
    def carries_state(self) -> bool:
        return True

    @property
    def memory(self) -> str:
        return "state carried from start to end; trained on single sentences"

    @property
    def objective(self) -> str:
        return "gan"

    def build(self, vocab_size: int, *, seed: int) -> LanguageModel:
        from lmkit.models.gan import Relgan

        return Relgan(self, vocab_size, seed=seed)
