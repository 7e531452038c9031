"""Continue a prompt with a model: one pass over the prompt, then one token at a time with the model's state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmkit.config.generation import SamplingConfig
from lmkit.config.machine import Precision
from lmkit.console import Console
from lmkit.device import Device, attention_of_any_shape
from lmkit.models.base import LanguageModel
from lmkit.models.stepping import MIN_TOKENS, TokenStep, token_step
from lmkit.sampling import sample, uniforms
from lmkit.tokenizers import Tokenizer

MAX_BATCH = 32
"""Samples decoded at once; each has its own cache."""
READ_TOKENS = 4096
"""A longer prompt is read in pieces: at once an LSTM would take some ten kilobytes for each of its tokens."""
MAX_NAMED_CHARS = 200
"""A text in another language than the vocabulary's has as many unknown words as words."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it."""

    text: str
    """The prompt; for word tokenizers without blanks at its end, since the next word brings its own."""
    ids: list[int]
    """What the model reads: eos and the prompt's tokens, or as many of the last tokens as fit."""
    text_ids: list[int]
    """Those of them that stand for text of the prompt."""
    num_dropped: int
    """Tokens of the prompt cut from the left because they do not fit into the context."""


@dataclass(frozen=True)
class Sample:
    """One continuation."""

    text: str
    """The generated text, without the prompt."""
    num_tokens: int
    finish: str
    """Why it ended: ``length``, ``stop`` (a stop string) or ``eos``."""


def read_prompt(tokenizer: Tokenizer, text: str, *, context: int | None, max_new_tokens: int) -> Prompt:
    """Encode a prompt; the model reads it behind an eos, so that it begins a text (and an empty one is possible).

    If eos and prompt are more than ``context`` tokens, only ``last_to_read`` of the prompt are read.
    """
    if tokenizer.ends_lines:
        text = text.rstrip(" \t")
    tokens = [int(i) for i in tokenizer.encode(text)]
    if context is None or 1 + len(tokens) <= context:
        return Prompt(text, [tokenizer.eos_id, *tokens], tokens, 0)
    kept = last_to_read(tokens, context, max_new_tokens)
    return Prompt(text, kept, kept, len(tokens) - len(kept))


def unknown_words(tokenizer: Tokenizer, text: str) -> list[str]:
    """Words of a text (or characters, where these are the tokens) that the tokenizer does not know, each once."""
    if tokenizer.unk_id is None or tokenizer.unk_id not in tokenizer.encode(text):
        return []
    units = list(text) if tokenizer.kind == "char" else text.split()
    return [u for u in dict.fromkeys(units) if u != "<unk>" and tokenizer.unk_id in tokenizer.encode(u)]


def warn_of_unknown(tokenizer: Tokenizer, text: str, console: Console) -> None:
    """Name the ``unknown_words`` of a text, of many the first ones."""
    if unknown := unknown_words(tokenizer, text):
        named = " ".join(unknown)
        more = f" ... ({len(unknown):,} in all)" if len(named) > MAX_NAMED_CHARS else ""
        console.warn(f"not in the vocabulary, read as <unk>: {named[:MAX_NAMED_CHARS]}{more}")


def last_to_read(tokens: list[int], context: int, max_new_tokens: int) -> list[int]:
    """The last of too many tokens: as many as leave room for the new ones, but at least half the context."""
    return tokens[-max(context + 1 - max(max_new_tokens, 1), context // 2, 1) :]


@torch.inference_mode()
@attention_of_any_shape()
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
    context: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> list[Sample]:
    """Draw ``num_samples`` continuations of one prompt; each depends on (seed, prompt_index, its number) only.

    ``on_text`` is given the text of the first sample as it grows: whole characters, none of which can still become part
    of a stop string. ``context`` limits what a model with a limited context sees (null: the model's own). Such a model
    goes on past it: when its cache is full, the last half of the context is read again as the new start. Raises
    DivergedError if logits are not finite.
    """
    limit = model.context if context is None else context
    model.eval()
    plain_cpu = device.torch_device.type == "cpu" and device.precision is Precision.fp32
    step = (
        token_step(model, min(num_samples, MAX_BATCH), max_new_tokens)
        if plain_cpu and max_new_tokens >= MIN_TOKENS
        else None
    )
    samples = []
    for first in range(0, num_samples, MAX_BATCH):
        numbers = list(range(first, min(first + MAX_BATCH, num_samples)))
        writers = going_on = [_Writer(tokenizer, prompt, stop) for _ in numbers]
        if on_text is not None and first == 0:
            writers[0].on_text = on_text
        decoding = _Decoding(model, step, device, prompt, len(numbers), limit, sampling)
        eos_id = None if tokenizer.ends_lines or not stop_at_eos else tokenizer.eos_id
        for position in range(max_new_tokens):
            tokens_B = decoding.next(uniforms(seed, prompt_index, numbers, position))
            for writer, token in zip(going_on, tokens_B, strict=True):
                writer.push(token, eos_id)
            rows = [row for row, writer in enumerate(going_on) if writer.finish is None]
            if not rows:
                break
            if 2 * len(rows) <= len(going_on):  # so that all copies together are no more than one of all rows
                decoding.keep(rows)
                numbers, going_on = [numbers[row] for row in rows], [going_on[row] for row in rows]
        samples += [writer.close() for writer in writers]
    return samples


class _Decoding:
    """B continuations of one prompt, a token at a time: the prompt is read once, then each token with the state."""

    def __init__(
        self,
        model: LanguageModel,
        step: TokenStep | None,
        device: Device,
        prompt: Prompt,
        batch: int,
        context: int | None,
        sampling: SamplingConfig,
    ) -> None:
        self.step = step
        self.model, self.device, self.context, self.sampling, self.batch = model, device, context, sampling, batch
        # Apple's GPU has no float64, which the draw needs.
        on_cpu = device.torch_device.type == "mps"
        self.sampling_device = torch.device("cpu") if on_cpu else device.torch_device
        self.state: Any = None
        self.num_cached = 0
        self.unread_BT = torch.tensor([prompt.ids], device=device.torch_device)
        self.recent = [self.unread_BT.expand(batch, -1)]
        """What has been read since the context was last cut, in pieces (B, T); kept for a model with a limited one."""
        self.seen_BV: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self.seen_BV = torch.zeros(batch, model.vocab_size, dtype=torch.bool, device=self.sampling_device)
            self.seen_BV[:, torch.tensor(prompt.text_ids, dtype=torch.int64, device=self.sampling_device)] = True

    def next(self, uniforms_B: Tensor) -> list[int]:
        """Draw and remember one token of each."""
        if self.context is not None and self.num_cached + self.unread_BT.shape[1] > self.context:
            self.state, self.num_cached = None, 0
            self.unread_BT = torch.cat(self.recent, 1)[:, -max(1, self.context // 2) :]
            self.recent = [self.unread_BT]
        if self.step is not None and self.state is not None:
            logits_BV, self.state = self.step(self.unread_BT[:, 0], self.state)
        else:
            with self.device.autocast():
                for piece_BT in torch.split(self.unread_BT, self.context or READ_TOKENS, 1):
                    hidden_BTD, self.state = self.model(piece_BT, self.state, use_state=True)
                logits_BV = self.model.head.logits(hidden_BTD[:, -1])
        self.num_cached += self.unread_BT.shape[1]
        if len(logits_BV) < self.batch:
            rows_B = torch.zeros(self.batch, dtype=torch.int64, device=logits_BV.device)
            self.state, logits_BV = self.state.select(rows_B), logits_BV[rows_B]
        next_B = sample(
            logits_BV.to(self.sampling_device), self.sampling, uniforms_B.to(self.sampling_device), self.seen_BV
        )
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, next_B[:, None], True)
        self.unread_BT = next_B[:, None].to(self.device.torch_device)
        if self.context is not None:
            self.recent.append(self.unread_BT)
        return next_B.tolist()

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone."""
        self.batch = len(rows)
        self.state = self.state.select(torch.tensor(rows, device=self.device.torch_device))
        self.unread_BT = self.unread_BT[rows]
        self.recent = [torch.cat(self.recent, 1)[rows]]
        if self.seen_BV is not None:
            self.seen_BV = self.seen_BV[rows]


class _Writer:
    """The text of one sample: whole characters only, and nothing that may yet turn out to be a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, stop: Sequence[str]) -> None:
        self.decoder = tokenizer.decoder()
        self.decoder.skip(prompt.text_ids)
        self.stop = [text for text in stop if text]
        self.text = ""
        self.held = ""
        self.num_tokens = 0
        self.finish: str | None = None
        self.on_text: Callable[[str], None] | None = None

    def push(self, token: int, eos_id: int | None) -> None:
        """Add a token, unless the sample has ended."""
        if self.finish is not None:
            return
        if token == eos_id:
            self._end("eos")
        else:
            self.num_tokens += 1
            self._release(self.decoder.push(token), everything=False)

    def close(self) -> Sample:
        """The sample; if nothing else has ended it, its length has."""
        if self.finish is None:
            self._end("length")
        return Sample(self.text, self.num_tokens, self.finish or "length")

    def _end(self, reason: str) -> None:
        self._release(self.decoder.flush(), everything=True)
        self.finish = self.finish or reason

    def _release(self, new: str, *, everything: bool) -> None:
        pending = self.held + new
        found = [(cut + len(text), cut) for text in self.stop if (cut := pending.find(text)) >= 0]
        if found:  # the one that is complete first ends the text, however much of it a token brings
            self.finish = "stop"
            ready, self.held = pending[: min(found)[1]], ""
        else:
            keep = 0 if everything else max((_overlap(pending, text) for text in self.stop), default=0)
            ready, self.held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += ready
        if ready and self.on_text is not None:
            self.on_text(ready)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
