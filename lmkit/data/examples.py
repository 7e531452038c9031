"""Rows of named columns as examples for a model: token ids, standardised numbers, and what is to be predicted.

A text is read as the language model met texts in training: its end token, then the text, then its end token again; the
second text of a pair follows, with its own end token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmkit.config.tasks import RowsTaskConfig, Truncation
from lmkit.console import plural
from lmkit.data.batches import to_device
from lmkit.data.order import Permutation, epoch_rows
from lmkit.data.rows import Record, read_records
from lmkit.errors import DataError
from lmkit.rng import derive_key
from lmkit.tokenizers import Tokenizer
from lmkit.tokenizers.base import UNK

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of a column in the training rows."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: NDArray[np.float64], column: str) -> Scale:
        """Raises DataError if the numbers are all the same, or too large for a standard deviation."""
        with np.errstate(over="ignore", invalid="ignore"):
            mean, std = float(values.mean()), float(values.std())
        if not math.isfinite(std):
            raise DataError(
                f"column '{column}' holds numbers of up to {np.abs(values).max():.3g} in the training rows, too large"
                " for a standard deviation",
                "repair or remove these rows",
            )
        if not std > 1e-12 * abs(mean):
            raise DataError(
                f"column '{column}' does not vary in the training rows (standard deviation {std:.3g})",
                "leave the column out, or name another one",
            )
        return cls(mean, std)

    def standardise(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values in standard deviations from the mean."""
        return (values - self.mean) / self.std


@dataclass(frozen=True)
class ExampleBatch:
    """Examples side by side, padded on the right. Fulfils TrainingBatch."""

    tokens_BT: Tensor
    """int64; any id beyond the length."""
    lengths_B: Tensor
    """int64 >= 1."""
    numeric_BK: Tensor
    """float32, standardised; K may be 0."""
    targets_B: Tensor
    """int64 labels, or float32 numbers in standard deviations."""
    starts_text = True

    @property
    def num_rows(self) -> int:
        """Examples."""
        return len(self.lengths_B)

    @property
    def num_targets(self) -> int:
        """Examples."""
        return len(self.lengths_B)

    def cut(self, rows: slice, device: torch.device) -> ExampleBatch:
        """These rows, on the device, with no more padding than they need."""
        length = int(self.lengths_B[rows].max())
        parts = (self.tokens_BT[rows, :length], self.lengths_B[rows], self.numeric_BK[rows], self.targets_B[rows])
        tokens_BT, lengths_B, numeric_BK, targets_B = (to_device(t, device) for t in parts)
        return ExampleBatch(tokens_BT, lengths_B, numeric_BK, targets_B)

    def rows(self, decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
        """Each example for people: ``ids`` holds its label, and nothing where the target is a number."""
        labels = not self.targets_B.is_floating_point()
        return [
            {
                "row": row,
                "text": decode(self.tokens_BT[row, 1 : int(length)].tolist()),
                "ids": [int(target)] if labels else [],
                "numbers": self.numeric_BK[row].tolist(),
                "target": target,
            }
            for row, (length, target) in enumerate(zip(self.lengths_B, self.targets_B.tolist(), strict=True))
        ]


@dataclass(frozen=True)
class Examples:
    """N examples. ``targets_N`` are zeros where there is nothing to compare with."""

    tokens: list[Ids]
    numeric_NK: NDArray[np.float32]
    targets_N: NDArray[Any]

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: Sequence[int] | Ids) -> ExampleBatch:
        """The examples of these numbers, in this order."""
        lengths_B = np.array([len(self.tokens[i]) for i in indices], dtype=np.int64)
        tokens_BT = np.zeros((len(indices), int(lengths_B.max())), dtype=np.int64)
        for row, i in enumerate(indices):
            tokens_BT[row, : lengths_B[row]] = self.tokens[i]
        chosen = np.asarray(indices, dtype=np.int64)
        arrays = (tokens_BT, lengths_B, self.numeric_NK[chosen], self.targets_N[chosen])
        return ExampleBatch(*(torch.from_numpy(a) for a in arrays))

    def by_length(self, batch_size: int) -> list[Ids]:
        """Numbers of all examples in batches of similar length, the longest first, so that memory runs out early."""
        order = np.argsort([-len(t) for t in self.tokens], kind="stable")
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def digest(self) -> str:
        """SHA-256 (hex) of all that is in them."""
        whole = hashlib.sha256(np.array([len(t) for t in self.tokens], dtype=np.int64).tobytes())
        for part in (*self.tokens, self.numeric_NK, self.targets_N):
            whole.update(np.ascontiguousarray(part).tobytes())
        return whole.hexdigest()


class ShuffledExamples:
    """Batches of examples in random order, each once an epoch; the last batch of an epoch may be smaller."""

    def __init__(self, examples: Examples, batch_size: int, seed: int) -> None:
        self._examples, self._batch_size, self._seed = examples, batch_size, seed
        self.steps_per_epoch = -(-len(examples) // batch_size)
        """Batches per epoch."""

    def __getitem__(self, step: int) -> ExampleBatch:
        """The batch of any step >= 0."""
        size = len(self._examples)
        return self._examples.batch(epoch_rows(step, self.steps_per_epoch, size, self._batch_size, self._seed))


class RowReader:
    """Turns rows into token ids and standardised numbers, the same way in training and prediction."""

    def __init__(
        self, config: RowsTaskConfig, tokenizer: Tokenizer, max_tokens: int, numeric: Mapping[str, Scale]
    ) -> None:
        """numeric: column -> its scale, in the order in which the model reads them."""
        self._config, self._tokenizer, self._max_tokens, self._numeric = config, tokenizer, max_tokens, numeric
        self.num_cut = 0
        """Texts that were cut so far."""
        self.num_read = self.num_unknown = 0
        """Tokens of texts so far, and those of them that stand for what the tokenizer does not know."""

    def examples(self, records: Sequence[Record], targets_N: NDArray[Any] | None = None) -> Examples:
        """The examples of these rows. Raises DataError, naming the row, for what is missing or no number."""
        tokens = [self._tokens(record) for record in records]
        columns = [scale.standardise(numbers(records, name)) for name, scale in self._numeric.items()]
        numeric_NK = np.stack(columns, 1).astype(np.float32) if columns else np.zeros((len(records), 0), np.float32)
        if targets_N is None:
            targets_N = np.zeros(len(records), dtype=np.float32)
        return Examples(tokens, numeric_NK, targets_N)

    def _tokens(self, record: Record) -> Ids:
        columns = [name for name in (self._config.text, self._config.pair) if name is not None]
        texts = [record.text(name) for name in columns]
        parts = [self._tokenizer.encode(text) for text in texts]
        self.num_read += sum(map(len, parts))
        if self._tokenizer.unk_id is not None:
            self.num_unknown += sum(int(np.count_nonzero(part == self._tokenizer.unk_id)) for part in parts)
            if self._tokenizer.ends_lines:  # there <unk> is a word that a text may hold
                self.num_unknown -= sum(text.split().count(UNK) for text in texts)
        room = self._max_tokens - 1 - len(parts)
        if sum(map(len, parts)) > room:
            if self._config.truncation is Truncation.refuse:
                raise DataError(
                    f"{record.where} has {sum(map(len, parts)) + 1 + len(parts)} tokens, more than {self._max_tokens}",
                    "set task.truncation=keep_start or keep_end, or raise task.max_tokens",
                )
            self.num_cut += 1
            parts = cut_to(parts, room, keep_end=self._config.truncation is Truncation.keep_end)
        end = np.array([self._tokenizer.eos_id], dtype=np.int64)
        return np.concatenate([end, *(piece for part in parts for piece in (part, end))])


def cut_to(parts: list[Ids], room: int, *, keep_end: bool) -> list[Ids]:
    """One or two texts cut to ``room`` tokens together; of two, the longer is cut first (Devlin et al. 2019)."""
    lengths = [len(part) for part in parts]
    if len(parts) == 1:
        lengths[0] = min(lengths[0], room)
    elif sum(lengths) > room:
        short = min(min(lengths), room // 2)
        first_is_short = lengths[0] <= lengths[1]
        lengths = [short, room - short] if first_is_short else [room - short, short]
    if keep_end:
        return [part[len(part) - size :] for part, size in zip(parts, lengths, strict=True)]
    return [part[:size] for part, size in zip(parts, lengths, strict=True)]


def number_of(record: Record, column: str) -> float:
    """A finite number. Raises DataError that names row and column."""
    text = record.text(column).strip()
    try:
        value = float(text.replace("_", "x"))  # what Python reads as 1_000 is no number in a file
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(
            f"{record.where}, column '{column}' holds {text[:40]!r}, which is no number", "repair or remove the row"
        )
    return value


def numbers(records: Sequence[Record], column: str) -> NDArray[np.float64]:
    """A column of finite numbers. Raises DataError that names the first row where it is none."""
    return np.array([number_of(record, column) for record in records], dtype=np.float64)


def read_split(config: RowsTaskConfig, seed: int) -> tuple[list[Record], list[Record]]:
    """Training and validation rows; where ``task.valid`` is null, a share of the data that the seed draws is held out.

    Raises DataError if a source cannot be read or there are too few rows.
    """
    records = read_records(config.data)
    if config.valid is not None:
        return records, read_records(config.valid, "validation")
    num_valid = round(config.valid_fraction * len(records))
    if num_valid < 1 or len(records) - num_valid < 1:
        raise DataError(
            f"{config.data} has {plural(len(records), 'row')}, too few to hold out"
            f" task.valid_fraction={config.valid_fraction}",
            "give more rows, or name task.valid",
        )
    order = Permutation(len(records), derive_key(seed, "split"))(np.arange(len(records), dtype=np.int64))
    held_out = set(order[:num_valid].tolist())
    train = [record for i, record in enumerate(records) if i not in held_out]
    return train, [records[i] for i in sorted(held_out)]
