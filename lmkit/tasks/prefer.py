"""task=prefer: of two answers the chosen one, by direct preference optimization (DPO; Rafailov et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmkit.config.chat import PreferTaskConfig
from lmkit.config.commands import FinetuneConfig
from lmkit.config.training import check_length
from lmkit.console import Console, format_number, plural
from lmkit.data.batches import to_device
from lmkit.data.chat import ChatTemplate, Conversation, Encoded, Turn
from lmkit.data.conversations import answer_of, chat_batch, digest_of, read_splits
from lmkit.data.order import epoch_rows
from lmkit.data.rows import Record
from lmkit.device import Device, attention_of_any_shape
from lmkit.errors import DataError
from lmkit.loading import LoadedRun
from lmkit.models.base import IGNORE, LanguageModel, State
from lmkit.tasks.base import Task, Validation
from lmkit.tasks.chat import encode_all, with_template
from lmkit.tokenizers import Tokenizer

TIE_NATS = 1e-3
"""Margins of less than this are rounding: such a pair is a tie, which is not counted as right."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, and what the run that training starts from thinks of them."""

    chosen: Encoded
    rejected: Encoded
    reference: tuple[float, float] = (0.0, 0.0)
    """Log-probability of the chosen and of the rejected answer before training, nats."""


@dataclass(frozen=True)
class PairBatch:
    """P pairs: chosen and rejected answers of a row are equally wide. Fulfils TrainingBatch."""

    inputs_P2T: Tensor
    """int64."""
    targets_P2T: Tensor
    """int64; IGNORE but for the answers."""
    reference_P2: Tensor
    """float32, log-probabilities of the answers before training."""

    starts_text = True

    @property
    def num_rows(self) -> int:
        """Pairs."""
        return len(self.inputs_P2T)

    @property
    def num_targets(self) -> int:
        """Pairs."""
        return len(self.inputs_P2T)

    def cut(self, rows: slice, device: torch.device) -> PairBatch:
        """These pairs, on the device."""
        inputs, targets, reference = (
            to_device(t[rows], device) for t in (self.inputs_P2T, self.targets_P2T, self.reference_P2)
        )
        return PairBatch(inputs, targets, reference)

    def rows(self, decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
        """The text of each chosen example, and the ids of its answer."""
        pairs = enumerate(zip(self.inputs_P2T[:, 0].tolist(), self.targets_P2T[:, 0].tolist(), strict=True))
        return [{"row": p, "text": decode(x), "ids": [i for i in y if i != IGNORE]} for p, (x, y) in pairs]


def pair_batch(pairs: Sequence[Pair], pad_id: int) -> PairBatch:
    """The batch of these pairs, as wide as the longest example."""
    rows = chat_batch([[e] for pair in pairs for e in (pair.chosen, pair.rejected)], pad_id, packing=False)
    shape = (len(pairs), 2, -1)
    reference = torch.tensor([pair.reference for pair in pairs], dtype=torch.float32)
    return PairBatch(rows.inputs_BT.view(shape), rows.targets_BT.view(shape), reference)


class PairBatches:
    """All pairs once an epoch, in random order; a function of (pairs, batch size, seed) and the step."""

    def __init__(self, pairs: Sequence[Pair], pad_id: int, *, batch_size: int, seed: int) -> None:
        self._pairs, self._pad_id, self._batch_size, self._seed = pairs, pad_id, batch_size, seed
        self.steps_per_epoch = -(-len(pairs) // batch_size)
        """Batches per epoch."""

    def __getitem__(self, step: int) -> PairBatch:
        """The batch of any step >= 0."""
        rows = epoch_rows(step, self.steps_per_epoch, len(self._pairs), self._batch_size, self._seed)
        return pair_batch([self._pairs[row] for row in rows], self._pad_id)


@torch.no_grad()
def answer_log_probs(model: LanguageModel, hidden_RTD: Tensor, batch: PairBatch) -> Tensor:
    """(P, 2) float32: summed log-probability of each answer, its end token included. R: the 2 P answers."""
    nats_N = model.head.score(hidden_RTD.flatten(0, 1), batch.targets_P2T.flatten()).nats_N
    return -nats_N.view_as(batch.targets_P2T).sum(2)


def read(forward: nn.Module, batch: PairBatch) -> Tensor:
    """(R, T, D): the hidden vectors of all answers."""
    hidden_RTD: Tensor = forward(batch.inputs_P2T.flatten(0, 1))[0]
    return hidden_RTD


class Prefer(Task):
    """-log sigmoid(beta m) with m the gain of the chosen answer over the reference less that of the rejected one.

    With ``label_smoothing`` e it is (1 - e) of that and e of -log sigmoid(-beta m) (Mitchell 2023, "A note on DPO with
    noisy preferences"). Dropout is off, as it was when the reference was taken.
    """

    shapes_vary = True
    unit = "pair"

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        train: Sequence[Pair],
        valid: Sequence[Pair],
        config: PreferTaskConfig,
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        """The pairs hold the reference."""
        self.model, self.tokenizer, self.valid, self.config = model, tokenizer, valid, config
        self.batches = PairBatches(train, tokenizer.eos_id, batch_size=batch_size, seed=seed)
        self.data_name = "prefer"
        examples = (e for part in (train, valid) for pair in part for e in (pair.chosen, pair.rejected))
        self.data_digest = digest_of([e.ids, e.learnt] for e in examples)
        self.num_targets = len(train)

    def advice(self, run: str) -> str:
        return f"lmkit generate run={run} --chat --prompt TEXT   lmkit generate run={run} --interactive"

    def loss(
        self, forward: nn.Module, batch: PairBatch, state: State | None, progress: float
    ) -> tuple[Tensor, State | None]:
        self.model.eval()
        for module in self.model.modules():
            if isinstance(module, nn.RNNBase):
                module.train()  # nothing in it drops, and cuDNN gives gradients in training only
        hidden_RTD = read(forward, batch)
        log_probs_P2 = answer_log_probs(self.model, hidden_RTD, batch).requires_grad_()
        with torch.enable_grad():
            loss = self._losses(log_probs_P2, batch).sum()
            (slopes_P2,) = torch.autograd.grad(loss, log_probs_P2)
        # The gradient is that of all answers' nats, each times its slope: one product for all, where the nats of each
        # answer by itself would keep a gradient of the whole head.
        scale = slopes_P2.abs().max().clamp(min=1e-30)  # so that no factor is lost in half precision
        weights_N = (-slopes_P2 / scale)[:, :, None].expand_as(batch.targets_P2T).flatten()
        slope = scale * self.model.head.loss(hidden_RTD.flatten(0, 1), batch.targets_P2T.flatten(), weights_N)
        return loss.detach() + (slope - slope.detach()), None

    def _losses(self, log_probs_P2: Tensor, batch: PairBatch) -> Tensor:
        """(P,) loss of each pair, nats."""
        config = self.config
        logits_P = config.beta * margins(log_probs_P2, batch)
        smoothing = config.label_smoothing
        losses_P = -(1 - smoothing) * F.logsigmoid(logits_P) - smoothing * F.logsigmoid(-logits_P)
        if config.sft_weight > 0:
            lengths_P = (batch.targets_P2T[:, 0] != IGNORE).sum(1)
            losses_P = losses_P - config.sft_weight * log_probs_P2[:, 0] / lengths_P
        return losses_P

    @torch.no_grad()
    def validate(self, *, device: Device, micro_batch_size: int, progress: Callable[[int], None]) -> Validation:
        self.model.eval()
        losses, gains = [], []
        by_length = sorted(self.valid, key=lambda pair: max(len(pair.chosen.ids), len(pair.rejected.ids)))
        for first in range(0, len(by_length), micro_batch_size):
            batch = pair_batch(by_length[first : first + micro_batch_size], self.tokenizer.eos_id)
            batch = batch.cut(slice(None), device.torch_device)
            with device.autocast():
                log_probs_P2 = answer_log_probs(self.model, read(self.model, batch), batch)
            losses += self._losses(log_probs_P2, batch).tolist()
            gains += (log_probs_P2 - batch.reference_P2).tolist()
            progress(batch.num_rows)
        return self._validation(losses, gains)

    def _validation(self, losses: list[float], gains: list[list[float]]) -> Validation:
        """gains: of each pair the log-probability that the chosen and the rejected answer have gained."""
        beta, count = self.config.beta, len(losses)
        nats = [chosen - rejected for chosen, rejected in gains]
        loss = math.fsum(losses) / count
        accuracy = sum(m > TIE_NATS for m in nats) / count
        ties = sum(abs(m) <= TIE_NATS for m in nats) / count
        numbers = {
            "reward_accuracy": accuracy,
            "reward_ties": ties,
            "reward_margin": beta * math.fsum(nats) / count,
            "reward_chosen": beta * math.fsum(chosen for chosen, _ in gains) / count,
            "reward_rejected": beta * math.fsum(rejected for _, rejected in gains) / count,
        }
        at_start = "" if self.config.sft_weight else " (ln 2 = 0.6931 at the start)"
        text = f"valid loss {loss:.4f}  reward accuracy {100 * accuracy:.1f} %  margin {numbers['reward_margin']:.4f}"
        if ties:
            text += f"  ties {100 * ties:.1f} %"
        return Validation(
            loss=loss,
            metrics={f"valid_{name}": value for name, value in numbers.items()},
            text=text,
            result={"split": "valid", "num_pairs": count, "preference_loss": loss, **numbers},
            rows=[
                (f"valid loss{at_start}", f"{loss:.4f}"),
                ("valid pairs with the chosen answer ahead", f"{100 * accuracy:.2f} %, ties {100 * ties:.2f} %"),
                ("valid reward margin", format_number(numbers["reward_margin"])),
            ],
        )


def margins(log_probs_P2: Tensor, batch: PairBatch) -> Tensor:
    """(P,): log-probability gained over the reference by the chosen answer less that gained by the rejected one."""
    gains_P2 = log_probs_P2 - batch.reference_P2
    return gains_P2[:, 0] - gains_P2[:, 1]


@torch.no_grad()
@attention_of_any_shape()
def with_reference(
    pairs: Iterable[Pair], model: LanguageModel, *, pad_id: int, device: Device, batch_size: int
) -> list[Pair]:
    """The pairs with the log-probabilities that the model gives their answers now."""
    model.eval()
    pairs = list(pairs)
    found: list[Pair] = []
    for first in range(0, len(pairs), batch_size):
        part = pairs[first : first + batch_size]
        with device.autocast():
            batch = pair_batch(part, pad_id).cut(slice(None), device.torch_device)
            log_probs = answer_log_probs(model, read(model, batch), batch).tolist()
        found += [Pair(p.chosen, p.rejected, (r[0], r[1])) for p, r in zip(part, log_probs, strict=True)]
    return found


def two_conversations(record: Record, config: PreferTaskConfig) -> tuple[Conversation, Conversation]:
    """The prompt with the chosen and with the rejected answer. Raises DataError if these are the same."""
    prompt = record.text(config.prompt)
    chosen, rejected = (answer_of(record, column) for column in (config.chosen, config.rejected))
    if chosen == rejected:
        raise DataError(f"{record.where}: chosen and rejected answer are the same", "repair or remove the row")
    return Conversation((Turn(prompt, chosen),)), Conversation((Turn(prompt, rejected),))


def build_prefer(
    cfg: FinetuneConfig, config: PreferTaskConfig, base: LoadedRun, device: Device, console: Console
) -> Prefer:
    """The task of a configuration. ``cfg.task`` becomes the configuration with its template written out.

    Raises ConfigError or DataError for what does not fit together.
    """
    check_length(cfg.train.seq_len, base.model.context)
    cfg.task = config = with_template(config, base)
    template = ChatTemplate.of(config)
    splits = read_splits(config, lambda record: two_conversations(record, config))
    train, valid = (
        _pairs(part, template, base, cfg, config, name, device, console)
        for name, part in zip(("train", "valid"), splits, strict=True)
    )
    console.say(f"train: {plural(len(train), 'pair')}; valid: {len(valid)}")
    return Prefer(base.model, base.tokenizer, train, valid, config, batch_size=cfg.train.batch_size, seed=cfg.seed)


def _pairs(
    conversations: Sequence[tuple[Conversation, Conversation]],
    template: ChatTemplate,
    base: LoadedRun,
    cfg: FinetuneConfig,
    config: PreferTaskConfig,
    split: str,
    device: Device,
    console: Console,
) -> list[Pair]:
    """The pairs of a split with their reference; those of which an answer was left out are not among them."""
    chosen, rejected = (
        encode_all(
            [pair[side] for pair in conversations],
            template,
            base,
            seq_len=cfg.train.seq_len,
            policy=config.truncation,
            split=f"{split} ({name})",
            console=console,
        )
        for side, name in enumerate(("chosen", "rejected"))
    )
    whole = [Pair(c, r) for c, r in zip(chosen, rejected, strict=True) if c is not None and r is not None]
    if not whole:
        raise DataError(f"no {split} pair fits into train.seq_len={cfg.train.seq_len}", "raise train.seq_len")
    batch_size = cfg.train.micro_batch_size or cfg.train.batch_size
    return with_reference(whole, base.model, pad_id=base.tokenizer.eos_id, device=device, batch_size=batch_size)
