"""The Transformer is the one of the papers: Llama's formulas, GPT-2's and Vaswani's, and the cache changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import shapes
import torch
import torch.nn.functional as F
from torch import Tensor

import lmkit.models.by_hand
import lmkit.models.transformer
from lmkit.config.model import Activation, Norm, Positions, TransformerConfig
from lmkit.models.transformer import KVCache, Transformer
from lmkit.models.transformer_xl import MemoryTransformer

VOCAB, BATCH, TIME, CONTEXT = 29, 3, 11, 16


def llama(**changes: int | float | None) -> TransformerConfig:
    settings = {"d_model": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "context": CONTEXT, **changes}
    return TransformerConfig(**settings)  # type: ignore[arg-type]


def gpt2() -> TransformerConfig:
    return TransformerConfig(d_model=16, num_layers=2, num_heads=4, context=CONTEXT, **shapes.GPT2)


def vanilla() -> TransformerConfig:
    return TransformerConfig(d_model=16, num_layers=2, num_heads=4, context=CONTEXT, **shapes.VANILLA)


def randomised(config: TransformerConfig) -> Transformer:
    """A model whose every parameter, gains and biases too, is far from its initial value."""
    model = (MemoryTransformer if config.memory_tokens else Transformer)(config, VOCAB, seed=5).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, TIME), generator=torch.Generator().manual_seed(1))


# An independent reference: one sequence, one head and one position at a time, in float64, from the formulas.


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return torch.stack([row / math.sqrt(float((row * row).mean()) + eps) * gain for row in x])


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    rows = [(row - row.mean()) / math.sqrt(float(((row - row.mean()) ** 2).mean()) + eps) for row in x]
    return torch.stack(rows) * gain + bias


def turned(vector: Tensor, position: int, theta: float) -> Tensor:
    """Channels i and i + C/2 as a complex number, times exp(i position theta^(-2i/C))."""
    half = len(vector) // 2
    angles = [position * theta ** (-2 * i / len(vector)) for i in range(half)]
    out = torch.empty_like(vector)
    for i, angle in enumerate(angles):
        z = complex(float(vector[i]), float(vector[i + half])) * complex(math.cos(angle), math.sin(angle))
        out[i], out[i + half] = z.real, z.imag
    return out


def attend(config: TransformerConfig, p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Causal attention of one sequence (T, D); query head h reads key/value head h // (H / K)."""
    heads, kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
    width = config.d_model // heads
    rows = x @ p[name + "qkv.weight"].T + p.get(name + "qkv.bias", 0.0)
    q, k, v = rows.split([heads * width, kv_heads * width, kv_heads * width], 1)
    out = torch.zeros(len(x), heads * width, dtype=x.dtype)
    for h in range(heads):
        own, shared = slice(h * width, (h + 1) * width), h // (heads // kv_heads)
        kv = slice(shared * width, (shared + 1) * width)
        queries, keys = list(q[:, own]), list(k[:, kv])
        if config.positions is Positions.rotary:
            queries = [turned(vector, t, config.rope_theta) for t, vector in enumerate(queries)]
            keys = [turned(vector, t, config.rope_theta) for t, vector in enumerate(keys)]
        for t in range(len(x)):
            scores = torch.stack([queries[t] @ keys[s] / math.sqrt(width) for s in range(t + 1)])
            weights = scores.exp() / scores.exp().sum()
            out[t, own] = sum(weights[s] * v[s, kv] for s in range(t + 1))
    return out @ p[name + "out.weight"].T + p.get(name + "out.bias", 0.0)


def reference(model: Transformer, tokens_T: Tensor) -> Tensor:
    """Hidden vectors (T, D) of one sequence, float64."""
    config, p = model.config, {name: value.detach().double() for name, value in model.named_parameters()}
    eps, pre_norm = config.norm_eps, config.pre_norm

    def norm(name: str, x: Tensor) -> Tensor:
        if config.norm is Norm.rmsnorm:
            return rms_norm(x, p[name + ".weight"], eps)
        return layer_norm(x, p[name + ".weight"], p[name + ".bias"], eps)

    def feed_forward(name: str, x: Tensor) -> Tensor:
        if config.gated:
            gate, up = (x @ p[name + "gate_up.weight"].T).chunk(2, 1)
            inner = gate / (1 + (-gate).exp()) * up
        else:
            inner = x @ p[name + "up.weight"].T + p[name + "up.bias"]
            if config.activation is Activation.relu:
                inner = inner.clamp(min=0)
            else:
                inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        return inner @ p[name + "down.weight"].T + p.get(name + "down.bias", 0.0)

    def sublayer(norm_name: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if pre_norm:
            return x + function(norm(norm_name, x))
        return norm(norm_name, x + function(x))

    x = p["embedding.weight"][tokens_T]
    if config.scale_embeddings:
        x = x * math.sqrt(config.d_model)
    for t in range(len(x)):
        if config.positions is Positions.learned:
            x[t] += p["positions.weight"][t]
        if config.positions is Positions.sinusoidal:
            for i in range(config.d_model):
                angle = t / 10000 ** (2 * (i // 2) / config.d_model)
                x[t, i] += math.cos(angle) if i % 2 else math.sin(angle)
    for layer in range(config.num_layers):
        name = f"blocks.{layer}."
        x = sublayer(name + "attention_norm", lambda y, n=name: attend(config, p, n + "attention.", y), x)  # type: ignore[misc]
        x = sublayer(name + "feed_forward_norm", lambda y, n=name: feed_forward(n + "feed_forward.", y), x)  # type: ignore[misc]
    return norm("final_norm", x) if pre_norm else x


CONFIGS = [llama(), llama(num_kv_heads=1), llama(num_kv_heads=None), llama(rope_theta=500.0), gpt2(), vanilla()]
NAMES = ["llama", "one kv head", "as many kv heads", "other theta", "gpt2", "vanilla"]


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_hidden_vectors_equal_a_reference_written_from_the_formulas(config: TransformerConfig) -> None:
    model = randomised(config)
    with torch.no_grad():
        hidden_BTD, state = model(tokens())
    assert state is None
    for row, hidden_TD in zip(tokens(), hidden_BTD, strict=True):
        torch.testing.assert_close(hidden_TD.double(), reference(model, row), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [llama(), gpt2(), vanilla()], ids=["llama", "gpt2", "vanilla"])
def test_gradients_are_those_of_the_function_by_finite_differences(config: TransformerConfig) -> None:
    model = randomised(config).double()
    text = tokens()[:2, :5]
    weights = torch.randn(2, 5, config.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def loss() -> Tensor:
        hidden_BTD = model(text)[0]
        return (hidden_BTD * weights).sum()

    loss().backward()
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        direction = torch.randn(p.shape, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            step = 1e-6
            p.add_(direction, alpha=step)
            above = float(loss())
            p.add_(direction, alpha=-2 * step)
            below = float(loss())
            p.add_(direction, alpha=step)
        slope = (above - below) / (2 * step)
        assert float((p.grad * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-5), name


def hidden_and_gradients(model: Transformer, text: Tensor) -> dict[str, Tensor]:
    """Of a fixed weighting of the hidden vectors, with dropout drawn from seed 0."""
    torch.manual_seed(0)
    model.zero_grad()
    hidden_BTD = model(text)[0]
    (hidden_BTD * torch.linspace(-1, 1, hidden_BTD.numel()).view(hidden_BTD.shape)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden_BTD.detach(), **gradients}


HAND_WRITTEN = {
    "grouped": llama(),
    "multi-head": llama(num_kv_heads=None),
    "biases": llama(bias=True),
    "dropout": llama(dropout=0.3, attention_dropout=0.3),
    "relu": replace(llama(), gated=False, activation=Activation.relu),
    "learned": replace(llama(), positions=Positions.learned),
    "memory": llama(memory_tokens=4),
    "locked": llama(dropout=0.3, dropout_locked=True),
    "drop path": llama(drop_path=0.3),
    "gpt2": gpt2(),
}


@pytest.mark.parametrize("config", HAND_WRITTEN.values(), ids=HAND_WRITTEN.keys())
@pytest.mark.parametrize("frozen", ["", "qkv", "down", "norm", "embedding", "weight"])
@pytest.mark.parametrize("rows", [2, 15], ids=["few", "many"])
def test_the_hand_written_functions_equal_the_plain_operations(
    config: TransformerConfig, frozen: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows are multiplied by MKL; of many the feed-forward part takes 8 positions at a time and, at the end, 5."""
    monkeypatch.setattr(lmkit.models.by_hand, "BLOCK_ELEMENTS", 1_000)
    model = randomised(config).train()
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen or frozen not in name)
    if not any(p.requires_grad for p in model.parameters()):
        model.final_norm.requires_grad_(True)
    equal_by_hand_and_plain(model, tokens().repeat(5, 1)[:rows], monkeypatch)


@pytest.mark.parametrize("config", [llama(dropout=0.3), llama(dropout=0.3, dropout_locked=True), gpt2()])
def test_gradients_of_a_model_that_is_only_read_are_the_same(
    config: TransformerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As dynamic evaluation wants them: dropout passes on what it is given."""
    equal_by_hand_and_plain(randomised(config), tokens(), monkeypatch)


def equal_by_hand_and_plain(model: Transformer, text: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = hidden_and_gradients(model, text)
    monkeypatch.setattr(lmkit.models.transformer, "trains_on_cpu", lambda x: False)
    plain = hidden_and_gradients(model, text)
    assert ours.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-3, msg=name)


def test_a_norm_keeps_its_result_and_not_its_input() -> None:
    x, kept = torch.randn(2, 3, 8, requires_grad=True), set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):  # type: ignore[func-returns-value]
        n = lmkit.models.transformer.RMSNorm(8, eps=1e-6).without_gain(x)
    assert n.data_ptr() in kept
    assert x.data_ptr() not in kept


def test_the_gradient_of_gate_and_up_takes_their_place_so_that_a_second_backward_pass_is_refused() -> None:
    gate_up, places = (torch.randn(2, 3, 8, requires_grad=True) * 2.0), []
    gate_up.register_hook(lambda grad: places.append(grad.data_ptr()))
    y = lmkit.models.by_hand.SwigluDown.apply(gate_up, torch.randn(5, 4), None)  # type: ignore[no-untyped-call]
    y.sum().backward(retain_graph=True)
    assert places == [gate_up.data_ptr()]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gate_and_up_whose_rows_do_not_lie_one_after_the_other_have_their_gradient_too() -> None:
    x, weight = torch.randn(3, 2, 8, requires_grad=True), torch.randn(5, 4)
    y = lmkit.models.by_hand.SwigluDown.apply(x.transpose(0, 1) * 1.0, weight, None)  # type: ignore[no-untyped-call]
    (ours,) = torch.autograd.grad(y.square().sum(), x)
    gate, up = x.transpose(0, 1).chunk(2, -1)
    (plain,) = torch.autograd.grad(((torch.nn.functional.silu(gate) * up) @ weight.T).square().sum(), x)
    torch.testing.assert_close(ours, plain)


def test_under_autocast_what_branches_are_added_to_stays_in_fp32() -> None:
    model, seen = randomised(llama()).train(), []
    for block in model.blocks:
        block.register_forward_hook(lambda _block, _inputs, x_BTD: seen.append(x_BTD.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens())
    assert seen == [torch.float32, torch.float32]


def test_a_norm_of_what_is_too_large_to_be_squared_is_no_number() -> None:
    """Zeros would look like a model that trains on, at the loss of equal probabilities."""
    x = torch.tensor([[1e25, 1.0], [1e18, 1.0]], requires_grad=True)
    n = lmkit.models.transformer.RMSNorm(2, eps=1e-6)(x)
    assert n[0].isnan().all()
    torch.testing.assert_close(n[1], torch.tensor([2**0.5, 0.0]))


def test_the_hand_written_functions_are_for_training_on_cpus_in_one_precision_only() -> None:
    x = torch.zeros(1)
    assert lmkit.models.transformer.trains_on_cpu(x)
    assert not lmkit.models.transformer.trains_on_cpu(x.to("meta"))
    with torch.no_grad():
        assert not lmkit.models.transformer.trains_on_cpu(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not lmkit.models.transformer.trains_on_cpu(x)


def test_as_many_key_value_heads_as_query_heads_is_multi_head_attention() -> None:
    grouped, plain = randomised(llama(num_kv_heads=2)), randomised(llama(num_kv_heads=4))
    plain.load_state_dict(
        {name: widened(value) if "qkv" in name else value for name, value in grouped.state_dict().items()}
    )
    with torch.no_grad():
        torch.testing.assert_close(grouped(tokens())[0], plain(tokens())[0])
    assert Transformer(llama(num_kv_heads=None), VOCAB, seed=1).state_dict().keys() == plain.state_dict().keys()


def widened(qkv_weight: Tensor) -> Tensor:
    """The q, k, v rows of 4 query and 2 key/value heads of 4 channels with each key/value head written out twice."""
    q, k, v = qkv_weight.split([16, 8, 8])
    return torch.cat([q, *(w.view(2, 4, 16).repeat_interleave(2, 0).reshape(16, 16) for w in (k, v))])


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("gated", [True, False])
def test_every_activation_is_the_one_of_its_name(activation: Activation, gated: bool) -> None:
    config = TransformerConfig(d_model=8, num_layers=1, num_heads=2, activation=activation, gated=gated)
    feed_forward = Transformer(config, VOCAB, seed=0).blocks[0].feed_forward
    act = {
        Activation.relu: lambda x: x.clamp(min=0),
        Activation.gelu: lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        Activation.silu: lambda x: x * x.sigmoid(),
        Activation.tanh: torch.tanh,
        Activation.sigmoid: torch.sigmoid,
    }[activation]
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)) * 100
    p = dict(feed_forward.named_parameters())
    if gated:
        gate, up = (x @ p["gate_up.weight"].T).chunk(2, -1)
        inner = act(gate) * up
    else:
        inner = act(x @ p["up.weight"].T)
    torch.testing.assert_close(feed_forward(x), inner @ p["down.weight"].T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [llama(), gpt2(), vanilla()], ids=["llama", "gpt2", "vanilla"])
def test_a_text_longer_than_the_context_is_refused_in_one_piece_and_in_many(config: TransformerConfig) -> None:
    model = Transformer(config, VOCAB, seed=0).eval()
    text = torch.zeros(1, CONTEXT, dtype=torch.int64)
    with torch.no_grad():
        full = model(text, use_state=True)[1]
        with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens do not fit into the model's context of {CONTEXT}"):
            model(text[:, :1], full)
    with pytest.raises(ValueError, match="do not fit"):
        model(torch.zeros(1, CONTEXT + 1, dtype=torch.int64))


def test_the_cache_grows_geometrically_and_never_beyond_the_context() -> None:
    context = 300
    model = Transformer(llama(context=context), VOCAB, seed=0).eval()
    state: KVCache | None = None
    sizes = []
    with torch.no_grad():
        for _ in range(context):
            _, state = model(torch.zeros(1, 1, dtype=torch.int64), state, use_state=True)
            assert state is not None
            sizes.append(state.keys_LBKSC.shape[3])
    assert sorted(set(sizes)) == [64, 128, 256, 300]
    assert state is not None
    assert state.length == context
    assert state.keys_LBKSC.shape == (2, 1, 2, context, 4)


def test_no_new_buffer_is_made_while_the_cache_has_room() -> None:
    model = Transformer(llama(), VOCAB, seed=0).eval()
    with torch.no_grad():
        _, first = model(tokens()[:, :3], use_state=True)
        _, second = model(tokens()[:, 3:4], first)
    assert first is not None
    assert second is not None
    assert second.keys_LBKSC.data_ptr() == first.keys_LBKSC.data_ptr()
    assert (first.length, second.length) == (3, 4)


def test_a_selected_cache_is_a_copy() -> None:
    model = randomised(llama())
    with torch.no_grad():
        _, state = model(tokens()[:, :5], use_state=True)
        assert state is not None
        expected = model(tokens(), use_state=False)[0][:, 5:]
        other = state.select(torch.tensor([0, 1, 2]))
        model(torch.zeros(BATCH, 4, dtype=torch.int64), other)
        torch.testing.assert_close(model(tokens()[:, 5:], state)[0], expected, rtol=1e-5, atol=1e-5)


def test_tied_embeddings_are_one_parameter_and_untied_ones_two() -> None:
    tied = Transformer(llama(), VOCAB, seed=0)
    untied = Transformer(TransformerConfig(d_model=16, num_layers=1, num_heads=2, tie_embeddings=False), VOCAB, seed=0)
    assert tied.head.weight is tied.embedding.weight
    assert [n for n, _ in tied.named_parameters() if n.startswith("head")] == []
    assert not torch.equal(untied.head.weight, untied.embedding.weight)


def test_matrices_start_at_the_stated_spread_and_gains_at_one() -> None:
    model = Transformer(TransformerConfig(d_model=128, num_layers=2, num_heads=4, bias=True), 500, seed=0)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all(), name
            continue
        writes = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
        expected = 0.02 / math.sqrt(4) if writes else 0.02
        assert float(p.detach().std()) == pytest.approx(expected, rel=0.05), name
        assert float(p.detach().mean()) == pytest.approx(0.0, abs=expected / 20), name


def test_the_llama_shape_has_llamas_parameters_and_no_others() -> None:
    names = {name for name, _ in Transformer(llama(num_layers=1), VOCAB, seed=0).named_parameters()}
    block = ["attention_norm", "attention.qkv", "attention.out", "feed_forward_norm", "feed_forward.gate_up"]
    expected = {f"blocks.0.{name}.weight" for name in [*block, "feed_forward.down"]}
    assert names == expected | {"embedding.weight", "final_norm.weight"}


def test_computed_position_tables_are_not_saved() -> None:
    for config in (llama(), vanilla()):
        model = Transformer(config, VOCAB, seed=0)
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        assert model.state_dict().keys() == names


@pytest.mark.parametrize("name", ["dropout", "attention_dropout"])
def test_dropout_is_a_function_of_the_global_seed_and_off_in_evaluation(name: str) -> None:
    model, plain = (Transformer(llama(**changes), VOCAB, seed=0) for changes in ({name: 0.5}, {}))
    torch.manual_seed(0)
    first = model(tokens())[0]
    torch.manual_seed(0)
    assert torch.equal(model(tokens())[0], first)
    assert not torch.equal(model(tokens())[0], first)
    torch.testing.assert_close(model.eval()(tokens())[0], plain(tokens())[0])


@pytest.mark.parametrize("config", [llama(), gpt2(), vanilla()], ids=["llama", "gpt2", "vanilla"])
def test_under_autocast_the_cache_is_in_the_lower_precision_and_decoding_still_agrees(
    config: TransformerConfig,
) -> None:
    model = Transformer(config, VOCAB, seed=0).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        full = model(tokens())[0]
        head, state = model(tokens()[:, :6], use_state=True)
        tail, state = model(tokens()[:, 6:], state)
    assert state is not None
    assert state.keys_LBKSC.dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat([head, tail], 1).float(), full.float(), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("trains", [True, False])
def test_under_autocast_on_a_cpu_attention_is_trained_in_fp32(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    attend = F.scaled_dot_product_attention

    def watched(q: Tensor, *others: Any, **options: Any) -> Tensor:
        seen.append((q.dtype, torch.is_autocast_enabled("cpu")))
        return attend(q, *others, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    model = Transformer(llama(), VOCAB, seed=0)
    with torch.set_grad_enabled(trains), torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, _ = model(tokens())
    if trains:
        hidden.float().square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert model.embedding.weight.grad is not None
    assert seen
    assert all(autocast != trains for _, autocast in seen)
    assert all(dtype == torch.float32 for dtype, _ in seen) or not trains


def test_attention_dropout_trains_with_rotary_positions() -> None:
    config = TransformerConfig(d_model=16, num_layers=1, num_heads=2, context=8, attention_dropout=0.3)
    model = config.build(11, seed=1).train()
    tokens_BT = torch.arange(16).reshape(2, 8) % 11
    hidden_BTD, _ = model(tokens_BT)
    model.head.loss(hidden_BTD.flatten(0, 1), tokens_BT.flatten()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
