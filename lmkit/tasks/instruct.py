"""task=instruct: learn the answers of conversations, not what they answer to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmkit.config.chat import InstructTaskConfig
from lmkit.config.commands import FinetuneConfig
from lmkit.config.training import check_length
from lmkit.console import Console, format_number, plural
from lmkit.data.chat import ChatTemplate, Encoded, answers_of, has_whole_answer
from lmkit.data.conversations import ChatBatch, ChatBatches, chat_batch, conversation_of, digest_of, read_splits
from lmkit.device import Device
from lmkit.evaluation.scoring import exp
from lmkit.loading import LoadedRun
from lmkit.models.base import LanguageModel, State
from lmkit.models.transformer import Transformer
from lmkit.objectives import Objective, build_objective, check_head
from lmkit.tasks.base import Task, Validation
from lmkit.tasks.chat import encode_all, greedy_answers, with_template
from lmkit.tokenizers import Tokenizer

SPARE_TOKENS = 8
"""An answer that is longer than the right one by more than this is broken off: it is wrong."""


class Instruct(Task):
    """Nats of the answers' tokens, their end tokens included; validation also answers some conversations itself."""

    shapes_vary = True

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        train: Sequence[Encoded],
        valid: Sequence[Encoded],
        objective: Objective,
        *,
        data_name: str,
        batch_size: int,
        room: int | None,
        num_answered: int,
        seed: int,
    ) -> None:
        """room: tokens of a row that several examples share; None: one example a row.

        num_answered: valid examples that are answered greedily; those whose last answer was cut are not.
        """
        self.model, self.tokenizer, self.valid, self.num_answered = model, tokenizer, valid, num_answered
        self.objective = objective
        self.answerable = [example for example in valid if has_whole_answer(example, tokenizer.eos_id)]
        batches = ChatBatches(train, tokenizer.eos_id, batch_size=batch_size, room=room, seed=seed)
        self.batches, self.num_rows = batches, len(batches.rows)
        self.data_name = data_name
        self.data_digest = digest_of([room, *([e.ids, e.learnt] for part in (train, valid) for e in part)])
        self.num_targets = sum(sum(example.learnt) for example in train)

    def loss(
        self, forward: nn.Module, batch: ChatBatch, state: State | None, progress: float
    ) -> tuple[Tensor, State | None]:
        hidden_BTD, read = _read(forward, batch)
        return self.objective.of_batch(self.model.head, hidden_BTD, read, batch.targets_BT, batch.scored_N), None

    @torch.no_grad()
    def row_losses(self, forward: nn.Module, batch: ChatBatch, state: State | None) -> list[float]:
        hidden_BTD, _ = _read(forward, batch)
        nats: list[float] = self.model.head.row_nats(hidden_BTD, batch.targets_BT).tolist()
        return nats

    def advice(self, run: str) -> str:
        return f"lmkit generate run={run} --chat --prompt TEXT   lmkit generate run={run} --interactive"

    def shown(self, loss: float) -> tuple[str, str]:
        return "ppl/answer token", format_number(exp(loss))

    def validate(self, *, device: Device, micro_batch_size: int, progress: Callable[[int], None]) -> Validation:
        nats, accuracy, num_tokens = self._score(device, micro_batch_size, progress)
        loss = nats / num_tokens
        metrics = {"valid_ppl": exp(loss), "valid_accuracy": accuracy}
        text = f"valid loss {loss:.4f} nats/answer token  ppl {format_number(exp(loss))}"
        rows = [
            ("valid perplexity per answer token", format_number(exp(loss))),
            ("valid accuracy per answer token", f"{100 * accuracy:.2f} %"),
        ]
        result: dict[str, Any] = {
            "split": "valid",
            "num_examples": len(self.valid),
            "num_answer_tokens": num_tokens,
            "answer_nats": nats,
            "answer_ppl": exp(loss),
            "answer_accuracy": accuracy,
        }
        if num_answered := min(self.num_answered, len(self.answerable)):
            chosen = [self.answerable[i * len(self.answerable) // num_answered] for i in range(num_answered)]
            num_exact = self._count_exact(chosen, device, micro_batch_size, progress)
            metrics["valid_exact_match"] = num_exact / num_answered
            text += f"  exact match {100 * num_exact / num_answered:.1f} % of {num_answered}"
            num_cut = len(self.valid) - len(self.answerable)
            left_out = f" ({num_cut} cut ones left out)" if num_cut else ""
            rows.append(("valid exact match, greedy", f"{num_exact} of {num_answered}{left_out}"))
            result |= {"exact_match": num_exact / num_answered, "num_answered": num_answered}
            result["num_answers_cut"] = num_cut
        return Validation(loss=loss, metrics=metrics, text=text, result=result, rows=rows)

    @torch.no_grad()
    def _score(
        self, device: Device, micro_batch_size: int, progress: Callable[[int], None]
    ) -> tuple[float, float, int]:
        """Summed nats, share of correct tokens, and number of the answers' tokens of valid."""
        self.model.eval()
        by_length = sorted(self.valid, key=lambda example: len(example.ids))
        nats, num_correct, num_tokens = 0.0, 0, 0
        for first in range(0, len(by_length), micro_batch_size):
            rows = [[example] for example in by_length[first : first + micro_batch_size]]
            batch = chat_batch(rows, self.tokenizer.eos_id, packing=False)
            num_targets = batch.num_targets
            batch = batch.cut(slice(None), device.torch_device)
            with device.autocast():
                hidden_BTD, _ = _read(self.model, batch)
                scores = self.model.head.score(hidden_BTD.flatten(0, 1), batch.targets_BT.reshape(-1))
            nats += float(scores.nats_N.cpu().double().sum())
            num_correct += int(scores.correct_N.sum())
            num_tokens += num_targets
            progress(num_targets)
        return nats, num_correct / num_tokens, num_tokens

    def _count_exact(
        self, examples: Sequence[Encoded], device: Device, micro_batch_size: int, progress: Callable[[int], None]
    ) -> int:
        """How many last answers come out as they stand in the data, text for text, white space at their ends aside.

        One with the token of unknown text is none of them: whatever stands there in the data, it is not written.
        """
        spans = [answers_of(example)[-1] for example in examples]
        right = [e.ids[start:end] for e, (start, end) in zip(examples, spans, strict=True)]
        answers = greedy_answers(
            self.model,
            [e.ids[:start] for e, (start, _) in zip(examples, spans, strict=True)],
            [len(ids) + SPARE_TOKENS for ids in right],
            eos_id=self.tokenizer.eos_id,
            device=device,
            batch_size=micro_batch_size,
            progress=progress,
        )
        decode, unk_id = self.tokenizer.decode, self.tokenizer.unk_id
        return sum(
            answer is not None and unk_id not in answer and decode(answer).strip() == decode(ids).strip()
            for answer, ids in zip(answers, right, strict=True)
        )


def _read(forward: nn.Module, batch: ChatBatch) -> tuple[Tensor, State | None]:
    """(B, T, D) hidden vectors, of rows of several examples each by itself; and the model's state after them."""
    if batch.segments_BT is None:
        read: tuple[Tensor, State | None] = forward(batch.inputs_BT)
    else:
        read = forward(batch.inputs_BT, segments_BT=batch.segments_BT)
    return read


def build_instruct(cfg: FinetuneConfig, config: InstructTaskConfig, base: LoadedRun, console: Console) -> Instruct:
    """The task of a configuration. ``cfg.task`` becomes the configuration with its template written out.

    Raises ConfigError or DataError for what does not fit together.
    """
    check_head(cfg.softmax, type(base.model.head))
    seq_len = cfg.train.seq_len
    check_length(seq_len, base.model.context)
    cfg.task = config = with_template(config, base)
    template = ChatTemplate.of(config)
    splits = read_splits(config, lambda record: conversation_of(record, config))
    encoded = [
        encode_all(part, template, base, seq_len=seq_len, policy=config.truncation, split=name, console=console)
        for name, part in zip(("train", "valid"), splits, strict=True)
    ]
    train, valid = ([e for e in part if e is not None] for part in encoded)
    packs = config.packing and isinstance(base.model, Transformer) and not base.model_config.carries_state
    task = Instruct(
        base.model,
        base.tokenizer,
        train,
        valid,
        build_objective(cfg.softmax, None),
        data_name="instruct",
        batch_size=cfg.train.batch_size,
        room=seq_len if packs else None,
        num_answered=config.exact_match,
        seed=cfg.seed,
    )
    if config.exact_match and (num_cut := len(valid) - len(task.answerable)):
        console.warn(
            f"valid: {num_cut} of {len(valid)} answers were cut (task.truncation): exact match leaves them out"
        )
    console.say(f"train: {plural(len(train), 'conversation')} in {plural(task.num_rows, 'row')}; valid: {len(valid)}")
    return task
