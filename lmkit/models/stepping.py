"""One more token of each text through a Transformer, in as few operations as it takes: for generation on CPUs.

At one token a time most of Transformer.forward is the cost of calling, and products of few rows with (out, in) matrices
read them slowly. Here every matrix is copied once into an order that is read fast, with the gain of the RMSNorm before
it, and queries and keys are rotated together. The result is that of Transformer.forward up to rounding.
"""

from __future__ import annotations

import math
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

MAX_ROOM = 1024
"""Tokens for which room is made at once; who asks for more may meet the end of the text long before."""
MIN_TOKENS = 32
"""From so many new tokens on the copies pay: making them costs about as much as they save in 20."""
MIN_TEXTS = 8
"""From so many texts on, attention as two products of all heads at once reads the cache faster than torch's own."""

KNOWN_PARTS = {Block, Attention, FeedForward, nn.Linear, RMSNorm, nn.LayerNorm, Dropout, LockedDropout, DropPath}
KNOWN_PARTS |= {nn.Sequential, nn.Identity}


class Product:
    """x W + b with a copy of W in oneDNN's order or as (in, out), where it helps with its columns cut into parts."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, batch: int) -> None:
        self.bias_O = None if bias_O is None else bias_O.detach()
        self.packed_OI: Tensor | None = None
        if batch > 1 and products.by_onednn(weight_OI, products.MIN_ROWS):
            self.packed_OI = products.packed(weight_OI.detach(), batch)
            return
        weight_IO, num_out = weight_OI.detach().T, len(weight_OI)
        self.parts = 1 if products.is_intel() else math.gcd(torch.get_num_threads(), num_out)
        """Elsewhere MKL reads a matrix with one thread where there are few rows, but several at once with several."""
        self.weight_PIO = weight_IO.reshape(len(weight_IO), self.parts, -1).transpose(0, 1).contiguous()

    def __call__(self, x_BI: Tensor) -> Tensor:
        if self.packed_OI is not None:
            return products.onednn(x_BI, self.packed_OI, self.bias_O)
        if self.parts == 1:
            weight_IO = self.weight_PIO[0]
            return x_BI @ weight_IO if self.bias_O is None else torch.addmm(self.bias_O, x_BI, weight_IO)
        y_PBO = torch.bmm(x_BI.expand(self.parts, -1, -1), self.weight_PIO)
        y_BO = y_PBO.transpose(0, 1).reshape(len(x_BI), -1)
        return y_BO if self.bias_O is None else y_BO.add_(self.bias_O)


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
        if not isinstance(self.norm, RMSNorm):
            y_BD: Tensor = self.norm(x_BD)
            return y_BD
        squares_B1 = torch.linalg.vecdot(x_BD, x_BD).unsqueeze(1)
        rate_B1 = torch.add(self.eps, squares_B1, alpha=1 / self.width).rsqrt_()
        normed_BD = x_BD * rate_B1
        return normed_BD if self.gain_D is None else normed_BD.mul_(self.gain_D)


def with_gain(weight_OI: Tensor, norm: nn.Module) -> Tensor:
    """The matrix that gives for a normed vector without gain what ``weight_OI`` gives for one with it."""
    return weight_OI * norm.weight if isinstance(norm, RMSNorm) else weight_OI


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
    def of(cls, block: Block, batch: int) -> Layer:
        attention, feed_forward = block.attention, block.feed_forward
        rise = feed_forward.gate_up if feed_forward.gated else feed_forward.up
        qkv_weight, rise_weight = attention.qkv.weight, rise.weight
        if block.pre_norm:
            qkv_weight = with_gain(qkv_weight, block.attention_norm)
            rise_weight = with_gain(rise_weight, block.feed_forward_norm)
        return cls(
            Norm(block.attention_norm, gain=not block.pre_norm),
            Product(qkv_weight, attention.qkv.bias, batch),
            Product(attention.out.weight, attention.out.bias, batch),
            Norm(block.feed_forward_norm, gain=not block.pre_norm),
            Product(rise_weight, rise.bias, batch),
            Product(feed_forward.down.weight, feed_forward.down.bias, batch),
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
        self.layers = [Layer.of(block, batch) for block in model.blocks]  # type: ignore[arg-type]
        self.head = Product(with_gain(head.weight, model.final_norm), head.bias, batch)
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
        layers = zip(
            self.layers,
            cache.keys_LBKSC[:, :, :, : position + 1].unbind(0),
            cache.keys_LBKSC[:, :, :, position].unbind(0),
            cache.values_LBKSC[:, :, :, : position + 1].unbind(0),
            cache.values_LBKSC[:, :, :, position].unbind(0),
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
        x_BD = self.model.embedding.weight[tokens_B]
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
        keys_BKTC: Tensor,
        key_BKC: Tensor,
        values_BKTC: Tensor,
        value_BKC: Tensor,
    ) -> Tensor:
        """What each query sees (B, H x C). New key and value are written to their place, which is the last of the T."""
        batch, heads, kv_heads = len(qkv_BM), self.num_heads, self.num_kv_heads
        qk_BHC, v_BKC = qkv_BM.view(batch, heads + 2 * kv_heads, -1).split_with_sizes((heads + kv_heads, kv_heads), 1)
        if turn is not None:
            cos_C, sin_C = turn
            qk_BHC = torch.addcmul(qk_BHC * cos_C, qk_BHC.roll(qk_BHC.shape[2] // 2, -1), sin_C)
        q_BHC, k_BKC = qk_BHC.split_with_sizes((heads, kv_heads), 1)
        key_BKC.copy_(k_BKC)
        value_BKC.copy_(v_BKC)
        if batch < MIN_TEXTS:
            seen_BHTC = F.scaled_dot_product_attention(
                q_BHC.unsqueeze(2), keys_BKTC, values_BKTC, enable_gqa=kv_heads != heads
            )
            return seen_BHTC.reshape(batch, -1)
        # G = H / K queries share a key
        q_NGC = q_BHC.reshape(batch * kv_heads, heads // kv_heads, -1).mul(self.config.channels**-0.5)
        share_NGT = torch.bmm(q_NGC, keys_BKTC.flatten(0, 1).transpose(1, 2))
        torch.softmax(share_NGT, 2, out=share_NGT)
        return torch.bmm(share_NGT, values_BKTC.flatten(0, 1)).view(batch, -1)

    def _activate(self, up_BF: Tensor) -> Tensor:
        if not self.config.gated:
            return activate(self.config.activation, up_BF)
        gate_BF, up_BF = up_BF.chunk(2, 1)
        return activate(self.config.activation, gate_BF).mul_(up_BF)


__all__ = ["MIN_TOKENS", "TokenStep", "token_step"]
