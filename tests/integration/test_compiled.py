"""A compiled model trains like the plain one: on cards ``device.compile=auto`` compiles.

Traced by torch's own compiler, forward and backward, but run by torch's plain operations (``aot_eager``): what cannot
be traced fails here as it would on a card, and no C++ compiler is needed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lmkit.arguments import parse
from lmkit.commands.training import build_trainer
from lmkit.composing import compose
from lmkit.config.commands import PretrainConfig
from lmkit.config.machine import DeviceConfig, DeviceType, Precision
from lmkit.data.batches import Batch
from lmkit.device import resolve_device
from lmkit.heads import SoftmaxHead
from lmkit.horizon import Horizon
from lmkit.models.base import IGNORE
from lmkit.objectives import build_objective
from lmkit.optim import build_optimizer
from lmkit.tasks.language import NextToken
from lmkit.train import Trainer, TrainState

VOCAB = 90
TRANSFORMER = ["model.d_model=16", "model.num_layers=2", "model.num_heads=2", "model.dropout=0"]
RECURRENT = ["model.d_embed=16", "model.d_hidden=16"]
RECURRENT += [f"model.dropout_{where}=0" for where in ("embed", "input", "hidden", "output", "recurrent")]
MODELS = {
    "tiny": [*TRANSFORMER, "model.num_kv_heads=1"],
    "gpt2": TRANSFORMER,
    "vanilla": TRANSFORMER,
    "transformer_xl": TRANSFORMER,
    "lstm": RECURRENT,
    "gru": RECURRENT,
    "awd_lstm": [*RECURRENT, "softmax=ar_tar"],
    "mogrifier": RECURRENT,
}
DROPS = {
    "tiny": ["model.dropout=0.1", "model.attention_dropout=0.1"],
    "gpt2": ["model.dropout_embed=0.1", "model.dropout_locked=true", "model.dropout=0.1", "model.drop_path=0.1"],
    "awd_lstm": [f"model.dropout_{where}=0.2" for where in ("embed", "input", "hidden", "output", "recurrent")],
}


def losses(model_name: str, *words: str, compiled: bool, precision: Precision = Precision.fp32) -> list[float]:
    """Losses of three steps of two micro-batches, with carried state, some padding and a shorter last batch."""
    trainer, batches = prepared(model_name, *words, compiled=compiled, precision=precision)
    return [trainer.train_step(batch).loss for batch in batches]


def prepared(
    model_name: str, *words: str, compiled: bool, precision: Precision = Precision.fp32
) -> tuple[Trainer, list[Batch]]:
    torch.manual_seed(1)
    config = configured(model_name, *words)
    model = config.model.build(VOCAB, seed=1)
    batches = []
    for number, length in enumerate((9, 9, 6)):
        tokens_BT = torch.randint(0, VOCAB, (4, length))
        targets_BT = tokens_BT[:, 1:].clone()
        targets_BT[0, 3:] = IGNORE
        batches.append(Batch(tokens_BT[:, :-1], targets_BT, starts_text=number == 0))
    device = resolve_device(DeviceConfig(type=DeviceType.cpu, threads=1))
    trainer = Trainer(
        task=NextToken(model, batches, build_objective(config.softmax, torch.ones(VOCAB, dtype=torch.int64))),
        model=model,
        optimizer=build_optimizer(config.optimizer, model, fused=False),
        optimizer_config=config.optimizer,
        schedule=config.schedule,
        device=replace(device, compile=compiled, precision=precision),
        seed=1,
        micro_batch_size=2,
        state=TrainState(horizon=Horizon(1e-3)),
    )
    return trainer, batches


def configured(model_name: str, *words: str) -> PretrainConfig:
    line = parse("pretrain", ["dataset=ptb", f"model={model_name}", *MODELS[model_name], *words])
    config = OmegaConf.to_object(compose(line))
    assert isinstance(config, PretrainConfig)
    return config


@pytest.fixture
def _traced(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with: Any = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_with(model, backend="aot_eager"))
    torch.compiler.reset()


@pytest.mark.usefixtures("_traced")
@pytest.mark.parametrize(
    "model", [name if name in ("tiny", "lstm") else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_a_compiled_model_has_the_losses_of_the_plain_one(model: str) -> None:
    assert losses(model, compiled=True) == pytest.approx(losses(model, compiled=False), rel=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("_traced")
@pytest.mark.parametrize("model", DROPS)
def test_a_model_that_drops_out_is_compiled_under_autocast_too(model: str) -> None:
    found = losses(model, *DROPS[model], compiled=True, precision=Precision.bf16)
    assert all(0.0 < loss < 10.0 for loss in found)


@pytest.mark.usefixtures("_traced")
def test_with_the_model_the_softmax_of_its_head_is_compiled() -> None:
    for compiled in (False, True):
        trainer, _ = prepared("gpt2", compiled=compiled)
        head = trainer.model.head
        assert isinstance(head, SoftmaxHead)
        assert head.compiled == compiled


@pytest.mark.usefixtures("_traced")
@pytest.mark.parametrize("model_name", ["tiny", "transformer_xl", "lstm", "gru", "mogrifier"])
def test_a_card_compiles_recurrent_layers_only_where_it_is_asked_to(model_name: str) -> None:
    by_itself = model_name in ("tiny", "transformer_xl")
    card = replace(resolve_device(DeviceConfig(type=DeviceType.cpu, threads=1)), compile=True)
    for asked, expected in (("auto", by_itself), ("on", True)):
        config = configured(model_name, f"device.compile={asked}")
        model = config.model.build(VOCAB, seed=1)
        trainer = build_trainer(config, NextToken(model, [], build_objective(config.softmax, None)), model, card, None)
        assert (trainer.forward is not model) == expected
