"""Conversations from rows, and the batches of ``task=instruct``: token ids, what of them is learnt, rows filled up."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lmkit.config.chat import ChatTaskConfig, InstructTaskConfig, TooLong
from lmkit.data.batches import to_device
from lmkit.data.chat import Conversation, Encoded, Turn
from lmkit.data.order import epoch_rows
from lmkit.data.rows import Record, as_text, read_records
from lmkit.errors import DataError
from lmkit.models.base import IGNORE

T = TypeVar("T", bound=Hashable)


def conversation_of(record: Record, config: InstructTaskConfig) -> Conversation:
    """The conversation of a row. Raises DataError, naming the row, for whatever is none."""
    if config.messages is None:
        return Conversation((Turn(record.text(config.prompt), answer_of(record, config.response)),))
    if config.messages not in record.values:
        record.text(config.messages)
    messages = record.values[config.messages]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{record.where}, column '{config.messages}' is no list of messages", "repair the row")
    texts = [_message(message, f"{record.where}, message {i}") for i, message in enumerate(messages, start=1)]
    system = texts.pop(0)[1] if texts[0][0] == "system" else None
    roles = [role for role, _ in texts]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise DataError(
            f"{record.where}: the roles are {', '.join(roles)[:100] or 'system only'}",
            "user and assistant must take turns, after at most one system message, and the assistant speaks last",
        )
    for number, (role, text) in enumerate(texts, start=1):
        if role == "assistant" and not text.strip():
            raise DataError(f"{record.where}: answer {number // 2} is empty", "repair or remove the row")
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return Conversation(tuple(Turn(user[1], answer[1]) for user, answer in pairs), system)


def _message(message: Any, where: str) -> tuple[str, str]:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise DataError(f"{where} has no role and content", "repair the row")
    return as_text(message["role"], f"{where}, role"), as_text(message["content"], f"{where}, content")


def answer_of(record: Record, column: str) -> str:
    """The text of a column that must not be empty."""
    text = record.text(column)
    if not text.strip():
        raise DataError(f"{record.where}, column '{column}' is empty", "repair or remove the row")
    return text


def read_splits(config: ChatTaskConfig, make: Callable[[Record], T]) -> tuple[list[T], list[T]]:
    """(train, valid) examples. Equal examples are never in both where valid is held out from train.

    Raises DataError for rows that are not as they should be, or if train or valid would be empty.
    """
    train = [make(record) for record in read_records(config.data)]
    if config.valid is not None:
        return train, [make(record) for record in read_records(config.valid, "validation")]
    ranked = sorted(set(train), key=lambda example: hashlib.sha256(repr(example).encode()).digest())
    if len(ranked) < 2:
        raise DataError(f"{config.data} has only one example, so that none can be held out", "set task.valid=FILE")
    held_out = set(ranked[: max(1, round(config.valid_fraction * len(ranked)))])
    return [e for e in train if e not in held_out], [e for e in train if e in held_out]


def fitted(encoded: Encoded, seq_len: int, policy: TooLong) -> Encoded | None:
    """The example, cut to what ``seq_len`` inputs hold; None if it is left out: too long, or no answer is left.

    Cut at the left it still begins with the end token. Raises ValueError under TooLong.error.
    """
    excess = len(encoded.ids) - 1 - seq_len
    if excess <= 0:
        return encoded
    if policy is TooLong.error:
        raise ValueError(f"{len(encoded.ids) - 1} tokens do not fit into train.seq_len={seq_len}")
    if policy is TooLong.drop:
        return None
    if policy is TooLong.left:
        ids, learnt = [encoded.ids[0], *encoded.ids[1 + excess :]], [False, *encoded.learnt[1 + excess :]]
    else:
        ids, learnt = encoded.ids[: seq_len + 1], encoded.learnt[: seq_len + 1]
    return Encoded(ids, learnt, cut=True) if any(learnt) else None


def packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Examples (indices) put into rows of at most ``room`` tokens, the longest first, each where it fits best.

    Best fit decreasing: at most 11/9 of the fewest rows possible, and one more (Johnson 1973).
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(free, (lengths[index], -1))
        if at < len(free):
            left, row = free.pop(at)
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(free, (left - lengths[index], row))
    return rows


@dataclass(frozen=True)
class ChatBatch:
    """Rows of one or several examples, padded on the right. Fulfils TrainingBatch."""

    inputs_BT: Tensor
    """int64."""
    targets_BT: Tensor
    """int64: the token after each input if it is of an answer, else IGNORE."""
    segments_BT: Tensor | None
    """int64: number of the example that each input is of; None if a row holds one."""
    scored_N: Tensor | None = None
    """int64: which of the B x T targets are not IGNORE; only in what was cut."""

    starts_text = True

    @property
    def num_rows(self) -> int:
        """Rows."""
        return len(self.inputs_BT)

    @property
    def num_targets(self) -> int:
        """Tokens of answers."""
        return int((self.targets_BT != IGNORE).sum())

    def cut(self, rows: slice, device: torch.device) -> ChatBatch:
        """These rows, on the device."""
        inputs_BT, targets_BT = (to_device(t[rows], device) for t in (self.inputs_BT, self.targets_BT))
        segments_BT = None if self.segments_BT is None else to_device(self.segments_BT[rows], device)
        scored_N = (self.targets_BT[rows].reshape(-1) != IGNORE).nonzero().squeeze(1)
        return ChatBatch(inputs_BT, targets_BT, segments_BT, to_device(scored_N, device))

    def rows(self, decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
        """The learnt tokens of each row as ids; the text is all of the row."""
        found = []
        pairs = zip(self.inputs_BT.tolist(), self.targets_BT.tolist(), strict=True)
        for row, (inputs, targets) in enumerate(pairs):
            found.append({"row": row, "text": decode(inputs), "ids": [i for i in targets if i != IGNORE]})
        return found


def chat_batch(rows: Sequence[Sequence[Encoded]], pad_id: int, *, packing: bool) -> ChatBatch:
    """The batch of these rows of examples, as wide as the widest of them. ``packing``: with numbers of segments."""
    width = max(sum(len(e.ids) - 1 for e in row) for row in rows)
    inputs = np.full((len(rows), width), pad_id, dtype=np.int64)
    targets = np.full((len(rows), width), IGNORE, dtype=np.int64)
    segments = np.full((len(rows), width), -1, dtype=np.int64)
    for b, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row):
            span = slice(start, start := start + len(example.ids) - 1)
            inputs[b, span] = example.ids[:-1]
            targets[b, span] = np.where(example.learnt[1:], example.ids[1:], IGNORE)
            segments[b, span] = number
    segments_BT = torch.from_numpy(segments) if packing else None
    return ChatBatch(torch.from_numpy(inputs), torch.from_numpy(targets), segments_BT)


class ChatBatches:
    """All examples once an epoch, in a random order of rows; a function of (examples, sizes, seed) and the step.

    The last batch of an epoch may be smaller. Which examples share a row is the same in every epoch.
    """

    def __init__(
        self, examples: Sequence[Encoded], pad_id: int, *, batch_size: int, room: int | None, seed: int
    ) -> None:
        """room: tokens of a row that is filled with several examples; None: one example a row."""
        self._examples, self._pad_id, self._room = examples, pad_id, room
        self._batch_size, self._seed = batch_size, seed
        lengths = [len(example.ids) - 1 for example in examples]
        self.rows = [[i] for i in range(len(examples))] if room is None else packed(lengths, room)
        """The examples of each row, by index."""
        self.steps_per_epoch = -(-len(self.rows) // batch_size)
        """Batches per epoch."""

    def __getitem__(self, step: int) -> ChatBatch:
        """The batch of any step >= 0."""
        chosen = epoch_rows(step, self.steps_per_epoch, len(self.rows), self._batch_size, self._seed)
        rows = [[self._examples[i] for i in self.rows[row]] for row in chosen]
        return chat_batch(rows, self._pad_id, packing=self._room is not None)


def digest_of(examples: Iterable[Any]) -> str:
    """SHA-256 (hex) over examples of plain data, in order."""
    sha = hashlib.sha256()
    for example in examples:
        sha.update(json.dumps(example).encode() + b"\n")
    return sha.hexdigest()
