"""One more token of each text through a Transformer, in as few operations as it takes: for generation on CPUs.

At one token a time most of Transformer.forward is the cost of calling, and products of few rows with (out, in) matrices
read them slowly. Here every matrix is copied once into an order that is read fast, with the gain of the RMSNorm before
it and the scale of the queries, and queries and keys are rotated together, as complex numbers. The result is that of
Transformer.forward up to rounding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmkit import products
from lmkit.config.model import Positions
from lmkit.heads import SoftmaxHead
from lmkit.models.base import LanguageModel
from lmkit.models.by_hand import reordered, unit_turns
from lmkit.models.dropout import Dropout, DropPath, LockedDropout
from lmkit.models.transformer import Attention, Block, FeedForward, KVCache, RMSNorm, Transformer, activate
from lmkit.pages import Shelf

MAX_ROOM = 1024
"""Tokens for which room is made at once; who asks for more may meet the end of the text long before."""
MIN_TOKENS = 32
"""From so many new tokens on the copies pay: making them costs about as much as they save in 20."""

KNOWN_PARTS = {Block, Attention, FeedForward, nn.Linear, RMSNorm, nn.LayerNorm, Dropout, LockedDropout, DropPath}
KNOWN_PARTS |= {nn.Sequential, nn.Identity}


class Product(ABC):
    """x W + b: (B, I) -> (B, O), with a copy of W in the order in which it is read fastest."""

    @abstractmethod
    def __call__(self, x_BI: Tensor) -> Tensor:
        """The product, in new memory."""

    def add_to(self, total_BO: Tensor, x_BI: Tensor) -> Tensor:
        """``total_BO``, to which the product is added in place."""
        return total_BO.add_(self(x_BI))


def product(weight_OI: Tensor, bias_O: Tensor | None, batch: int, shelf: Shelf) -> Product:
    """x W + b for products of ``batch`` rows."""
    weight_OI, bias_O = weight_OI.detach(), None if bias_O is None else bias_O.detach()
    if not products.by_onednn(weight_OI, products.MIN_ROWS):
        return ByMkl(weight_OI, bias_O, shelf)
    if batch > 1:
        return ByOnednn(weight_OI, bias_O, batch)
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return OneRowByParts(weight_OI, bias_O, shelf)
    return OneRow(weight_OI, bias_O, shelf)


class ByMkl(Product):
    """W as (in, out), which MKL reads fastest; it adds the product where it is to go."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, shelf: Shelf) -> None:
        self.weight_IO, self.bias_O = shelf.copy(weight_OI.T), bias_O

    def __call__(self, x_BI: Tensor) -> Tensor:
        if self.bias_O is None:
            return torch.mm(x_BI, self.weight_IO)
        return torch.addmm(self.bias_O, x_BI, self.weight_IO)

    def add_to(self, total_BO: Tensor, x_BI: Tensor) -> Tensor:
        total_BO.addmm_(x_BI, self.weight_IO)
        return total_BO if self.bias_O is None else total_BO.add_(self.bias_O)


class ByOnednn(Product):
    """W in the order that oneDNN wants."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, batch: int) -> None:
        self.packed_OI, self.bias_O = products.packed(weight_OI, batch), bias_O

    def __call__(self, x_BI: Tensor) -> Tensor:
        return products.onednn(x_BI, self.packed_OI, self.bias_O)


class OneRowByParts(Product):
    """For one row: W's columns are cut into a part for each thread. MKL shares out several products, but not a single
    one. With AVX2 alone (AMD's Zen 3) it takes 0.7 to 0.8 times as long as ``OneRow``."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, shelf: Shelf) -> None:
        self.parts, self.bias_O = math.gcd(torch.get_num_threads(), len(weight_OI)), bias_O
        columns_PIO = weight_OI.T.reshape(weight_OI.shape[1], self.parts, -1).transpose(0, 1)
        self.weight_PIO = shelf.copy(columns_PIO)

    def __call__(self, x_1I: Tensor) -> Tensor:
        y_1O = torch.bmm(x_1I.expand(self.parts, -1, -1), self.weight_PIO).view(1, -1)
        return y_1O if self.bias_O is None else y_1O.add_(self.bias_O)


class OneRow(Product):
    """For one row: the sum of the rows of W, each times its x, as torch sums the embeddings of a bag.

    MKL and oneDNN, made for more rows, take 1.1 to 2 times as long (AMD with AVX-512, torch 2.13). The columns of W are
    cut into S stripes, a bag for each, which the threads share.
    """

    MAX_COLUMNS = 512
    """The sums of wider stripes do not stay in registers."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, shelf: Shelf) -> None:
        self.bias_O = bias_O
        self.num_out, num_in = weight_OI.shape
        threads = torch.get_num_threads()
        self.num_stripes = threads * math.ceil(self.num_out / (threads * self.MAX_COLUMNS))
        columns = math.ceil(self.num_out / self.num_stripes)
        weight_OI = F.pad(weight_OI, (0, 0, 0, self.num_stripes * columns - self.num_out))
        self.rows = shelf.copy(weight_OI.view(self.num_stripes, columns, num_in).transpose(1, 2)).flatten(0, 1)
        """(S x I, columns): the rows of each stripe one below the other."""
        self.numbers = torch.arange(len(self.rows), dtype=torch.int32)
        self.begins_S = self.numbers[::num_in].clone()

    def __call__(self, x_1I: Tensor) -> Tensor:
        factors = x_1I.expand(self.num_stripes, -1).reshape(-1)
        stripes_SC = torch.embedding_bag(self.rows, self.numbers, self.begins_S, False, 0, False, factors)[0]
        y_1O = stripes_SC.view(1, -1)
        if y_1O.shape[1] > self.num_out:
            y_1O = y_1O[:, : self.num_out]
        return y_1O if self.bias_O is None else y_1O.add_(self.bias_O)


class Norm:
    """The normalisation of a layer; RMSNorm in fewer operations than torch takes on a CPU."""

    def __init__(self, norm: nn.Module, *, gain: bool) -> None:
        """gain: whether an RMSNorm multiplies by its gain, which the product that reads it may do as well."""
        self.norm = norm
        if isinstance(norm, RMSNorm):
            assert norm.eps is not None
            self.width, self.gain_D = norm.normalized_shape[0], norm.weight.detach() if gain else None
            self.eps_111 = torch.full((1, 1, 1), norm.eps)

    def __call__(self, x_BD: Tensor) -> Tensor:
        norm = self.norm
        if isinstance(norm, nn.LayerNorm):
            return torch.layer_norm(x_BD, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        if not isinstance(norm, RMSNorm):
            y_BD: Tensor = norm(x_BD)
            return y_BD
        if len(x_BD) == 1:  # one operation less than for several rows
            rate_B1 = torch.addmm(self.eps_111[0], x_BD, x_BD.T, alpha=1 / self.width).rsqrt_()
        else:
            rows_B1D = x_BD.unsqueeze(1)
            squares_B11 = torch.baddbmm(self.eps_111, rows_B1D, rows_B1D.transpose(1, 2), alpha=1 / self.width)
            rate_B1 = squares_B11.rsqrt_().squeeze(2)
        normed_BD = x_BD * rate_B1
        return normed_BD if self.gain_D is None else normed_BD.mul_(self.gain_D)


def with_gain(weight_OI: Tensor, norm: nn.Module) -> Tensor:
    """The matrix that gives for a normed vector without gain what ``weight_OI`` gives for one with it."""
    return weight_OI * norm.weight if isinstance(norm, RMSNorm) else weight_OI


def prepared(qkv: Tensor, attention: Attention, *, paired: bool) -> Tensor:
    """Rows of queries, keys and values, those of the queries divided by the square root of the channels.

    paired: whether the two channels of a pair that is rotated become neighbours, as in ``by_hand.RotaryProjection``.
    """
    num_queries, channels = attention.num_heads * attention.channels, attention.channels
    rows = torch.cat([qkv[:num_queries] * channels**-0.5, qkv[num_queries:]])
    if not paired:
        return rows
    return reordered(rows, num_queries + attention.num_kv_heads * channels, (-1, 2, channels // 2))


@dataclass(frozen=True)
class Layer:
    """The parts of a block."""

    attention_norm: Norm
    qkv: Product
    out: Product
    feed_forward_norm: Norm
    up: Product
    """gate and up in one if the block is gated."""
    down: Product

    @classmethod
    def of(cls, block: Block, batch: int, shelf: Shelf, *, rotary: bool) -> Layer:
        attention, feed_forward = block.attention, block.feed_forward
        rise = feed_forward.first
        qkv_weight, qkv_bias = attention.qkv.weight, attention.qkv.bias
        rise_weight = rise.weight
        if block.pre_norm:
            qkv_weight = with_gain(qkv_weight, block.attention_norm)
            rise_weight = with_gain(rise_weight, block.feed_forward_norm)
        return cls(
            Norm(block.attention_norm, gain=not block.pre_norm),
            product(
                prepared(qkv_weight, attention, paired=rotary),
                None if qkv_bias is None else prepared(qkv_bias, attention, paired=rotary),
                batch,
                shelf,
            ),
            product(attention.out.weight, attention.out.bias, batch, shelf),
            Norm(block.feed_forward_norm, gain=not block.pre_norm),
            product(rise_weight, rise.bias, batch, shelf),
            product(feed_forward.down.weight, feed_forward.down.bias, batch, shelf),
        )


def token_step(model: LanguageModel, batch: int, num_tokens: int) -> TokenStep | None:
    """A TokenStep for ``num_tokens`` tokens of each of ``batch`` texts; it works for other numbers, less fast.

    None if a part of the model is not known here (an adapter, another head).
    """
    if type(model) is not Transformer or type(model.head) is not SoftmaxHead or model.config.qk_norm:
        return None
    parts = {type(module) for block in model.blocks for module in block.modules()}
    return TokenStep(model, model.head, batch, num_tokens) if parts <= KNOWN_PARTS else None


@dataclass(frozen=True)
class StepCache:
    """Keys and values of the tokens read so far in one buffer, so that those of a token are written in one operation.

    N = B x K. Only the first ``length`` of the S slots are filled. Channels of rotary keys are in pairs.
    """

    heads_L2NSC: Tensor
    length: int
    num_kv_heads: int

    def select(self, rows: Tensor) -> StepCache:
        """The cache of the texts of these rows, as a copy."""
        chosen_N = (rows[:, None] * self.num_kv_heads + torch.arange(self.num_kv_heads)).flatten()
        return StepCache(self.heads_L2NSC.index_select(2, chosen_N), self.length, self.num_kv_heads)


class TokenStep:
    """Logits of the next token of each text, from one token of each and the cache. Holds a copy of the matrices."""

    def __init__(self, model: Transformer, head: SoftmaxHead, batch: int, num_tokens: int) -> None:
        """The model must not change while this is in use; see ``token_step`` for which can be given."""
        self.model, self.config, self.num_tokens = model, model.config, num_tokens
        config, shelf = model.config, Shelf()
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads
        rotary = config.positions is Positions.rotary
        self.layers = [Layer.of(block, batch, shelf, rotary=rotary) for block in model.blocks]  # type: ignore[arg-type]
        self.head = product(with_gain(head.weight, model.final_norm), head.bias, batch, shelf)
        self.final_norm = Norm(model.final_norm, gain=False)
        self.turns_TM: Tensor | None = None
        """Complex: what the pairs of channels of queries, keys and values are multiplied by, values by 1."""
        if rotary:
            turns_TP = unit_turns(model.cos_TC, model.sin_TC, self.num_heads + self.num_kv_heads)
            self.turns_TM = F.pad(turns_TP, (0, self.num_kv_heads * config.channels // 2), value=1.0)

    def __call__(self, tokens_B: Tensor, cache: KVCache | StepCache) -> tuple[Tensor, StepCache]:
        """(logits_BV, cache with one more token). cache: the model's own, or what this has returned, which is written
        to."""
        if isinstance(cache, KVCache):
            cache = self._taken_over(cache)
        heads_L2NSC, position = cache.heads_L2NSC, cache.length
        if heads_L2NSC.shape[3] == position:
            heads_L2NSC = F.pad(heads_L2NSC, (0, 0, 0, self._room(position)))
        x_BD = self._embed(tokens_B, position)
        turns_M = None if self.turns_TM is None else self.turns_TM[position]
        seen_L2NTC = heads_L2NSC[:, :, :, : position + 1]
        layers = zip(
            self.layers,
            seen_L2NTC[:, 0].transpose(2, 3).unbind(0),
            seen_L2NTC[:, 1].unbind(0),
            heads_L2NSC[:, :, :, position].unbind(0),
            strict=True,
        )
        for layer, *slot in layers:
            if self.config.pre_norm:
                x_BD = layer.out.add_to(x_BD, self._attend(layer.qkv(layer.attention_norm(x_BD)), turns_M, *slot))
                x_BD = layer.down.add_to(x_BD, self._activate(layer.up(layer.feed_forward_norm(x_BD))))
            else:
                seen_BD = self._attend(layer.qkv(x_BD), turns_M, *slot)
                x_BD = layer.attention_norm(layer.out.add_to(x_BD, seen_BD))
                x_BD = layer.feed_forward_norm(layer.down.add_to(x_BD, self._activate(layer.up(x_BD))))
        if self.config.pre_norm:
            x_BD = self.final_norm(x_BD)
        return self.head(x_BD).float(), StepCache(heads_L2NSC, position + 1, self.num_kv_heads)

    def _room(self, length: int) -> int:
        """Slots to be made for tokens behind the first ``length``."""
        return min(self.num_tokens, MAX_ROOM, self.config.context - length)

    def _taken_over(self, cache: KVCache) -> StepCache:
        keys_LNTC, values_LNTC = (
            heads_LBKSC[:, :, :, : cache.length].flatten(1, 2) for heads_LBKSC in (cache.keys_LBKSC, cache.values_LBKSC)
        )
        if self.turns_TM is not None:
            keys_LNTC = keys_LNTC.reshape(*keys_LNTC.shape[:3], 2, -1).transpose(3, 4).flatten(3)
        heads_L2NTC = torch.stack([keys_LNTC, values_LNTC], 1)
        heads_L2NSC = F.pad(heads_L2NTC, (0, 0, 0, self._room(cache.length)))
        return StepCache(heads_L2NSC, cache.length, self.num_kv_heads)

    def _embed(self, tokens_B: Tensor, position: int) -> Tensor:
        config = self.config
        x_BD = self.model.embedding.weight.index_select(0, tokens_B)
        if config.scale_embeddings:
            x_BD *= math.sqrt(config.d_model)
        if config.positions is Positions.learned:
            x_BD += self.model.positions.weight[position]
        elif config.positions is Positions.sinusoidal:
            x_BD += self.model.sinusoids_TD[position]
        return x_BD

    def _attend(
        self, qkv_BM: Tensor, turns_M: Tensor | None, keys_NCT: Tensor, values_NTC: Tensor, slot_2NC: Tensor
    ) -> Tensor:
        """What each query sees (B, H x C). New key and value go to the slot, the last of the T."""
        batch, heads, kv_heads, channels = len(qkv_BM), self.num_heads, self.num_kv_heads, slot_2NC.shape[2]
        if turns_M is not None:
            torch.view_as_complex(qkv_BM.view(batch, -1, 2)).mul_(turns_M)
        q_BD, kv_BM = qkv_BM.split_with_sizes((heads * channels, 2 * kv_heads * channels), 1)
        slot_2NC.view(2, batch, kv_heads, channels).copy_(kv_BM.view(batch, 2, kv_heads, channels).transpose(0, 1))
        q_NGC = q_BD.reshape(batch * kv_heads, heads // kv_heads, channels)  # G = H / K queries share a key
        share_NGT = torch.bmm(q_NGC, keys_NCT)
        torch.softmax(share_NGT, 2, out=share_NGT)
        return torch.bmm(share_NGT, values_NTC).view(batch, -1)

    def _activate(self, up_BF: Tensor) -> Tensor:
        if not self.config.gated:
            return activate(self.config.activation, up_BF)
        gate_BF, up_BF = up_BF.chunk(2, 1)
        return activate(self.config.activation, gate_BF).mul_(up_BF)
