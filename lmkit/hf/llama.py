"""Llama and its relatives (Mistral, Qwen2, Qwen3, Gemma): rotary positions, RMSNorm, a gated feed-forward block."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from lmkit.config.model import Activation, Norm, Positions, TransformerConfig
from lmkit.hf.family import ACTIVATIONS, NO, Family, Row, read_activation, settings
from lmkit.hf.keys import Keys
from lmkit.models.transformer import d_ff

ATTENTION_BIASES = ("attention.qkv.bias", "attention.out.bias")
FEED_FORWARD_BIASES = ("feed_forward.gate_up.bias", "feed_forward.down.bias")


def _read_llama(keys: Keys) -> TransformerConfig:
    keys.skip("pretraining_tp", "rope_interleaved")
    attention, mlp = keys.flag("attention_bias", False), keys.flag("mlp_bias", False)
    config = _read_rotary(keys, eps=1e-6, tie=False)
    config.bias = attention or mlp
    if attention != mlp:
        keys.zeros = FEED_FORWARD_BIASES if attention else ATTENTION_BIASES
    return config


def _read_mistral(keys: Keys) -> TransformerConfig:
    return _windowed(_read_rotary(keys, eps=1e-6, tie=False), keys.optional_whole("sliding_window", 4096))


def _read_qwen2(keys: Keys) -> TransformerConfig:
    config = _read_qwen(keys)
    config.qkv_bias = True
    return config


def _read_qwen3(keys: Keys) -> TransformerConfig:
    keys.data.setdefault("head_dim", 128)
    config = _attention_bias(keys, _read_qwen(keys))
    config.qk_norm = True
    return config


def _attention_bias(keys: Keys, config: TransformerConfig) -> TransformerConfig:
    """Biases in the attention, if asked for, and none in the feed-forward block."""
    config.bias = keys.flag("attention_bias", False)
    keys.zeros = FEED_FORWARD_BIASES if config.bias else ()
    return config


def _read_qwen(keys: Keys) -> TransformerConfig:
    slides, window = keys.flag("use_sliding_window", False), keys.optional_whole("sliding_window", 4096)
    keys.skip("max_window_layers")
    config = _read_rotary(keys, eps=1e-6, tie=False)
    return _windowed(config, window) if slides else config


def _windowed(config: TransformerConfig, window: int | None) -> TransformerConfig:
    """Up to the window's length, attention through a window is plain attention: the context ends there."""
    config.context = config.context if window is None else min(config.context, window)
    return config


def _read_gemma(keys: Keys) -> TransformerConfig:
    keys.data.setdefault("head_dim", 256)
    keys.only("use_bidirectional_attention", False)
    for name in ("hidden_act", "hidden_activation"):  # old files say gelu and mean the tanh approximation
        if keys.data.get(name) in (None, "gelu"):
            keys.data[name] = "gelu_pytorch_tanh"
    if keys.text("hidden_activation", "") != keys.text("hidden_act", ""):
        keys.refuse("hidden_activation", keys.data["hidden_activation"], "it differs from hidden_act")
    config = _attention_bias(keys, _read_rotary(keys, eps=1e-6, tie=True))
    config.scale_embeddings = True
    return config


def _read_rotary(keys: Keys, *, eps: float, tie: bool) -> TransformerConfig:
    heads, width = keys.whole("num_attention_heads"), keys.whole("hidden_size")
    layer_types = set(keys.texts("layer_types")) - {"full_attention"}
    if layer_types:
        keys.refuse("layer_types", sorted(layer_types), "lmkit attends to everything in every layer")
    channels = keys.optional_whole("head_dim")
    return TransformerConfig(
        d_model=width,
        num_layers=keys.whole("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=keys.optional_whole("num_key_value_heads"),
        head_channels=None if channels is None or channels * heads == width else channels,
        d_ff=keys.whole("intermediate_size"),
        context=keys.whole("max_position_embeddings"),
        rope_theta=keys.rope_theta(),
        norm_eps=keys.number("rms_norm_eps", eps),
        activation=read_activation(keys, "hidden_act", "silu"),
        tie_embeddings=keys.flag("tie_word_embeddings", tie),
        attention_dropout=keys.number("attention_dropout", 0.0),
    )


def _write_rotary(config: TransformerConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.channels,
        "intermediate_size": d_ff(config),
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": ACTIVATIONS[config.activation][1 if config.activation is Activation.gelu else 0],
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.attention_dropout,
    }


def _write_llama(config: TransformerConfig) -> dict[str, Any]:
    return {**_write_rotary(config), "attention_bias": config.bias, "mlp_bias": config.bias}


def _write_mistral(config: TransformerConfig) -> dict[str, Any]:
    return {**_write_rotary(config), "sliding_window": None}


def _write_qwen(config: TransformerConfig) -> dict[str, Any]:
    return {**_write_rotary(config), "use_sliding_window": False}


def _write_gemma(config: TransformerConfig) -> dict[str, Any]:
    kept = _write_rotary(config)
    return {**kept, "hidden_activation": kept["hidden_act"], "attention_bias": False}


def _rotary_lacks(config: TransformerConfig, **wanted: Any) -> list[str]:
    found = settings(config, positions=Positions.rotary, norm=Norm.rmsnorm, pre_norm=True, gated=True)
    return found + settings(config, **wanted)


def _llama_lacks(config: TransformerConfig) -> list[str]:
    found = _rotary_lacks(config, qkv_bias=(None, config.bias, True), qk_norm=NO)
    if config.d_model % config.num_heads:
        found.append(f"model.num_heads={config.num_heads} with model.d_model={config.d_model}")
    return found


def _mistral_lacks(config: TransformerConfig) -> list[str]:
    return _rotary_lacks(config, bias=False, qkv_bias=NO, qk_norm=NO)


def _qwen2_lacks(config: TransformerConfig) -> list[str]:
    equal = (None, config.d_model / config.num_heads)
    return _rotary_lacks(config, bias=False, qkv_bias=True, qk_norm=NO, head_channels=equal)


def _qwen3_lacks(config: TransformerConfig) -> list[str]:
    return _rotary_lacks(config, bias=False, qkv_bias=NO, qk_norm=True)


def _gemma_lacks(config: TransformerConfig) -> list[str]:
    wanted: dict[str, Any] = {"bias": False, "qkv_bias": NO, "qk_norm": NO, "scale_embeddings": True}
    return _rotary_lacks(config, **wanted, tie_embeddings=True)


def _rows(config: TransformerConfig, norm: str = "same") -> Iterator[Row]:
    yield Row("embedding.weight", ("model.embed_tokens.weight",))
    yield Row("final_norm.weight", ("model.norm.weight",), norm)
    if not config.tie_embeddings:
        yield Row("head.weight", ("lm_head.weight",))
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        yield Row(f"{ours}attention_norm.weight", (f"{theirs}input_layernorm.weight",), norm)
        yield Row(f"{ours}feed_forward_norm.weight", (f"{theirs}post_attention_layernorm.weight",), norm)
        if config.qk_norm:
            for one in ("q_norm", "k_norm"):
                yield Row(f"{ours}attention.{one}.weight", (f"{theirs}self_attn.{one}.weight",))
        for here, there, has_bias in (
            ("attention.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), config.has_qkv_bias),
            ("attention.out", ("self_attn.o_proj",), config.bias),
            ("feed_forward.gate_up", ("mlp.gate_proj", "mlp.up_proj"), config.bias),
            ("feed_forward.down", ("mlp.down_proj",), config.bias),
        ):
            for part in ("weight", *(["bias"] if has_bias else [])):
                yield Row(f"{ours}{here}.{part}", tuple(f"{theirs}{name}.{part}" for name in there))


LLAMAS = (
    Family(
        name="gemma",
        architecture="GemmaForCausalLM",
        prefix="model.",
        read=_read_gemma,
        write=_write_gemma,
        lacks=_gemma_lacks,
        rows=partial(_rows, norm="minus_one"),
        ignored=("rotary_emb.inv_freq",),
    ),
    *(
        Family(
            name=name,
            architecture=architecture,
            prefix="model.",
            read=read,
            write=write,
            lacks=lacks,
            rows=_rows,
            ignored=("rotary_emb.inv_freq",),
        )
        for name, architecture, read, write, lacks in (
            ("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen, _qwen2_lacks),
            ("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen, _qwen3_lacks),
            ("llama", "LlamaForCausalLM", _read_llama, _write_llama, _llama_lacks),
            ("mistral", "MistralForCausalLM", _read_mistral, _write_mistral, _mistral_lacks),
        )
    ),
)
