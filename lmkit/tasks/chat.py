"""What ``task=instruct`` and ``task=prefer`` share: the template of a run, the encoding of examples, greedy answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from lmkit.config.chat import ChatTaskConfig, TooLong
from lmkit.config.plain import from_plain
from lmkit.config.tasks import TaskConfig
from lmkit.console import Console
from lmkit.data.chat import ChatTemplate, Conversation, Encoded
from lmkit.data.conversations import fitted
from lmkit.device import Device, attention_of_any_shape
from lmkit.errors import CheckpointError, ConfigError, DataError
from lmkit.loading import LoadedRun
from lmkit.models.base import LanguageModel
from lmkit.tokenizers import Tokenizer
from lmkit.tokenizers.base import UNK

Config = TypeVar("Config", bound=ChatTaskConfig)


def template_of_run(loaded: LoadedRun) -> ChatTemplate | None:
    """The chat template that a run was finetuned with; None if it was not finetuned for conversations."""
    config = _chat_config(loaded)
    return None if config is None else ChatTemplate.of(config)


def with_template(config: Config, base: LoadedRun) -> Config:
    """The configuration with its template written out: without one of its own that of the run started from."""
    if config.template is not None:
        return config
    before = _chat_config(base)
    if before is None:
        return replace(config, template="plain")
    return replace(
        config,
        template=before.template,
        system_template=config.system_template or before.system_template,
        system=before.system if config.system is None else config.system,
    )


def _chat_config(loaded: LoadedRun) -> ChatTaskConfig | None:
    stored = loaded.config.get("task")
    if not isinstance(stored, dict):
        return None
    try:
        config = from_plain(TaskConfig, stored, where="task")
    except ConfigError as error:
        raise CheckpointError(f"{loaded.checkpoint}/config.json does not describe a run: {error}") from None
    return config if isinstance(config, ChatTaskConfig) else None


def encode_all(
    conversations: Sequence[Conversation],
    template: ChatTemplate,
    base: LoadedRun,
    *,
    seq_len: int,
    policy: TooLong,
    split: str,
    console: Console,
) -> list[Encoded | None]:
    """Each conversation as tokens, at most ``seq_len`` of them; None for one that is left out. Says what was done.

    Raises DataError if one is too long under TooLong.error, or if none is left.
    """
    tokenizer = base.tokenizer
    found: list[Encoded | None] = []
    unknown = unknown_prompts = 0
    for conversation in conversations:
        encoded = template.encode(conversation, tokenizer)
        in_answers, in_prompts = _num_unknown(encoded, conversation, template, tokenizer)
        unknown, unknown_prompts = unknown + (in_answers > 0), unknown_prompts + (in_prompts > 0)
        try:
            found.append(fitted(encoded, seq_len, policy))
        except ValueError as error:
            text = conversation.turns[0].prompt[:60]
            raise DataError(
                f"the {split} example that begins {text!r} is too long: {error}",
                "raise train.seq_len, or set task.truncation to drop, left or right",
            ) from None
    left_out, cut = found.count(None), sum(one is not None and one.cut for one in found)
    if left_out == len(found):
        raise DataError(f"no {split} example fits into train.seq_len={seq_len}", "raise train.seq_len")
    if left_out or cut:
        console.warn(f"{split}: of {len(found)} examples {cut} were cut and {left_out} left out (task.truncation)")
    if unknown:
        console.warn(f"{split}: {unknown} answers hold text that the tokenizer does not know, learnt as <unk>")
    if unknown_prompts:
        console.warn(f"{split}: {unknown_prompts} prompts hold text that the tokenizer does not know, read as <unk>")
    return found


def _num_unknown(
    encoded: Encoded, conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer
) -> tuple[int, int]:
    """Tokens of the answers, and of the rest, that stand for what the tokenizer does not know."""
    found = [learnt for i, learnt in zip(encoded.ids, encoded.learnt, strict=True) if i == tokenizer.unk_id]
    in_answers, in_prompts = found.count(True), found.count(False)
    if found and tokenizer.ends_lines:  # there <unk> is a word that a text may hold
        turns, system = conversation.turns, conversation.system
        in_answers -= sum(turn.response.split().count(UNK) for turn in turns)
        in_prompts -= sum(turn.prompt.split().count(UNK) for turn in turns)
        in_prompts -= ((template.system if system is None else system) or "").split().count(UNK)
    return in_answers, in_prompts


@torch.no_grad()
@attention_of_any_shape()
def greedy_answers(
    model: LanguageModel,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    *,
    eos_id: int,
    device: Device,
    batch_size: int,
    progress: Callable[[int], None],
) -> list[list[int] | None]:
    """The most probable next token again and again, up to ``eos_id``, which is left out; None if it did not come.

    limits: tokens at most, the end token included. Prompts of one length are answered side by side.
    """
    model.eval()
    groups: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[len(prompt)].append(index)
    answers: list[list[int] | None] = [None] * len(prompts)
    for length in sorted(groups):
        for first in range(0, len(groups[length]), batch_size):
            group = groups[length][first : first + batch_size]
            tokens_BT = torch.tensor([prompts[i] for i in group], device=device.torch_device)
            written = _continue(model, tokens_BT, max(limits[i] for i in group), eos_id, device)
            for i, row in zip(group, written, strict=True):
                answers[i] = row[: row.index(eos_id)] if eos_id in row[: limits[i]] else None
            progress(len(group))
    return answers


def _continue(model: LanguageModel, tokens_BT: Tensor, limit: int, eos_id: int, device: Device) -> list[list[int]]:
    """Up to ``limit`` greedy tokens of each row, until each has had an eos; at most what the context holds."""
    if model.context is not None:
        limit = min(limit, model.context + 1 - tokens_BT.shape[1])
    state = None
    new: list[Tensor] = []
    ended_B = torch.zeros(len(tokens_BT), dtype=torch.bool, device=device.torch_device)
    for _ in range(limit):
        with device.autocast():
            hidden_BTD, state = model(tokens_BT, state, use_state=True)
            next_B = model.head.logits(hidden_BTD[:, -1]).argmax(1)
        new.append(next_B)
        ended_B |= next_B == eos_id
        if ended_B.all():
            break
        tokens_BT = next_B[:, None]
    rows: list[list[int]] = torch.stack(new, 1).tolist() if new else [[] for _ in range(len(tokens_BT))]
    return rows
