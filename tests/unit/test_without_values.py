"""What a training step computes before the update needs no value from the device: it works where there are none.

On torch's ``meta`` device tensors have shapes and nothing else, so that whatever would make the host wait for a card
(reading a number, a shape that depends on values) fails. What reads even so is listed.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from lmkit.arguments import parse
from lmkit.composing import compose
from lmkit.config.commands import PretrainConfig
from lmkit.config.machine import Precision
from lmkit.data.batches import Batch
from lmkit.device import Device
from lmkit.horizon import Horizon
from lmkit.models.base import IGNORE
from lmkit.objectives import build_objective
from lmkit.optim import build_optimizer
from lmkit.tasks.language import NextToken
from lmkit.train import Trainer, TrainState

VOCAB = 90
META = Device(torch.device("meta"), Precision.fp32, compile=False, fused=False, description="meta")
TRANSFORMER = ["model.d_model=16", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=2"]
RECURRENT = ["model.d_embed=16", "model.d_hidden=16"]
MODELS = {
    "tiny": TRANSFORMER,
    "gpt2": TRANSFORMER,
    "vanilla": TRANSFORMER,
    "transformer_xl": TRANSFORMER,
    "lstm": RECURRENT,
    "gru": RECURRENT,
    "awd_lstm": RECURRENT,
    "mogrifier": RECURRENT,
}
OPTIONS = {
    "exact": [],
    "label smoothing": ["softmax.label_smoothing=0.1"],
    "activations": ["softmax=ar_tar"],
    "mixture": ["model.num_softmaxes=3"],
}


def step(*words: str) -> None:
    """What ``Trainer.train_step`` does before the update, of two micro-batches with some padding."""
    config = OmegaConf.to_object(compose(parse("pretrain", ["dataset=ptb", *words])))
    assert isinstance(config, PretrainConfig)
    counts_V = torch.ones(VOCAB, dtype=torch.int64)
    model = config.model.build(VOCAB, seed=1)
    model = model.to("meta")
    tokens_BT = torch.randint(0, VOCAB, (4, 9))
    targets_BT = tokens_BT[:, 1:].clone()
    targets_BT[0, 3:] = IGNORE
    batch = Batch(tokens_BT[:, :-1], targets_BT, starts_text=False)
    trainer = Trainer(
        task=NextToken(model, [batch], build_objective(config.softmax, counts_V)),
        model=model,
        optimizer=build_optimizer(config.optimizer, model, fused=False),
        optimizer_config=config.optimizer,
        schedule=config.schedule,
        device=META,
        seed=1,
        micro_batch_size=2,
        state=TrainState(horizon=Horizon(1e-3)),
        spike_nats=3.0,
    )
    total, _ = trainer._accumulate(batch, batch.num_targets, progress=0.5)
    norm = nn.utils.clip_grad_norm_(trainer.parameters, 1.0)
    trainer._is_bad(torch.stack((total, norm)), batch.num_targets)


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch knows no autocast for this device."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    monkeypatch.setattr(torch, "autocast", lambda device, **options: contextlib.nullcontext())


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("model", MODELS)
def test_loss_gradient_and_check_wait_for_nothing(model: str, option: str) -> None:
    step(f"model={model}", *MODELS[model], *OPTIONS[option])


@pytest.mark.parametrize("softmax", ["sampled", "adaptive"])
def test_choosing_rows_by_value_waits(softmax: str) -> None:
    """These are for CPUs and large vocabularies; how many rows a part of them has depends on the batch."""
    words = (
        ["model.tie_embeddings=false", "softmax.cutoffs=[20,60]", "model.cutoffs=[20,60]"]
        if softmax == "adaptive"
        else []
    )
    with pytest.raises((NotImplementedError, RuntimeError), match=r"meta|nonzero"):
        step("model=tiny", *TRANSFORMER, f"softmax={softmax}", *words)
