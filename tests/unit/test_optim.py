"""Laws of the optimizers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from lmkit.config.optimization import (
    AdadeltaConfig,
    AdagradConfig,
    AdamConfig,
    AdamwConfig,
    MuonConfig,
    NadamConfig,
    OptimizerConfig,
    RmspropConfig,
    SgdConfig,
)
from lmkit.optim import build_optimizer, load_optimizer_tensors, newton_schulz, optimizer_tensors, set_lr

ALL: list[OptimizerConfig] = [
    SgdConfig(lr=0.1, momentum=0.9, nesterov=True),
    AdagradConfig(),
    AdadeltaConfig(),
    RmspropConfig(momentum=0.5),
    AdamConfig(),
    AdamwConfig(),
    NadamConfig(),
    MuonConfig(),
]


def model_and_data() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(32, 6)


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, n: int) -> float:
    loss = torch.tensor(0.0)
    for _ in range(n):
        loss = (model(x).squeeze(1) - x.sum(1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("config", ALL, ids=lambda c: type(c).__name__)
def test_every_optimizer_lowers_the_loss(config: OptimizerConfig) -> None:
    model, x = model_and_data()
    optimizer = build_optimizer(config, model, fused=True)
    first = steps(model, optimizer, x, 1)
    assert steps(model, optimizer, x, 60) < 0.9 * first


@pytest.mark.parametrize("config", ALL, ids=lambda c: type(c).__name__)
def test_state_put_back_continues_bit_for_bit(config: OptimizerConfig) -> None:
    model, x = model_and_data()
    optimizer = build_optimizer(config, model, fused=True)
    steps(model, optimizer, x, 3)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    saved = {k: v.clone() for k, v in optimizer_tensors(optimizer, named(model)).items()}
    steps(model, optimizer, x, 3)
    other, _ = model_and_data()
    other.load_state_dict(weights)
    resumed = build_optimizer(config, other, fused=True)
    load_optimizer_tensors(resumed, named(other), saved)
    steps(other, resumed, x, 3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [SgdConfig, RmspropConfig])
def test_momentum_can_begin_when_a_run_goes_on(kind: type[SgdConfig | RmspropConfig]) -> None:
    model, x = model_and_data()
    optimizer = build_optimizer(kind(lr=0.01), model, fused=True)
    steps(model, optimizer, x, 3)
    resumed = build_optimizer(kind(lr=0.01, momentum=0.9), model, fused=True)
    load_optimizer_tensors(resumed, named(model), optimizer_tensors(optimizer, named(model)))
    first = steps(model, resumed, x, 1)
    assert steps(model, resumed, x, 20) < first


QUICK_START = """
import json, sys, torch
from torch import nn
from lmkit.config import optimization
from lmkit.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
found = {}
for name in sys.argv[1:]:
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(getattr(optimization, name)(), model, fused=True)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    named = dict(model.named_parameters())
    load_optimizer_tensors(optimizer, named, optimizer_tensors(optimizer, named))
    found[name] = "torch._dynamo" in sys.modules
print(json.dumps(found))
"""


def test_no_optimizer_waits_for_the_compiler_to_be_imported() -> None:
    names = [type(config).__name__ for config in ALL]
    done = subprocess.run([sys.executable, "-c", QUICK_START, *names], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == dict.fromkeys(names, False)


@pytest.mark.parametrize(
    ("config", "kind", "options"),
    [
        (AdamwConfig(lr=0.01), torch.optim.AdamW, {"weight_decay": 0.0, "fused": True}),
        (AdamConfig(lr=0.01), torch.optim.Adam, {"fused": True}),
        (SgdConfig(lr=0.1, momentum=0.9), torch.optim.SGD, {"momentum": 0.9, "fused": True}),
        (AdagradConfig(lr=0.1), torch.optim.Adagrad, {}),
    ],
)
def test_an_optimizer_does_what_torchs_own_does(
    config: OptimizerConfig, kind: type[torch.optim.Optimizer], options: dict[str, object]
) -> None:
    config.weight_decay = 0.0
    (ours, x), (theirs, _) = model_and_data(), model_and_data()
    betas = {"betas": (config.beta1, config.beta2), "eps": config.eps} if isinstance(config, AdamConfig) else {}
    steps(ours, build_optimizer(config, ours, fused=True), x, 5)
    steps(theirs, kind(theirs.parameters(), lr=config.lr, **betas, **options), x, 5)  # type: ignore[arg-type, call-arg]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_an_unknown_parameter_is_refused() -> None:
    model, _ = model_and_data()
    with pytest.raises(ValueError, match="belongs to no parameter"):
        load_optimizer_tensors(
            build_optimizer(AdamConfig(), model, fused=False), named(model), {"9.w/step": torch.ones(())}
        )


def test_weight_decay_spares_gains_and_biases() -> None:
    model, _ = model_and_data()
    groups = build_optimizer(AdamwConfig(weight_decay=0.3), model, fused=False).param_groups
    decays = {p.ndim: g["weight_decay"] for g in groups for p in g["params"]}
    assert decays == {2: 0.3, 1: 0.0}


def test_set_lr_scales_the_peak_of_every_group() -> None:
    model, _ = model_and_data()
    optimizer = build_optimizer(MuonConfig(lr=0.02, adam_lr=0.004), model, fused=False)
    set_lr(optimizer, 0.5)
    set_lr(optimizer, 0.25)
    assert sorted({g["lr"] for g in optimizer.param_groups}) == pytest.approx([0.001, 0.005])


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8)])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    values = torch.linalg.svdvals(newton_schulz(torch.randn(shape), steps=8))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_adam_of_muon_equals_torch_adamw() -> None:
    model, _ = model_and_data()
    twin, _ = model_and_data()
    config = MuonConfig(adam_lr=0.01, weight_decay=0.0)
    ours = build_optimizer(config, model, fused=False)
    biases = [p for p in twin.parameters() if p.ndim == 1]
    theirs = torch.optim.AdamW(biases, lr=0.01, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=0.0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = torch.full_like(p, 0.3) if p.ndim == 1 else torch.zeros_like(p)
        q.grad = torch.full_like(q, 0.3)
    for _ in range(3):
        ours.step()
        theirs.step()
    ours_biases = [p for p in model.parameters() if p.ndim == 1]
    for p, q in zip(ours_biases, biases, strict=True):
        torch.testing.assert_close(p, q)
