"""What the tasks on rows of named columns share: batches, predictions over all examples, and what a run remembers."""

from __future__ import annotations

import hashlib
import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmkit.config.tasks import RowsTaskConfig
from lmkit.config.training import TrainConfig
from lmkit.data.examples import ExampleBatch, Examples, RowReader, ShuffledExamples
from lmkit.device import Device, attention_of_any_shape
from lmkit.errors import ConfigError
from lmkit.models.base import LanguageModel, State
from lmkit.tasks.base import Task
from lmkit.tokenizers import Tokenizer

DEFAULT_MAX_TOKENS = 512
"""Longest text where neither the configuration nor the model sets a limit."""
PREDICT_BATCH = 32
"""Examples at once in predictions for a file; changes the speed only."""

Fitted = Mapping[str, Any]
"""What a run has learnt from its training rows beside parameters: see ``RowsTask.fitted``."""


class RowsTask(Task):
    """Learn one thing about each example; an epoch has each training example once."""

    shapes_vary = True
    unit = "example"

    def __init__(
        self,
        model: nn.Module,
        config: RowsTaskConfig,
        tokenizer: Tokenizer,
        train: Examples,
        valid: Examples,
        train_config: TrainConfig,
        *,
        seed: int,
    ) -> None:
        self.model, self.config, self.tokenizer, self.train, self.valid = model, config, tokenizer, train, valid
        self.batches = ShuffledExamples(train, train_config.batch_size, seed)
        self.num_targets = len(train)
        self.data_name = re.sub(r"[^\w.-]+", "_", Path(config.data).name) or "rows"
        both = f"{train.digest()} {valid.digest()} {sorted(self.fitted().items())}"
        self.data_digest = hashlib.sha256(both.encode()).hexdigest()

    @abstractmethod
    def fitted(self) -> dict[str, Any]:
        """What was learnt from the training rows beside parameters, as JSON data; stored with the run."""

    @abstractmethod
    def outputs(self, forward: nn.Module, batch: ExampleBatch) -> Tensor:
        """What the model says of each example: (B, C) logits, or (B,) numbers."""

    @abstractmethod
    def losses(self, outputs: Tensor, targets_B: Tensor) -> Tensor:
        """(B,) loss of each example."""

    def loss(
        self, forward: nn.Module, batch: ExampleBatch, state: State | None, progress: float
    ) -> tuple[Tensor, State | None]:
        return self.losses(self.outputs(forward, batch), batch.targets_B).sum(), None

    def length_limit(self, train: TrainConfig) -> tuple[str, str] | None:
        if self.config.text is None:
            return None
        longest = max(len(tokens) for examples in (self.train, self.valid) for tokens in examples.tokens)
        return "task.max_tokens", f"texts of up to {longest} tokens (task.max_tokens)"

    def advice(self, run: str) -> str:
        return f"lmkit finetune run={run} predict=FILE"


@torch.no_grad()
@attention_of_any_shape()
def all_outputs(
    model: nn.Module,
    outputs: Callable[[nn.Module, ExampleBatch], Tensor],
    examples: Examples,
    *,
    device: Device,
    batch_size: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """The outputs for all N examples, in their order, on the CPU in float64; the model is in evaluation mode then."""
    model.eval()
    chosen, found, done = [], [], 0
    for indices in examples.by_length(batch_size):
        with device.autocast():
            part = outputs(model, examples.batch(indices).cut(slice(None), device.torch_device))
        found.append(part.float().cpu().double())
        chosen.append(torch.from_numpy(indices))
        done += len(indices)
        progress(done)
    result = torch.empty((len(examples), *found[0].shape[1:]), dtype=torch.float64)
    result[torch.cat(chosen)] = torch.cat(found)
    return result


def longest_text(config: RowsTaskConfig, backbone: LanguageModel | None) -> int:
    """Tokens of the longest text. Raises ConfigError if the model cannot read so many."""
    context = None if backbone is None else backbone.context
    if config.max_tokens is None:
        return DEFAULT_MAX_TOKENS if context is None else context
    if context is not None and config.max_tokens > context:
        raise ConfigError(
            f"task.max_tokens={config.max_tokens} is more than the model's context of {context}",
            f"set task.max_tokens={context} or less",
        )
    return config.max_tokens


def reading_notes(reader: RowReader, num_rows: int) -> Iterator[str]:
    """What to tell people of texts that were not read as they stand."""
    if reader.num_cut:
        yield f"{reader.num_cut} of {num_rows} texts are longer than the model reads and were cut (task.max_tokens)"
    if reader.num_unknown:
        told = f"{reader.num_unknown:,} of {reader.num_read:,} tokens of the texts"
        yield f"{told} stand for what the tokenizer does not know, read as <unk>"


def split_notes(reader: RowReader, train: Examples, valid: Examples, *, of_texts: bool) -> Iterator[str]:
    """What to tell of both parts; and how many of the texts to judge on are learnt from, too."""
    yield from reading_notes(reader, len(train) + len(valid))
    learnt = {tokens.tobytes() for tokens in train.tokens}
    num_learnt = sum(tokens.tobytes() in learnt for tokens in valid.tokens)
    if of_texts and num_learnt:
        yield f"{num_learnt} of {len(valid)} texts of valid stand in train, too"


def table_value(value: float, size: float | None = None) -> float:
    """A float of a table as it is written to a file: seven significant digits, as float32 has; where it is larger than
    ``size``, in which it was predicted, seven of that."""
    more = 0 if size is None or not abs(value) > size else math.ceil(min(10.0, math.log10(abs(value) / size)))
    return float(f"{value:.{7 + more}g}")
