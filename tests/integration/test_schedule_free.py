"""Schedule-free AdamW: its average is what is evaluated and saved (that it resumes is in test_resume.py)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lmkit.averaging import build_average, check_schedule_free
from lmkit.commands import pretrain
from lmkit.config.commands import PretrainConfig
from lmkit.config.optimization import AdamwConfig, ConstantConfig, CosineConfig, ScheduleFreeConfig
from lmkit.config.training import TrainConfig
from lmkit.errors import ConfigError, ResourceError
from lmkit.optim import build_optimizer
from lmkit.store.checkpoint import list_checkpoints, load_checkpoint

pytestmark = pytest.mark.extra("schedule-free")
needs_package = pytest.mark.skipif(importlib.util.find_spec("schedulefree") is None, reason="needs schedulefree")
FREE = ScheduleFreeConfig(lr=0.05, weight_decay=0.0)


def quadratic() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 1, bias=False)


@needs_package
def test_the_average_is_the_mean_of_the_fast_weights_at_a_constant_rate() -> None:
    model = quadratic()
    optimizer = build_optimizer(FREE, model, fused=False)
    average = build_average(TrainConfig(), model, optimizer)
    assert average is not None
    fast, start = [], model.weight.detach().clone()
    assert torch.equal(average.tensors()["weight"], start), "before the first step"
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.ones(1, 4)).square().sum().backward()
        optimizer.step()
        fast.append(optimizer.state[model.weight]["z"].clone())
    expected = torch.stack(fast).mean(0)
    torch.testing.assert_close(average.tensors()["weight"], expected, rtol=1e-4, atol=1e-6)
    before = model.weight.detach().clone()
    with average.applied(model):
        torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(model.weight, before)


@needs_package
def test_what_is_saved_is_the_average(config: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    made = replace(config(), optimizer=ScheduleFreeConfig(), schedule=ConstantConfig())
    pretrain.run(made)
    snapshot = load_checkpoint(list_checkpoints(tmp_path / "run")[-1], with_optimizer=True)
    beta1 = ScheduleFreeConfig().beta1
    moved = 0
    for name, saved in snapshot.model.items():
        z, y = snapshot.optimizer.get(f"optimizer/{name}/z"), snapshot.optimizer.get(f"raw/{name}")
        if z is not None and y is not None:
            torch.testing.assert_close(saved, y.lerp(z, 1 - 1 / beta1))
            moved += int(not torch.equal(saved, y))
    assert moved > 0


@needs_package
@pytest.mark.parametrize(
    ("schedule", "train", "message"),
    [
        (CosineConfig(), TrainConfig(), "schedule=constant"),
        (ConstantConfig(), TrainConfig(ema_decay=0.9), r"train\.ema_decay"),
    ],
)
def test_what_does_not_go_with_it_is_refused(schedule: CosineConfig, train: TrainConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_schedule_free(FREE, schedule, train)
    check_schedule_free(AdamwConfig(), schedule, train)


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"schedulefree.*lmkit\[schedule-free\]"):
        check_schedule_free(FREE, ConstantConfig(), TrainConfig())
