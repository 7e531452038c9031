"""One more token of each text through a Transformer, in as few operations as it takes: for generation on CPUs.

At one token a time most of Transformer.forward is the cost of calling, and products of few rows with (out, in) matrices
read them slowly. Here every matrix is copied once into an order that is read fast, with the gain of the RMSNorm before
it and the scale of the queries, and queries and keys are rotated together. The result is that of Transformer.forward
up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmkit import products
from lmkit.config.model import Positions
from lmkit.heads import SoftmaxHead
from lmkit.models.base import LanguageModel
from lmkit.models.dropout import Dropout, DropPath, LockedDropout
from lmkit.models.transformer import Attention, Block, FeedForward, KVCache, RMSNorm, Transformer, activate
from lmkit.pages import Shelf

MAX_ROOM = 1024
"""Tokens for which room is made at once; who asks for more may meet the end of the text long before."""
MIN_TOKENS = 32
"""From so many new tokens on the copies pay: making them costs about as much as they save in 20."""

KNOWN_PARTS = {Block, Attention, FeedForward, nn.Linear, RMSNorm, nn.LayerNorm, Dropout, LockedDropout, DropPath}
KNOWN_PARTS |= {nn.Sequential, nn.Identity}


Product = Callable[[Tensor], Tensor]
"""x W + b: (B, I) -> (B, O)."""


def product(weight_OI: Tensor, bias_O: Tensor | None, batch: int, shelf: Shelf) -> Product:
    """x W + b with a copy of W in the order in which products of ``batch`` rows read it fastest."""
    weight_OI, bias_O = weight_OI.detach(), None if bias_O is None else bias_O.detach()
    if not products.by_onednn(weight_OI, products.MIN_ROWS):
        weight_IO = shelf.copy(weight_OI.T)
        if bias_O is None:
            return lambda x_BI: x_BI @ weight_IO
        return lambda x_BI: torch.addmm(bias_O, x_BI, weight_IO)
    if batch > 1:
        packed_OI = products.packed(weight_OI, batch)
        return lambda x_BI: products.onednn(x_BI, packed_OI, bias_O)
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return one_row_by_parts(weight_OI, bias_O, shelf)
    return OneRow(weight_OI, bias_O, shelf)


def one_row_by_parts(weight_OI: Tensor, bias_O: Tensor | None, shelf: Shelf) -> Product:
    """x W + b for one row, where W's columns are cut into a part for each thread: MKL shares out several products, but
    not a single one. With AVX2 alone (AMD's Zen 3) it takes 0.7 to 0.8 times as long as ``OneRow``."""
    parts = math.gcd(torch.get_num_threads(), len(weight_OI))
    weight_PIO = shelf.copy(weight_OI.T.reshape(weight_OI.shape[1], parts, -1).transpose(0, 1))

    def times(x_1I: Tensor) -> Tensor:
        y_1O = torch.bmm(x_1I.expand(parts, -1, -1), weight_PIO).view(1, -1)
        return y_1O if bias_O is None else y_1O.add_(bias_O)

    return times


class OneRow:
    """x W + b for one row: the sum of the rows of W, each times its x, as torch sums the embeddings of a bag.

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
            self.eps = torch.tensor(norm.eps)

    def __call__(self, x_BD: Tensor) -> Tensor:
        norm = self.norm
        if isinstance(norm, nn.LayerNorm):
            return torch.layer_norm(x_BD, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        if not isinstance(norm, RMSNorm):
            y_BD: Tensor = norm(x_BD)
            return y_BD
        squares_B1 = torch.linalg.vecdot(x_BD, x_BD).unsqueeze(1)
        rate_B1 = torch.add(self.eps, squares_B1, alpha=1 / self.width).rsqrt_()
        normed_BD = x_BD * rate_B1
        return normed_BD if self.gain_D is None else normed_BD.mul_(self.gain_D)


def with_gain(weight_OI: Tensor, norm: nn.Module) -> Tensor:
    """The matrix that gives for a normed vector without gain what ``weight_OI`` gives for one with it."""
    return weight_OI * norm.weight if isinstance(norm, RMSNorm) else weight_OI


def with_scale(qkv: Tensor, attention: Attention) -> Tensor:
    """Rows of queries, keys and values, those of the queries divided by the square root of the channels."""
    num_rows = attention.num_heads * attention.channels
    return torch.cat([qkv[:num_rows] * attention.channels**-0.5, qkv[num_rows:]])


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
    def of(cls, block: Block, batch: int, shelf: Shelf) -> Layer:
        attention, feed_forward = block.attention, block.feed_forward
        rise = feed_forward.first
        qkv_weight, qkv_bias = with_scale(attention.qkv.weight, attention), attention.qkv.bias
        rise_weight = rise.weight
        if block.pre_norm:
            qkv_weight = with_gain(qkv_weight, block.attention_norm)
            rise_weight = with_gain(rise_weight, block.feed_forward_norm)
        return cls(
            Norm(block.attention_norm, gain=not block.pre_norm),
            product(qkv_weight, None if qkv_bias is None else with_scale(qkv_bias, attention), batch, shelf),
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


class TokenStep:
    """Logits of the next token of each text, from one token of each and the cache. Holds a copy of the matrices."""

    def __init__(self, model: Transformer, head: SoftmaxHead, batch: int, num_tokens: int) -> None:
        """The model must not change while this is in use; see ``token_step`` for which can be given."""
        self.model, self.config, self.num_tokens = model, model.config, num_tokens
        shelf = Shelf()
        self.layers = [Layer.of(block, batch, shelf) for block in model.blocks]  # type: ignore[arg-type]
        self.head = product(with_gain(head.weight, model.final_norm), head.bias, batch, shelf)
        self.final_norm = Norm(model.final_norm, gain=False)
        self.num_heads = model.config.num_heads
        self.num_kv_heads = model.config.num_kv_heads or model.config.num_heads
        if model.config.positions is Positions.rotary:
            half = model.config.channels // 2
            self.signed_sin_TC = torch.cat([-model.sin_TC[:, :half], model.sin_TC[:, half:]], 1)

    def __call__(self, tokens_B: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        """(logits_BV, cache with one more token). The buffers of the given cache are written to."""
        position = cache.length
        if cache.keys_LBKSC.shape[3] == position:
            room = min(self.num_tokens, MAX_ROOM, self.config.context - position)
            cache = cache.with_room(room, self.config.context)
        x_BD = self._embed(tokens_B, position)
        turn = None
        if self.config.positions is Positions.rotary:
            turn = self.model.cos_TC[position], self.signed_sin_TC[position]
        keys_LNSC, values_LNSC = cache.keys_LBKSC.flatten(1, 2), cache.values_LBKSC.flatten(1, 2)
        layers = zip(
            self.layers,
            keys_LNSC[:, :, : position + 1].transpose(2, 3).unbind(0),
            keys_LNSC[:, :, position].unbind(0),
            values_LNSC[:, :, : position + 1].unbind(0),
            values_LNSC[:, :, position].unbind(0),
            strict=True,
        )
        for layer, *slot in layers:
            if self.config.pre_norm:
                x_BD += layer.out(self._attend(layer.qkv(layer.attention_norm(x_BD)), turn, *slot))
                x_BD += layer.down(self._activate(layer.up(layer.feed_forward_norm(x_BD))))
            else:
                seen_BD = self._attend(layer.qkv(x_BD), turn, *slot)
                x_BD = layer.attention_norm(x_BD + layer.out(seen_BD))
                x_BD = layer.feed_forward_norm(x_BD + layer.down(self._activate(layer.up(x_BD))))
        if self.config.pre_norm:
            x_BD = self.final_norm(x_BD)
        return self.head(x_BD).float(), KVCache(cache.keys_LBKSC, cache.values_LBKSC, position + 1)

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
        self,
        qkv_BM: Tensor,
        turn: tuple[Tensor, Tensor] | None,
        keys_NCT: Tensor,
        key_NC: Tensor,
        values_NTC: Tensor,
        value_NC: Tensor,
    ) -> Tensor:
        """What each query sees (B, H x C); N = B x K. New key and value go to their place, the last of the T."""
        batch, heads, kv_heads = len(qkv_BM), self.num_heads, self.num_kv_heads
        heads_BMC = qkv_BM.view(batch, heads + 2 * kv_heads, -1)
        if turn is None:
            q_BHC, k_BKC, v_BKC = heads_BMC.split_with_sizes((heads, kv_heads, kv_heads), 1)
        else:
            qk_BMC, v_BKC = heads_BMC.split_with_sizes((heads + kv_heads, kv_heads), 1)
            cos_C, sin_C = turn
            qk_BMC = torch.addcmul(qk_BMC * cos_C, qk_BMC.roll(qk_BMC.shape[2] // 2, -1), sin_C)
            q_BHC, k_BKC = qk_BMC.split_with_sizes((heads, kv_heads), 1)
        key_NC.view(k_BKC.shape).copy_(k_BKC)
        value_NC.view(v_BKC.shape).copy_(v_BKC)
        q_NGC = q_BHC.reshape(batch * kv_heads, heads // kv_heads, -1)  # G = H / K queries share a key
        share_NGT = torch.bmm(q_NGC, keys_NCT)
        torch.softmax(share_NGT, 2, out=share_NGT)
        return torch.bmm(share_NGT, values_NTC).view(batch, -1)

    def _activate(self, up_BF: Tensor) -> Tensor:
        if not self.config.gated:
            return activate(self.config.activation, up_BF)
        gate_BF, up_BF = up_BF.chunk(2, 1)
        return activate(self.config.activation, gate_BF).mul_(up_BF)


__all__ = ["MIN_TOKENS", "TokenStep", "token_step"]
