"""Continue a prompt with a model: one pass over the prompt, then one token at a time with the model's state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmkit.config.commands import SamplingConfig
from lmkit.device import Device
from lmkit.models.base import LanguageModel
from lmkit.sampling import sample, uniforms
from lmkit.tokenizers import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it."""

    text: str
    ids: list[int]
    """The conditioning eos and the prompt's tokens, at most as many as fit."""
    num_dropped: int
    """Tokens cut from the left because they do not fit into the model's context."""
    unknown: list[str]
    """Words (or characters) that the tokenizer does not know."""


@dataclass(frozen=True)
class Sample:
    """One continuation."""

    text: str
    """The generated text, without the prompt."""
    num_tokens: int
    finish: str
    """Why it ended: ``length``, ``stop`` (a stop string) or ``eos``."""


def read_prompt(tokenizer: Tokenizer, text: str, *, context: int | None, max_new_tokens: int) -> Prompt:
    """Encode a prompt. Of one that is too long for the context the last tokens are kept, so many that the new tokens
    fit as well, but at least half the context."""
    ids = [tokenizer.eos_id, *(int(i) for i in tokenizer.encode(text))]
    unknown = []
    if tokenizer.unk_id is not None and tokenizer.unk_id in ids:
        units = text.split() if tokenizer.ends_lines else list(text)
        unknown = [u for u in dict.fromkeys(units) if u != "<unk>" and tokenizer.unk_id in tokenizer.encode(u)]
    kept = ids
    if context is not None and len(ids) > context - 1:
        kept = ids[-max(context - max_new_tokens, context // 2, 1) :]
    return Prompt(text, kept, len(ids) - len(kept), unknown)


@torch.inference_mode()
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    sampling: SamplingConfig,
    device: Device,
    max_new_tokens: int,
    num_samples: int = 1,
    stop: Sequence[str] = (),
    stop_at_eos: bool = True,
    seed: int = 1,
    prompt_index: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> list[Sample]:
    """Draw ``num_samples`` continuations of one prompt; each depends on (seed, prompt_index, its number) only.

    ``on_text`` is given the text of the first sample as it grows, in whole characters. A model with a limited context
    goes on past it: when its cache is full, the last half of the context is read again as the new start.
    """
    writers = [_Writer(tokenizer, prompt.ids, stop) for _ in range(num_samples)]
    if max_new_tokens == 0:
        return [writer.finish("length") for writer in writers]
    where = device.torch_device
    ids_BT = torch.tensor([prompt.ids] * num_samples, dtype=torch.int64)
    seen_BV: Tensor | None = None
    if sampling.repetition_penalty != 1.0:
        seen_BV = torch.zeros(num_samples, model.vocab_size, dtype=torch.bool)
        seen_BV.scatter_(1, ids_BT, True)
        seen_BV = seen_BV.to(where)
    eos_id = None if tokenizer.ends_lines or not stop_at_eos else tokenizer.eos_id
    model.eval()
    state: Any = None
    cached = 0
    unread_BT = ids_BT[:1]
    for position in range(max_new_tokens):
        if model.context is not None and cached + unread_BT.shape[1] > model.context:
            state, cached, unread_BT = None, 0, ids_BT[:, -max(1, model.context // 2) :]
        with device.autocast():
            hidden_BTD, state = model(unread_BT.to(where), state, use_state=True)
            logits_BV = model.head.logits(hidden_BTD[:, -1])
        cached += unread_BT.shape[1]
        if len(logits_BV) < num_samples:
            state = state.select(torch.zeros(num_samples, dtype=torch.int64, device=where))
            logits_BV = logits_BV.expand(num_samples, -1)
        next_B = sample(logits_BV, sampling, uniforms(seed, prompt_index, num_samples, position).to(where), seen_BV)
        if seen_BV is not None:
            seen_BV.scatter_(1, next_B[:, None], True)
        unread_BT = next_B[:, None].cpu()
        ids_BT = torch.cat([ids_BT, unread_BT], 1) if model.context is not None else ids_BT
        for writer, token in zip(writers, unread_BT[:, 0].tolist(), strict=True):
            new = writer.push(token, eos_id)
            if writer is writers[0] and on_text is not None and new:
                on_text(new)
        if all(writer.done for writer in writers):
            break
    samples = []
    for writer in writers:
        before = len(writer.text)
        samples.append(writer.finish("length"))
        if writer is writers[0] and on_text is not None and writer.text[before:]:
            on_text(writer.text[before:])
    return samples


class _Writer:
    """The text of one sample: whole characters only, and nothing that may yet turn out to be a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self.decoder = tokenizer.decoder()
        for token in prompt_ids[1:]:
            self.decoder.push(token)
        self.stop = [text for text in stop if text]
        self.text = ""
        self.held = ""
        self.num_tokens = 0
        self.done: str | None = None

    def push(self, token: int, eos_id: int | None) -> str:
        """Add a token; return the text that is now certain."""
        if self.done is not None:
            return ""
        if token == eos_id:
            self.done = "eos"
            return self._release(self.decoder.flush(), everything=True)
        self.num_tokens += 1
        return self._release(self.decoder.push(token), everything=False)

    def finish(self, reason: str) -> Sample:
        """End the sample, if it has not ended yet, with ``reason``."""
        if self.done is None:
            self._release(self.decoder.flush(), everything=True)
            self.done = self.done or reason
        return Sample(self.text, self.num_tokens, self.done)

    def _release(self, new: str, *, everything: bool) -> str:
        pending = self.held + new
        cuts = [cut for cut in (pending.find(text) for text in self.stop) if cut >= 0]
        if cuts:
            self.done = "stop"
            ready, self.held = pending[: min(cuts)], ""
        else:
            keep = 0 if everything else max((_overlap(pending, text) for text in self.stop), default=0)
            ready, self.held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += ready
        return ready


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


__all__ = ["Prompt", "Sample", "generate", "read_prompt"]
