"""A Transformer whose attention reaches over the edges of segments into the keys and values of the tokens before.

As Transformer-XL (Dai et al. 2019, section 3.2) it carries a memory without gradient from segment to segment. Ours
differs: positions are relative by rotation (Su et al. 2021) in place of learned relative terms; the memory holds keys
and values before their rotation, not hidden vectors, so that nothing is projected twice; and each token sees exactly
the ``memory_tokens`` before it (a sliding window), wherever a segment begins. A text read in pieces of any length has
therefore the same hidden vectors as one read at once.

More shape letters here: M slots of the memory, S = M + T keys that a segment attends over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lmkit.config.model import TransformerConfig
from lmkit.models.base import State
from lmkit.models.by_hand import attention
from lmkit.models.positions import rotary_tables, rotate
from lmkit.models.transformer import Attention, Transformer


@dataclass(frozen=True)
class KVMemory(State):
    """Keys (not rotated) and values of the last M tokens, the newest last."""

    keys_LBKMC: Tensor
    values_LBKMC: Tensor
    filled_B: Tensor
    """int64, how many slots of each row hold a token; the others come first and are not looked at."""

    def detach(self) -> KVMemory:
        return KVMemory(self.keys_LBKMC.detach(), self.values_LBKMC.detach(), self.filled_B)

    def select(self, rows: Tensor) -> KVMemory:
        return KVMemory(self.keys_LBKMC[:, rows], self.values_LBKMC[:, rows], self.filled_B[rows])

    def tensors(self) -> dict[str, Tensor]:
        """Rows first; all zero is the empty memory."""
        keys, values = (t.transpose(0, 1).contiguous() for t in (self.keys_LBKMC, self.values_LBKMC))
        return {"keys": keys, "values": values, "filled": self.filled_B}


class MemoryTransformer(Transformer):
    """Transformer with a carried memory; ``context`` is the longest segment that it reads in one pass."""

    def __init__(self, config: TransformerConfig, vocab_size: int, *, seed: int) -> None:
        super().__init__(config, vocab_size, seed=seed)
        self.context = None
        self.receptive_field = config.num_layers * config.memory_tokens + 1
        for block in self.blocks:
            block.attention = MemoryAttention(config)
        self._initialise(seed)

    def _add_tables(self) -> None:
        config = self.config
        cos_SC, sin_SC = rotary_tables(config.memory_tokens + config.context, config.channels, config.rope_theta)
        self.register_buffer("cos_TC", cos_SC, persistent=False)
        self.register_buffer("sin_TC", sin_SC, persistent=False)

    def forward(  # type: ignore[override]
        self,
        tokens_BT: Tensor,
        state: KVMemory | None = None,
        *,
        use_state: bool = False,
        segments_BT: Tensor | None = None,
    ) -> tuple[Tensor, KVMemory]:
        """As LanguageModel.forward; the state is always returned. Rows of several texts are a ValueError."""
        if segments_BT is not None:
            raise ValueError("a model with a memory reads one text a row")
        pieces = []
        state = self._empty_memory(tokens_BT) if state is None else state
        for piece_BT in torch.split(tokens_BT, self.config.context, 1):
            hidden_BTD, state = self._read(piece_BT, state)
            pieces.append(hidden_BTD)
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)), state

    def _read(self, tokens_BT: Tensor, state: KVMemory) -> tuple[Tensor, KVMemory]:
        """Hidden vectors of one segment, and the memory after it."""
        length, memory = tokens_BT.shape[1], self.config.memory_tokens
        x_BTD = self._embed(tokens_BT)
        if self.config.scale_embeddings:
            x_BTD = x_BTD * math.sqrt(self.config.d_model)
        x_BTD = self.dropout(x_BTD)
        rotary = (self.cos_TC[: memory + length], self.sin_TC[: memory + length])
        mask_B1TS = window_mask(state.filled_B, memory, length)
        keys, values = state.keys_LBKMC.clone(), state.values_LBKMC.clone()
        for layer, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rotary, (keys[layer], values[layer]), 0, mask_B1TS)
        filled_B = (state.filled_B + length).clamp(max=memory)
        return self.final_norm(x_BTD), KVMemory(keys, values, filled_B)

    def _empty_memory(self, tokens_BT: Tensor) -> KVMemory:
        empty = self._empty_cache(tokens_BT)
        keys, values = (F.pad(t, (0, 0, 0, self.config.memory_tokens)) for t in (empty.keys_LBKSC, empty.values_LBKSC))
        return KVMemory(keys, values, torch.zeros(len(tokens_BT), dtype=torch.int64, device=tokens_BT.device))

    def state_from_tensors(self, tensors: dict[str, Tensor]) -> KVMemory:
        """The inverse of KVMemory.tensors."""
        keys, values = (tensors[name].transpose(0, 1) for name in ("keys", "values"))
        return KVMemory(keys, values, tensors["filled"].to(torch.int64))


class MemoryAttention(Attention):
    """Attention over the memory and the segment."""

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cached: tuple[Tensor, Tensor] | None,
        start: int,
        mask_B1TT: Tensor | None = None,
        gain_D: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D). ``cached``: the layer's memory, into which that after the segment is written.

        rotary: of S positions; mask: (B, 1, T, S), True where a token may look.
        """
        assert rotary is not None
        assert cached is not None
        q_BHTC, k_BKTC, v_BKTC = self._project(x_BTD, gain_D, None, trains=False)
        k_BKSC, v_BKSC = (
            torch.cat([old.to(new.dtype), new], 2) for old, new in zip(cached, (k_BKTC, v_BKTC), strict=True)
        )
        for buffer, new in zip(cached, (k_BKSC, v_BKSC), strict=True):
            buffer.copy_(new[:, :, new.shape[2] - buffer.shape[2] :].detach())
        cos_SC, sin_SC = rotary
        length = x_BTD.shape[1]
        y_BHTC = attention(
            rotate(q_BHTC, cos_SC[-length:], sin_SC[-length:]),
            rotate(k_BKSC, cos_SC, sin_SC),
            v_BKSC,
            attn_mask=mask_B1TT,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        y_BTD: Tensor = self.out(y_BHTC.transpose(1, 2).flatten(2))
        return y_BTD


def window_mask(filled_B: Tensor, memory: int, length: int) -> Tensor:
    """(B, 1, T, S): whether token t may look at slot s: itself and the filled ones of the ``memory`` before it."""
    slots_S = torch.arange(memory + length, device=filled_B.device)
    back_TS = memory + torch.arange(length, device=filled_B.device)[:, None] - slots_S
    window_TS = (back_TS >= 0) & (back_TS <= memory)
    filled_BS = slots_S >= memory - filled_B[:, None]
    return window_TS & filled_BS[:, None, None]
