"""Laws of adapters, for LoRA, rsLoRA and DoRA beside the linear layers of every kind of Transformer."""

from __future__ import annotations

import copy

import pytest
import shapes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmkit.config.adapter import AdapterConfig
from lmkit.config.model import ModelConfig, RecurrentConfig, TransformerConfig
from lmkit.errors import ConfigError
from lmkit.lora import adapted_layers, adapter_tensors, add_adapter, merge_adapter, targeted
from lmkit.models.base import LanguageModel

VOCAB = 17
SMALL = {"d_model": 16, "num_layers": 2, "num_heads": 4, "context": 12}
CONFIGS: dict[str, ModelConfig] = {
    "llama": TransformerConfig(**SMALL),  # type: ignore[arg-type]
    "gpt2": TransformerConfig(**shapes.GPT2, **SMALL),
}
LINEAR = ["attention.qkv", "attention.out", "feed_forward.gate_up", "feed_forward.down"]

every_family = pytest.mark.parametrize("family", list(CONFIGS))
adapters = st.builds(
    AdapterConfig,
    rank=st.integers(1, 5),
    alpha=st.floats(0.5, 32),
    dropout=st.sampled_from([0.0, 0.3]),
    targets=st.sampled_from([["*"], ["attention.*"], ["blocks.1.*"], ["qkv", "down"]]),
    use_rslora=st.booleans(),
    use_dora=st.booleans(),
)


def build(family: str, config: AdapterConfig | None = None) -> LanguageModel:
    """In evaluation mode, with weights that make logits of about 1."""
    model = CONFIGS[family].build(VOCAB, seed=3).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5.0)
    if config is not None:
        add_adapter(model, config, seed=1)
    return model


def disturb(model: LanguageModel) -> None:
    """Adapters as they are after some training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapter_tensors(dict(model.named_parameters())).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)


TOKENS = torch.arange(24).reshape(2, 12) % VOCAB


@torch.no_grad()
def logits(model: LanguageModel) -> Tensor:
    return model.head.logits(model(TOKENS)[0].flatten(0, 1))


def loss(model: LanguageModel) -> Tensor:
    hidden = model(TOKENS)[0]
    return model.head.loss(hidden[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


@every_family
@given(config=adapters)
@settings(max_examples=12, deadline=None)
def test_at_first_an_adapter_changes_no_bit(family: str, config: AdapterConfig) -> None:
    assert torch.equal(logits(build(family, config)), logits(build(family)))


@every_family
@given(config=adapters)
@settings(max_examples=12, deadline=None)
def test_a_merged_adapter_computes_the_same_and_leaves_a_plain_model(family: str, config: AdapterConfig) -> None:
    model = build(family, config).double()  # in fp32 a large scale leaves more than rounding of the logits
    disturb(model)
    before = logits(model)
    assert (before - logits(build(family).double())).abs().max() > 1e-3
    merge_adapter(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    plain = build(family).double()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits(plain), logits(model))
    assert plain.num_parameters() == model.num_parameters()


@every_family
@given(config=adapters)
@settings(max_examples=12, deadline=None)
def test_training_moves_the_adapters_and_no_bit_of_the_base(family: str, config: AdapterConfig) -> None:
    model = build(family, config).train()
    base = {name: tensor.clone() for name, tensor in build(family).state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    first = {name: p.clone() for name, p in adapter_tensors(model.state_dict()).items()}
    for _ in range(2):  # A has no gradient while B is 0
        loss(model).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    state = model.state_dict()
    assert state.keys() == base.keys() | first.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.items())
    assert not any(torch.equal(state[name], tensor) for name, tensor in first.items())


@every_family
@given(config=adapters)
@settings(max_examples=12, deadline=None)
def test_exactly_the_adapters_are_trainable_and_their_number_is_rank_times_the_widths(
    family: str, config: AdapterConfig
) -> None:
    model = build(family, config)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == set(adapter_tensors(model.state_dict()))
    widths = [layer.weight.shape for _, layer in adapted_layers(model)]
    expected = sum(config.rank * (o + i) + (o if config.use_dora else 0) for o, i in widths)
    assert model.num_parameters() == expected > 0


@pytest.mark.parametrize("dora", [False, True])
def test_the_gradient_is_that_of_the_formula_written_out(dora: bool) -> None:
    """The hand-written functions of the Transformer must not pass an adapter by; checked against merged weights."""
    model = build("llama", AdapterConfig(rank=3, use_dora=dora)).train()
    disturb(model)
    loss(model).backward()  # type: ignore[no-untyped-call]
    merged = copy.deepcopy(model)
    merge_adapter(merged)
    loss(merged).backward()  # type: ignore[no-untyped-call]
    for name, layer in adapted_layers(model):
        weight = merged.get_submodule(name).weight
        assert isinstance(weight, torch.nn.Parameter)
        assert weight.grad is not None
        gain_O = torch.ones(len(weight))
        if layer.lora_magnitude_vector is not None:
            rows = layer.weight + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
            gain_O = layer.lora_magnitude_vector / rows.norm(dim=1)
        expected = layer.scaling * (weight.grad * gain_O[:, None]) @ layer.lora_A.weight.T
        torch.testing.assert_close(layer.lora_B.weight.grad, expected, rtol=1e-3, atol=1e-5)


def test_rows_of_zeros_do_not_make_a_dora_adapter_nan() -> None:
    model = build("llama")
    layer = model.get_submodule("blocks.0.attention.out")
    assert isinstance(layer, torch.nn.Linear)
    with torch.no_grad():
        layer.weight[:3] = 0.0
    before = logits(model)
    add_adapter(model, AdapterConfig(rank=3, use_dora=True), seed=1)
    torch.testing.assert_close(logits(model), before)
    loss(model).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.01)
    assert logits(model).isfinite().all()


def test_rslora_divides_alpha_by_the_square_root_of_the_rank() -> None:
    for rslora, expected in ((False, 8.0), (True, 16.0)):
        model = build("llama", AdapterConfig(rank=4, alpha=32.0, use_rslora=rslora))
        assert {layer.scaling for _, layer in adapted_layers(model)} == {expected}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["qkv"], [0, 4]),
        (["attention.*"], [0, 1, 4, 5]),
        (["blocks.0.*"], [0, 1, 2, 3]),
        (["blocks.1.feed_forward.down"], [7]),
        (["*"], list(range(8))),
        (["o?t", "g*"], [1, 2, 5, 6]),
    ],
)
def test_a_pattern_names_a_layer_as_a_whole_or_from_a_dot_on(patterns: list[str], expected: list[int]) -> None:
    names = [f"blocks.{layer}.{name}" for layer in range(2) for name in LINEAR]
    assert targeted(names, patterns) == [names[i] for i in expected]


def test_a_pattern_that_matches_nothing_is_refused_with_the_names_that_exist() -> None:
    model = build("llama")
    before = [p.requires_grad for p in model.parameters()]
    expected = (
        r"adapter\.targets=q_proj,kv matches no linear layer of the model; it has blocks\.\*\.attention\.qkv, .*down$"
    )
    with pytest.raises(ConfigError, match=expected):
        add_adapter(model, AdapterConfig(targets=["qkv", "q_proj", "kv"]), seed=0)
    assert [p.requires_grad for p in model.parameters()] == before
    with pytest.raises(ConfigError, match=r"it has none: leave out adapter, or set tune\.last_layers"):
        add_adapter(RecurrentConfig(d_embed=8, d_hidden=8).build(VOCAB, seed=0), AdapterConfig(), seed=0)


def test_every_wrong_value_of_an_adapter_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        AdapterConfig(rank=0, alpha=float("nan"), dropout=1.0, targets=[])
    for key in ("rank", "alpha", "dropout", "targets"):
        assert f"adapter.{key}=" in str(caught.value)
