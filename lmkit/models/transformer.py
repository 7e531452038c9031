"""The whole Transformer, its cache included: decoder-only, pre- or post-norm, Llama-shaped by default.

Sources: Vaswani et al. 2017 (attention, sinusoidal positions, post-norm), Radford et al. 2019 (GPT-2: pre-norm,
learned positions), Touvron et al. 2023 (Llama: RMSNorm, rotary positions, SwiGLU), Ainslie et al. 2023 (grouped-query
attention).

Parameter names map one to one to Hugging Face's Llama, except that q, k and v are the rows of one matrix ``qkv`` (in
this order) and gate and up those of ``gate_up``, so that each is one product.

Training on CPUs in one precision takes three hand-written functions, those of ``by_hand``, that keep less for the
backward pass and read memory less often than the plain operations; everything else takes the plain operations. Both
compute the same up to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmkit import products
from lmkit.config.model import Activation, Norm, Positions, TransformerConfig
from lmkit.models.base import LanguageModel, State, seeded_generator
from lmkit.models.by_hand import RotaryProjection, SwigluDown, UnitRMS, attention, trains_on_cpu, unit_turns
from lmkit.models.dropout import Dropout, DropPath, LockedDropout, embed_with_dropout
from lmkit.models.output import build_head
from lmkit.models.positions import rotary_tables, rotate, sinusoidal_table


@dataclass
class KVCache(State):
    """Keys and values of the tokens read so far, in buffers with room to grow.

    keys_LBKSC, values_LBKSC: float; only the first ``length`` of the S slots are filled. A forward pass writes into the
    buffers of the cache it is given, so one cache continues one text; ``select`` copies it for several.
    """

    keys_LBKSC: Tensor
    values_LBKSC: Tensor
    length: int

    def detach(self) -> KVCache:
        return KVCache(self.keys_LBKSC.detach(), self.values_LBKSC.detach(), self.length)

    def select(self, rows: Tensor) -> KVCache:
        return KVCache(self.keys_LBKSC[:, rows], self.values_LBKSC[:, rows], self.length)

    def with_room(self, num_tokens: int, limit: int) -> KVCache:
        """This cache, or a larger copy, with free slots for ``num_tokens`` more; never more than ``limit`` slots."""
        room, needed = self.keys_LBKSC.shape[3], self.length + num_tokens
        if needed <= room:
            return self
        extra = min(max(needed, 2 * room, 64), limit) - room
        keys, values = (F.pad(t, (0, 0, 0, extra)) for t in (self.keys_LBKSC, self.values_LBKSC))
        return KVCache(keys, values, self.length)


class Transformer(LanguageModel):
    """Decoder-only Transformer; see TransformerConfig for what can be chosen."""

    cos_TC: Tensor
    sin_TC: Tensor
    sinusoids_TD: Tensor

    def __init__(self, config: TransformerConfig, vocab_size: int, *, seed: int) -> None:
        super().__init__()
        self.config, self.vocab_size, self.context = config, vocab_size, config.context
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        if config.positions is Positions.learned:
            self.positions = nn.Embedding(config.context, config.d_model)
        self.dropout = build_dropout(config)
        self.blocks = nn.ModuleList(Block(config, depth) for depth in range(1, config.num_layers + 1))
        self.final_norm = build_norm(config) if config.pre_norm else nn.Identity()
        self.head = build_head(config, self.embedding, tied=config.tie_embeddings, bias=False)
        self._add_tables()
        self._initialise(seed)

    def _add_tables(self) -> None:
        """Position tables that are computed, not learned, and so not saved."""
        config = self.config
        if config.positions is Positions.rotary:
            cos_TC, sin_TC = rotary_tables(config.context, config.channels, config.rope_theta)
            self.register_buffer("cos_TC", cos_TC, persistent=False)
            self.register_buffer("sin_TC", sin_TC, persistent=False)
        elif config.positions is Positions.sinusoidal:
            table_TD = sinusoidal_table(config.context, config.d_model)
            self.register_buffer("sinusoids_TD", table_TD, persistent=False)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Normal(0, 0.02) as in GPT-2 (Radford et al. 2019, section 2.3), the projections that write to the residual
        stream divided by sqrt(2 L); embeddings that are scaled by sqrt(d_model) start at 1 / sqrt(d_model)."""
        for name, p in self.named_parameters():
            if p.ndim < 2:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            std = 0.02
            if name.endswith(("attention.out.weight", "feed_forward.down.weight")):
                std /= math.sqrt(2 * self.config.num_layers)
            elif self.config.scale_embeddings and name == "embedding.weight":
                std = 1 / math.sqrt(self.config.d_model)
            p.copy_(torch.randn(p.shape, generator=seeded_generator(seed, name)) * std)

    def forward(
        self,
        tokens_BT: Tensor,
        state: KVCache | None = None,
        *,
        use_state: bool = False,
        segments_BT: Tensor | None = None,
    ) -> tuple[Tensor, KVCache | None]:
        """As LanguageModel.forward. ValueError if cached and new tokens together exceed the context.

        segments_BT: int64, the number of the text that each token is of, where a row holds several one after the other.
        No token sees another text, and each text begins at position 0, as if it stood in a row of its own. Not to be
        combined with a state.
        """
        start = 0 if state is None else state.length
        end = start + tokens_BT.shape[1]
        if end > self.config.context:
            raise ValueError(f"{end} tokens do not fit into the model's context of {self.config.context}")
        if state is not None or use_state:
            state = (self._empty_cache(tokens_BT) if state is None else state).with_room(
                end - start, self.config.context
            )
        mask_B1TT: Tensor | None = None
        positions: slice | Tensor = slice(start, end)
        if segments_BT is not None:
            if state is not None:
                raise ValueError("a row of several texts has no state to go on from")
            positions, mask_B1TT = segment_layout(segments_BT)
        x_BTD = self._embed(tokens_BT)
        if self.config.scale_embeddings:
            x_BTD = x_BTD * math.sqrt(self.config.d_model)
        rotary: tuple[Tensor, Tensor] | None = None
        if self.config.positions is Positions.rotary:
            rotary = (self.cos_TC[positions], self.sin_TC[positions])
            if segments_BT is not None:
                rotary = (rotary[0][:, None], rotary[1][:, None])  # the same for all heads
        elif self.config.positions is Positions.learned:
            x_BTD = x_BTD + self.positions.weight[positions]
        else:
            x_BTD = x_BTD + self.sinusoids_TD[positions]
        x_BTD = self.dropout(x_BTD)
        for layer, block in enumerate(self.blocks):
            cached = None if state is None else (state.keys_LBKSC[layer], state.values_LBKSC[layer])
            x_BTD = block(x_BTD, rotary, cached, start, mask_B1TT)
        if state is not None:
            state = KVCache(state.keys_LBKSC, state.values_LBKSC, end)
        return self.final_norm(x_BTD), state

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        if self.training and self.config.dropout_embed > 0.0:
            return embed_with_dropout(tokens_BT, self.embedding.weight, self.config.dropout_embed)
        x_BTD: Tensor = self.embedding(tokens_BT)
        return x_BTD

    def _empty_cache(self, tokens_BT: Tensor) -> KVCache:
        config = self.config
        shape = (config.num_layers, len(tokens_BT), config.kv_heads, 0, config.channels)
        device = tokens_BT.device
        kind = device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.embedding.weight.dtype
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return KVCache(keys, values, 0)


class Block(nn.Module):
    """Attention and feed-forward, each inside a residual branch, normalised before (pre-norm) or after the sum."""

    def __init__(self, config: TransformerConfig, depth: int = 1) -> None:
        """depth: 1 for the lowest block."""
        super().__init__()
        self.pre_norm = config.pre_norm
        self.attention_norm = build_norm(config)
        self.attention = Attention(config)
        self.feed_forward_norm = build_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = build_dropout(config)
        if config.drop_path > 0.0:
            self.dropout = nn.Sequential(self.dropout, DropPath(config.drop_path * depth / config.num_layers))

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cached: tuple[Tensor, Tensor] | None,
        start: int,
        mask_B1TT: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        if self.pre_norm:
            normed_BTD, gain_D = normalised(self.attention_norm, x_BTD, self.attention.qkv)
            x_BTD = plus(x_BTD, self.dropout(self.attention(normed_BTD, rotary, cached, start, mask_B1TT, gain_D)))
            normed_BTD, gain_D = normalised(self.feed_forward_norm, x_BTD, self.feed_forward.first)
            return plus(x_BTD, self.dropout(self.feed_forward(normed_BTD, gain_D)))
        x_BTD = self.attention_norm(x_BTD + self.dropout(self.attention(x_BTD, rotary, cached, start, mask_B1TT)))
        normed: Tensor = self.feed_forward_norm(x_BTD + self.dropout(self.feed_forward(x_BTD)))
        return normed


class Attention(nn.Module):
    """Causal self-attention with H query heads that share K key/value heads in groups of H / K."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.kv_heads
        self.channels = config.channels
        self.dropout = config.attention_dropout
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.channels
        self.qkv = nn.Linear(config.d_model, rows, bias=config.has_qkv_bias)
        self.out = nn.Linear(self.num_heads * self.channels, config.d_model, bias=config.bias)
        self.qk_norm = bool(config.qk_norm)
        if self.qk_norm:
            self.q_norm = RMSNorm(self.channels, eps=config.norm_eps)
            self.k_norm = RMSNorm(self.channels, eps=config.norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cached: tuple[Tensor, Tensor] | None,
        start: int,
        mask_B1TT: Tensor | None = None,
        gain_D: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D). New keys and values are written into ``cached`` from slot ``start`` on.

        gain_D: factors of x's channels that are still to be applied.
        """
        length = x_BTD.shape[1]
        q_BHTC, k_BKTC, v_BKTC = self._project(x_BTD, gain_D, rotary, trains=cached is None and mask_B1TT is None)
        mask_TS = mask_B1TT
        if cached is not None:
            end = start + length
            for buffer, new in zip(cached, (k_BKTC, v_BKTC), strict=True):
                buffer[:, :, start:end] = new
            k_BKTC, v_BKTC = cached[0][:, :, :end], cached[1][:, :, :end]
            if start > 0 and length > 1:
                mask_TS = torch.ones(length, end, dtype=torch.bool, device=x_BTD.device).tril(start)
        y_BHTC = attention(
            q_BHTC,
            k_BKTC,
            v_BKTC,
            attn_mask=mask_TS,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask_TS is None and start == 0,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return products.apply(self.out, y_BHTC.transpose(1, 2).flatten(2))

    def _project(
        self, x_BTD: Tensor, gain_D: Tensor | None, rotary: tuple[Tensor, Tensor] | None, *, trains: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, rotated. A cache needs the plain order of channels, so trains=False with one."""
        by_hand = trains and not self.qk_norm and products.is_plain(self.qkv) and trains_on_cpu(x_BTD)
        if by_hand and rotary is not None:
            turns_TP = unit_turns(*rotary, self.num_heads + self.num_kv_heads)
            weight_MD = self.qkv.weight if gain_D is None else self.qkv.weight * gain_D
            heads: tuple[Tensor, Tensor, Tensor] = RotaryProjection.apply(  # type: ignore[no-untyped-call]
                x_BTD, weight_MD, self.qkv.bias, turns_TP, self.num_heads, self.num_kv_heads
            )
            return heads
        heads_BTC = products.apply(self.qkv, x_BTD, gain_D).view(*x_BTD.shape[:-1], -1, self.channels).transpose(1, 2)
        q_BHTC, k_BKTC, v_BKTC = torch.split(heads_BTC, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.qk_norm:
            q_BHTC, k_BKTC = self.q_norm(q_BHTC), self.k_norm(k_BKTC)
        if rotary is not None:
            q_BHTC, k_BKTC = rotate(q_BHTC, *rotary), rotate(k_BKTC, *rotary)
        return q_BHTC, k_BKTC, v_BKTC


class FeedForward(nn.Module):
    """down(act(up(x))), or with a gate down(act(gate(x)) * up(x)) (Shazeer 2020, "GLU variants")."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gated = config.gated
        self.activation = config.activation
        width = d_ff(config)
        if config.gated:
            self.gate_up = nn.Linear(config.d_model, 2 * width, bias=config.bias)
        else:
            self.up = nn.Linear(config.d_model, width, bias=config.bias)
        self.down = nn.Linear(width, config.d_model, bias=config.bias)

    @property
    def first(self) -> nn.Linear:
        """The layer that reads the input."""
        return self.gate_up if self.gated else self.up

    def forward(self, x_BTD: Tensor, gain_D: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D). gain_D: factors of x's channels that are still to be applied."""
        rows_BTF = products.apply(self.first, x_BTD, gain_D)
        if self.gated and self.activation is Activation.silu and products.is_plain(self.down) and trains_on_cpu(x_BTD):
            y_BTD: Tensor = SwigluDown.apply(rows_BTF, self.down.weight, self.down.bias)  # type: ignore[no-untyped-call]
            return y_BTD
        if not self.gated:
            return products.apply(self.down, activate(self.activation, rows_BTF))
        gate_BTF, up_BTF = rows_BTF.chunk(2, dim=-1)
        return products.apply(self.down, activate(self.activation, gate_BTF) * up_BTF)


def segment_layout(segments_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(positions_BT, mask_B1TT): each token's place in its text, and what it may see (true): its text up to itself."""
    length = segments_BT.shape[1]
    index_T = torch.arange(length, device=segments_BT.device)
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts_BT = torch.where(begins_BT, index_T, 0).cummax(1).values
    mask_BTT = (starts_BT[:, :, None] == starts_BT[:, None, :]) & (index_T[:, None] >= index_T)
    return index_T - starts_BT, mask_BTT[:, None]


def d_ff(config: TransformerConfig) -> int:
    """Width of the feed-forward block: as configured, else 8/3 d_model rounded up to 32 if gated, else 4 d_model."""
    if config.d_ff is not None:
        return config.d_ff
    return -(-8 * config.d_model // 3 // 32) * 32 if config.gated else 4 * config.d_model


def activate(kind: Activation, x: Tensor) -> Tensor:
    """The pointwise non-linearity; gelu in GPT-2's tanh approximation (Hendrycks & Gimpel 2016)."""
    if kind is Activation.relu:
        return F.relu(x)
    if kind is Activation.gelu:
        return F.gelu(x, approximate="tanh")
    if kind is Activation.silu:
        return F.silu(x)
    return torch.tanh(x) if kind is Activation.tanh else torch.sigmoid(x)


def build_dropout(config: TransformerConfig) -> nn.Module:
    """Dropout of the embeddings and of the sublayers' outputs."""
    return LockedDropout(config.dropout) if config.dropout_locked else Dropout(config.dropout)


def build_norm(config: TransformerConfig) -> nn.Module:
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016) over the model width."""
    if config.norm is Norm.rmsnorm:
        return RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm, by the hand-written function where trains_on_cpu."""

    def forward(self, x: Tensor) -> Tensor:
        if not trains_on_cpu(x):
            plain: Tensor = super().forward(x)
            return plain
        return self.without_gain(x) * self.weight

    def without_gain(self, x: Tensor) -> Tensor:
        """By the hand-written function, up to the factors of the channels."""
        n: Tensor = UnitRMS.apply(x, self.eps)  # type: ignore[no-untyped-call]
        return n


def normalised(norm: nn.Module, x_BTD: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(x normalised, gain_D), where the layer that reads it has still to apply the gain if there is one.

    The gain of an RMSNorm costs less in the layer's matrix than in x, unless there are few positions.
    """
    if isinstance(norm, RMSNorm) and products.is_plain(layer) and trains_on_cpu(x_BTD):
        return norm.without_gain(x_BTD), norm.weight
    return norm(x_BTD), None


def plus(x_BTD: Tensor, branch_BTD: Tensor) -> Tensor:
    """x + branch; written over the branch, which nothing else reads, where trains_on_cpu: then there is one
    precision."""
    return branch_BTD.add_(x_BTD) if trains_on_cpu(x_BTD) else x_BTD + branch_BTD
