"""Direct preference optimization is the formula of the paper, and begins at ln 2."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmkit.config.chat import PreferTaskConfig
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import RecurrentConfig, TransformerConfig
from lmkit.data.chat import Encoded
from lmkit.device import Device, resolve_device
from lmkit.models.base import IGNORE, LanguageModel
from lmkit.tasks.prefer import Pair, Prefer, answer_log_probs, pair_batch, read, with_reference
from lmkit.tokenizers import ByteTokenizer

END = ByteTokenizer.eos_id
TRANSFORMER = TransformerConfig(d_model=16, num_layers=2, num_heads=2, context=32, dropout=0.3)
LSTM = RecurrentConfig(d_embed=16, d_hidden=16, num_layers=1, dropout_recurrent=0.3)


@pytest.fixture
def device() -> Device:
    return resolve_device(DeviceConfig(type=DeviceType.cpu, threads=1))


def encoded(prompt: str, answer: str) -> Encoded:
    ids = [END, *prompt.encode(), *answer.encode(), END]
    return Encoded(ids, [i > len(prompt) for i in range(len(ids))])


PAIRS = [Pair(encoded(p, c), encoded(p, r)) for p, c, r in [("ab", "xyz", "q"), ("c", "d", "efghij"), ("", "k", "l")]]


def build(model: LanguageModel, device: Device, **config: float) -> Prefer:
    pairs = with_reference(PAIRS, model, pad_id=END, device=device, batch_size=2)
    task = PreferTaskConfig(data="x", **config)  # type: ignore[arg-type]
    return Prefer(model, ByteTokenizer(), pairs, pairs, task, batch_size=2, seed=1)


def log_prob(model: LanguageModel, example: Encoded) -> float:
    """By one softmax after the other."""
    logits = model.head.logits(model(torch.tensor([example.ids[:-1]]))[0][0]).double().log_softmax(-1)
    return sum(float(logits[i - 1, example.ids[i]]) for i, learnt in enumerate(example.learnt) if learnt)


@pytest.mark.parametrize("config", [TRANSFORMER, LSTM], ids=["transformer", "lstm"])
def test_training_begins_at_ln_2_and_ties_are_not_counted_as_right(
    config: TransformerConfig | RecurrentConfig, device: Device
) -> None:
    task = build(config.build(ByteTokenizer.vocab_size, seed=1), device)
    task.model.train()
    loss, _ = task.loss(task.model, task.batches[0], None, 0.0)
    assert float(loss) / 2 == pytest.approx(math.log(2), abs=1e-6)
    found = task.validate(device=device, micro_batch_size=3, progress=lambda _: None)
    assert found.loss == pytest.approx(math.log(2), abs=1e-6)
    assert found.result["reward_accuracy"] == 0.0
    assert found.result["reward_ties"] == 1.0


def test_where_the_chosen_answer_is_learnt_too_the_loss_does_not_begin_at_ln_2(device: Device) -> None:
    plain, both = (build(TRANSFORMER.build(ByteTokenizer.vocab_size, seed=1), device, sft_weight=w) for w in (0.0, 1.0))
    found = [t.validate(device=device, micro_batch_size=3, progress=lambda _: None) for t in (plain, both)]
    assert found[1].loss > found[0].loss + 1
    assert [one.rows[0][0] for one in found] == ["valid loss (ln 2 = 0.6931 at the start)", "valid loss"]


@torch.no_grad()
def moved(model: LanguageModel) -> None:
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=generator) * 0.2)


def test_the_loss_is_the_formula_of_the_paper(device: Device) -> None:
    model = TRANSFORMER.build(ByteTokenizer.vocab_size, seed=1)
    task = build(model, device, beta=0.7, label_smoothing=0.2, sft_weight=0.3)
    moved(model)
    batch = pair_batch(task.valid, END)
    total, num_right = 0.0, 0
    for pair in task.valid:
        chosen, rejected = log_prob(model, pair.chosen), log_prob(model, pair.rejected)
        margin = (chosen - pair.reference[0]) - (rejected - pair.reference[1])
        num_right += margin > 0
        total += -0.8 * math.log(1 / (1 + math.exp(-0.7 * margin))) - 0.2 * math.log(1 / (1 + math.exp(0.7 * margin)))
        total += -0.3 * chosen / sum(pair.chosen.learnt)
    loss, _ = task.loss(model, batch, None, 0.0)
    assert float(loss) == pytest.approx(total, rel=1e-5)
    found = task.validate(device=device, micro_batch_size=2, progress=lambda _: None)
    assert found.loss == pytest.approx(total / 3, rel=1e-5)
    assert found.result["reward_accuracy"] == pytest.approx(num_right / 3)


def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(device: Device) -> None:
    model = TRANSFORMER.build(ByteTokenizer.vocab_size, seed=1)
    task = build(model, device)
    moved(model)
    batch = pair_batch(task.valid, END)

    def gradients(size: int) -> list[Tensor]:
        model.zero_grad()
        for first in range(0, 3, size):
            part = batch.cut(slice(first, first + size), torch.device("cpu"))
            task.loss(model, part, None, 0.0)[0].backward()  # type: ignore[no-untyped-call]
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for whole, cut in zip(gradients(3), gradients(1), strict=True):
        torch.testing.assert_close(whole, cut, atol=1e-6, rtol=1e-4)


def test_the_gradient_is_that_of_the_formula_in_plain_operations(device: Device) -> None:
    model = TRANSFORMER.build(ByteTokenizer.vocab_size, seed=1)
    task = build(model, device, beta=0.7, label_smoothing=0.2, sft_weight=0.3)
    moved(model)
    batch = pair_batch(task.valid, END)
    found = []
    for plain in (True, False):
        model.zero_grad()
        if plain:
            logits = model.eval().head.logits(model(batch.inputs_P2T.flatten(0, 1))[0].flatten(0, 1))
            nats_N = F.cross_entropy(logits, batch.targets_P2T.flatten(), reduction="none", ignore_index=IGNORE)
            loss = task._losses(-nats_N.view_as(batch.targets_P2T).sum(2), batch).sum()
        else:
            loss, _ = task.loss(model, batch, None, 0.0)
        (3.0 * loss).backward()  # type: ignore[no-untyped-call]
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 5
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def log_probs_of(model: LanguageModel, pairs: list[Pair]) -> Tensor:
    batch = pair_batch(pairs, END)
    return answer_log_probs(model, read(model, batch), batch)


def test_padding_and_neighbours_do_not_change_an_answer(device: Device) -> None:
    model = TRANSFORMER.build(ByteTokenizer.vocab_size, seed=1).eval()
    together = log_probs_of(model, PAIRS)
    for row, pair in enumerate(PAIRS):
        alone = log_probs_of(model, [pair])[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)
        assert together[row].tolist() == pytest.approx(
            [log_prob(model, e) for e in (pair.chosen, pair.rejected)], rel=1e-5
        )


def test_recurrent_layers_stay_in_training_mode_for_cudnn_and_nothing_else_does(device: Device) -> None:
    model = LSTM.build(ByteTokenizer.vocab_size, seed=1)
    model.train()
    prefer = build(model, device)
    prefer.loss(model, prefer.batches[0], None, 0.0)
    assert {type(m).__name__ for m in model.modules() if m.training} == {"LSTM"}
