"""Language modelling: predict each token of a corpus from those before it. What pretrain and task=lm do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmkit.config.generation import SamplingConfig
from lmkit.config.softmax import SoftmaxConfig
from lmkit.config.start import InitConfig
from lmkit.config.training import Order, Shuffle, TrainConfig
from lmkit.console import format_number
from lmkit.data.batches import Batch, Batches, Lanes, Mixed, Windows
from lmkit.data.order import Pieces
from lmkit.data.prepared import PreparedData
from lmkit.data.survey import digest_of
from lmkit.device import Device
from lmkit.errors import ConfigError
from lmkit.evaluation.plan import Reach, Segments
from lmkit.evaluation.scoring import Tally, exp, perplexity, summarize
from lmkit.generate import generate, read_prompt
from lmkit.initialise import initialise_from_text, token_counts
from lmkit.models.base import LanguageModel, State
from lmkit.objectives import Objective, build_objective, check_head
from lmkit.rng import derive_key
from lmkit.tasks.base import Task, Validation

CARRIED_SEGMENT = 1024
"""Tokens per forward pass in the validation of models with carried state; changes the speed only."""
BLOCK_SEGMENTS = 16
"""Segments of seq_len tokens in a block of train.shuffle=blocks."""
PROBE_TOKENS = 4096
"""Validation is timed on this many tokens."""


class NextToken(Task):
    """Predict each token from those before it, without validation data: what benchmarks and notebooks need."""

    def __init__(self, model: LanguageModel, batches: Batches, objective: Objective) -> None:
        self.model, self.batches, self.objective = model, batches, objective

    def loss(
        self, forward: nn.Module, batch: Batch, state: State | None, progress: float
    ) -> tuple[Tensor, State | None]:
        hidden_BTD, new_state = forward(batch.inputs_BT, state)
        return self.objective.at(progress).of_batch(self.model.head, hidden_BTD, new_state, batch.targets_BT), new_state

    def validate(self, *, device: Device, micro_batch_size: int, progress: Callable[[int], None]) -> Validation:
        raise TypeError("there is no validation data")

    def state_from_tensors(self, tensors: dict[str, Tensor]) -> State:
        return self.model.state_from_tensors(tensors)

    def shown(self, loss: float) -> tuple[str, str]:
        return "ppl/token", format_number(exp(loss))

    @torch.no_grad()
    def row_losses(self, forward: nn.Module, batch: Batch, state: State | None) -> list[float]:
        hidden_BTD, _ = forward(batch.inputs_BT, state)
        nats: list[float] = self.model.head.row_nats(hidden_BTD, batch.targets_BT).tolist()
        return nats


class LanguageModelling(NextToken):
    """Every token of the corpus is a target once an epoch; validation scores the whole valid split exactly."""

    def __init__(
        self,
        model: LanguageModel,
        prepared: PreparedData,
        train: TrainConfig,
        softmax: SoftmaxConfig,
        *,
        seed: int,
        carries_state: bool,
        init: InitConfig | None = None,
    ) -> None:
        """init: what ``begin`` takes from the text; None: the parameters stay as they are."""
        self.counts_V = token_counts(prepared.splits["train"].tokens, prepared.tokenizer.vocab_size)
        check_head(softmax, type(model.head))
        batches = build_batches(prepared, train, seed, carries_state=carries_state)
        super().__init__(model, batches, build_objective(softmax, self.counts_V))
        self.prepared, self.train, self.softmax, self.init, self.seed = prepared, train, softmax, init, seed
        self.carries_state = carries_state
        self.tokenizer, self.data_name, self.data_digest = prepared.tokenizer, prepared.name, prepared.key
        self.num_targets = prepared.splits["train"].num_tokens
        self.pace_changes_at = self.objective.changes_at

    def replay(self, old: PreparedData, share: float) -> None:
        """Let ``share`` of the rows of each batch, rounded, be of another corpus; see ``with_replay``.

        A sampled softmax goes by how often each token is a target in these batches: by its counts in the new corpus
        alone, a word that only the old one has would stand for all the times that it is not expected.
        """
        self.batches = with_replay(self.prepared, old, self.train, share, self.seed, carries_state=self.carries_state)
        self.data_digest = digest_of([self.prepared.key, old.key, share])
        old_V = token_counts(old.splits["train"].tokens, self.prepared.tokenizer.vocab_size)
        num_old = round(share * self.train.batch_size)
        scale = num_old / (self.train.batch_size - num_old) * float(self.counts_V.sum() / old_V.sum())
        self.objective = build_objective(self.softmax, self.counts_V + scale * old_V.double())

    def lr_scale(self, batch: Batch, progress: float) -> float:
        return batch.inputs_BT.shape[1] / self.train.seq_len if self.train.seq_len_jitter else 1.0

    def begin(self) -> None:
        if self.init is not None:
            tokens = self.prepared.splits["train"].tokens
            initialise_from_text(self.model, self.init, tokens, self.counts_V, seed=self.seed)

    def validate(self, *, device: Device, micro_batch_size: int, progress: Callable[[int], None]) -> Validation:
        tokens = self.prepared.splits["valid"].tokens
        return self.validation_of(self._score(tokens, device, micro_batch_size, progress))

    def validation_of(self, tally: Tally) -> Validation:
        """The numbers of a wholly scored valid split."""
        scores = summarize(tally, self.prepared.splits["valid"])
        accuracy = scores["accuracy"]
        return Validation(
            loss=tally.loss,
            metrics={"valid_ppl": exp(tally.loss), "valid_accuracy": accuracy},
            text=f"valid loss {tally.loss:.4f} nats/token  ppl {format_number(exp(tally.loss))} per token"
            f"  accuracy {100 * accuracy:.1f} %",
            result={"dataset": self.prepared.name, "split": "valid", **scores},
            rows=[
                ("valid perplexity per token", format_number(scores["token_ppl"])),
                ("valid perplexity per word", format_number(scores["word_ppl"])),
                ("valid bits per byte", f"{scores['bits_per_byte']:.4f}"),
                ("valid accuracy", f"{100 * accuracy:.2f} %"),
            ],
        )

    def validation_s(self, *, device: Device, micro_batch_size: int) -> float:
        """Seconds that validation will take, from timing its first tokens."""
        tokens = self.prepared.splits["valid"].tokens
        probe = tokens[:PROBE_TOKENS]
        self._score(probe[:256], device, micro_batch_size)
        start = time.monotonic()
        self._score(probe, device, micro_batch_size)
        return (time.monotonic() - start) * len(tokens) / len(probe)

    def sample(self, num_tokens: int, *, device: Device) -> str:
        """A text from its beginning, with the same random numbers each time."""
        prompt = read_prompt(self.tokenizer, "", context=self.model.context, max_new_tokens=num_tokens)
        drawn = generate(
            self.model, self.tokenizer, prompt, sampling=SamplingConfig(), device=device, max_new_tokens=num_tokens
        )
        return drawn[0].text

    def _score(
        self,
        tokens: np.ndarray[Any, Any],
        device: Device,
        micro_batch_size: int,
        progress: Callable[[int], None] | None = None,
    ) -> Tally:
        side_by_side = None if self.carries_state else self.train.seq_len
        whole = Segments.whole(len(tokens), self.tokenizer.eos_id)
        return perplexity(
            self.model,
            tokens,
            Reach(side_by_side, side_by_side).windows(whole),
            seq_len=max(self.train.seq_len, CARRIED_SEGMENT),
            batch_size=micro_batch_size,
            device=device,
            progress=progress,
        )


def with_replay(
    new: PreparedData, old: PreparedData, train: TrainConfig, share: float, seed: int, *, carries_state: bool
) -> Mixed:
    """Training batches of which ``share`` of the rows, rounded, are of another corpus.

    Raises ConfigError if no row would be of the one or of the other.
    """
    if train.seq_len_jitter:
        raise ConfigError("train.seq_len_jitter=true does not go with task.replay", "leave out one of them")
    num_old = round(share * train.batch_size)
    if not 0 < num_old < train.batch_size:
        raise ConfigError(
            f"task.replay={share} of train.batch_size={train.batch_size} is {num_old} sequences",
            "raise train.batch_size, so that each batch has some of both corpora",
        )
    keys = seed, derive_key(seed, "replay")
    sizes = train.batch_size - num_old, num_old
    new_rows, old_rows = (
        build_batches(
            prepared, replace(train, batch_size=size, micro_batch_size=None), key, carries_state=carries_state
        )
        for prepared, size, key in zip((new, old), sizes, keys, strict=True)
    )
    return Mixed(new_rows, old_rows)


def build_batches(prepared: PreparedData, train: TrainConfig, seed: int, *, carries_state: bool) -> Lanes | Windows:
    """Training batches in the configured order."""
    tokens, eos_id = prepared.splits["train"].tokens, prepared.tokenizer.eos_id
    vocab_size = prepared.tokenizer.vocab_size
    lanes = train.order is Order.lanes or (train.order is Order.auto and carries_state)
    if lanes and not carries_state:
        raise ConfigError("train.order=lanes needs a model with carried state (lstm, gru)", "use train.order=windows")
    if lanes:
        pieces = None
        if train.shuffle is Shuffle.blocks:
            pieces = Pieces.blocks(len(tokens), BLOCK_SEGMENTS * train.seq_len, seed)
        elif train.shuffle is Shuffle.documents:
            pieces = Pieces.documents(tokens, eos_id, seed)
        jitter = seed if train.seq_len_jitter else None
        sizes = train.batch_size, train.seq_len
        return Lanes(tokens, eos_id, *sizes, pieces=pieces, jitter=jitter, vocab_size=vocab_size)
    if train.shuffle is not Shuffle.none or train.seq_len_jitter:
        raise ConfigError(
            "train.shuffle and train.seq_len_jitter are for train.order=lanes: windows are shuffled in any case",
            "leave them out, or train a model with carried state",
        )
    return Windows(tokens, eos_id, train.batch_size, train.seq_len, seed, vocab_size=vocab_size)
