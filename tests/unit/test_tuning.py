"""Which parameters are trained, when, and how fast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lmkit.config.adapter import AdapterConfig, TuneConfig
from lmkit.config.model import ModelConfig, RecurrentConfig, TransformerConfig
from lmkit.config.optimization import AdamConfig, MuonConfig, OptimizerConfig, SgdConfig
from lmkit.errors import ConfigError
from lmkit.models.base import LanguageModel
from lmkit.optim import build_optimizer
from lmkit.tuning import choose_trainable, depths_of, lr_factors, unfreezing

TRANSFORMER = TransformerConfig(d_model=16, num_layers=3, num_heads=2, context=8)
UNTIED = TransformerConfig(d_model=16, num_layers=3, num_heads=2, context=8, tie_embeddings=False)
LSTM = RecurrentConfig(d_embed=8, d_hidden=8, num_layers=3)
Build = Callable[[ModelConfig], LanguageModel]


class WithHead(nn.Module):
    """What a task may train: a language model and something on it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = config.build(11, seed=1)
        self.head = nn.Linear(16, 2)


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_depth_counts_from_the_embeddings_to_what_lies_above_the_layers() -> None:
    depths = depths_of(WithHead(UNTIED))
    assert depths["backbone.embedding.weight"] == 0
    assert depths["backbone.blocks.0.attention.qkv.weight"] == 1
    assert depths["backbone.blocks.2.feed_forward_norm.weight"] == 3
    assert {depths[name] for name in ("backbone.final_norm.weight", "backbone.head.weight", "head.weight")} == {4}
    recurrent = depths_of(LSTM.build(11, seed=1))
    assert (recurrent["embedding.weight"], recurrent["layers.2.bias_ih_l0"], recurrent["head.bias"]) == (0, 3, 4)


@pytest.mark.parametrize("config", [TRANSFORMER, UNTIED, LSTM])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_last_layers_trains_the_last_k_and_what_is_above(config: ModelConfig, count: int) -> None:
    model = config.build(11, seed=1)
    choose_trainable(model, None, TuneConfig(last_layers=count), seed=1)
    depths = depths_of(model)
    assert trained(model) == {name for name, depth in depths.items() if depth > 3 - count}
    assert "embedding.weight" not in trained(model)


def test_more_layers_than_there_are_and_nothing_to_train_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tune\.last_layers=4 is more than the model's 3 layers"):
        choose_trainable(TRANSFORMER.build(11, seed=1), None, TuneConfig(last_layers=4), seed=1)
    post_norm = TransformerConfig(d_model=16, num_layers=1, num_heads=2, context=8, pre_norm=False)
    with pytest.raises(ConfigError, match=r"tune\.last_layers=0 leaves nothing to train"):
        choose_trainable(post_norm.build(11, seed=1), None, TuneConfig(last_layers=0), seed=1)
    with pytest.raises(ConfigError, match=r"cannot be combined with adapter"):
        choose_trainable(TRANSFORMER.build(11, seed=1), AdapterConfig(), TuneConfig(last_layers=1), seed=1)


def test_with_an_adapter_what_the_task_adds_is_trained_in_full() -> None:
    model = WithHead(TRANSFORMER)
    choose_trainable(model, AdapterConfig(targets=["qkv"]), TuneConfig(), seed=1)
    adapters = {f"backbone.blocks.{i}.attention.qkv.lora_{part}.weight" for i in range(3) for part in "AB"}
    assert trained(model) == adapters | {"head.weight", "head.bias"}


OPTIMIZERS: list[OptimizerConfig] = [AdamConfig(lr=0.1), SgdConfig(lr=0.1), MuonConfig(lr=0.1, adam_lr=0.1)]


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda c: type(c).__name__)
def test_each_layer_learns_at_a_share_of_the_rate_of_the_layer_above(config: OptimizerConfig) -> None:
    model = UNTIED.build(11, seed=1)
    factors = lr_factors(model, TuneConfig(layer_decay=0.5))
    optimizer = build_optimizer(config, model, fused=False, lr_factors=factors)
    rate_of = {id(p): group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    depths = depths_of(model)
    assert {n: rate_of[id(p)] for n, p in model.named_parameters()} == {
        n: 0.1 * 0.5 ** (4 - d) for n, d in depths.items()
    }


def test_without_decay_the_groups_are_those_of_pretraining() -> None:
    model = UNTIED.build(11, seed=1)
    assert lr_factors(model, TuneConfig()) == {}
    plain = build_optimizer(AdamConfig(), model, fused=False).param_groups
    assert [len(group["params"]) for group in plain] == [14, 7]


def test_unfreezing_adds_a_layer_after_each_equal_share_of_the_run() -> None:
    model = UNTIED.build(11, seed=1)
    at = unfreezing(model, TuneConfig(unfreeze=True))
    depths = depths_of(model)
    assert {depths[name]: share for name, share in at.items()} == {3: 1 / 5, 2: 2 / 5, 1: 3 / 5, 0: 4 / 5}
    assert all(depths[name] == 4 for name in depths.keys() - at.keys())
    assert unfreezing(model, TuneConfig()) == {}


def test_unfreezing_counts_only_what_is_trained() -> None:
    model = TRANSFORMER.build(11, seed=1)
    choose_trainable(model, AdapterConfig(), TuneConfig(), seed=1)
    at = unfreezing(model, TuneConfig(unfreeze=True))
    assert {name.split(".")[1]: share for name, share in at.items()} == {"1": 1 / 3, "0": 2 / 3}


@pytest.mark.parametrize("values", [{"last_layers": -1}, {"layer_decay": 0.0}, {"layer_decay": 1.1}])
def test_wrong_values_are_named(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"tune\.{next(iter(values))}="):
        TuneConfig(**values)  # type: ignore[arg-type]


def test_a_frozen_model_gives_the_layers_above_it_the_gradient_they_had() -> None:
    whole, part = (TRANSFORMER.build(11, seed=1) for _ in range(2))
    choose_trainable(part, None, TuneConfig(last_layers=1), seed=1)
    tokens = torch.arange(16).reshape(2, 8) % 11
    for model in (whole, part):
        model.head.loss(model(tokens)[0].flatten(0, 1), tokens.flatten()).backward()  # type: ignore[no-untyped-call]
    gradients = dict(whole.named_parameters())
    for name, p in part.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, gradients[name].grad)
        else:
            assert p.grad is None
