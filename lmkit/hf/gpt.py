"""GPT-2 and GPT: learned positions, LayerNorm, biases, no gate. GPT normalises after each sum, GPT-2 before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lmkit.config.model import Activation, Norm, Positions, TransformerConfig
from lmkit.hf.family import ACTIVATIONS, NO, Family, Row, read_activation, settings
from lmkit.hf.keys import Keys
from lmkit.models.transformer import d_ff


def _read_gpt2(keys: Keys) -> TransformerConfig:
    keys.only("scale_attn_weights", True)
    keys.only("scale_attn_by_inverse_layer_idx", False)
    keys.only("add_cross_attention", False)
    keys.skip("reorder_and_upcast_attn", "embd_pdrop")
    config = _read_gpt(keys, pre_norm=True, act="activation_function", default="gelu_new")
    config.d_ff = keys.optional_whole("n_inner")
    return config


def _read_openai_gpt(keys: Keys) -> TransformerConfig:
    keys.skip("embd_pdrop", "predict_special_tokens")
    if keys.text("afn", "gelu") == "gelu":  # which is the tanh approximation in this family
        keys.data["afn"] = "gelu_new"
    return _read_gpt(keys, pre_norm=False, act="afn", default="gelu_new")


def _read_gpt(keys: Keys, *, pre_norm: bool, act: str, default: str) -> TransformerConfig:
    context = keys.whole("n_positions", 1024 if pre_norm else 512)
    keys.skip("n_ctx")
    return TransformerConfig(
        d_model=keys.whole("n_embd", 768),
        num_layers=keys.whole("n_layer", 12),
        num_heads=keys.whole("n_head", 12),
        context=context,
        positions=Positions.learned,
        norm=Norm.layernorm,
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        pre_norm=pre_norm,
        activation=read_activation(keys, act, default),
        gated=False,
        bias=True,
        tie_embeddings=keys.flag("tie_word_embeddings", True),
        dropout=keys.number("resid_pdrop", 0.1),
        attention_dropout=keys.number("attn_pdrop", 0.1),
    )


def _write_gpt2(config: TransformerConfig) -> dict[str, Any]:
    width = d_ff(config)
    return {
        **_write_gpt(config),
        "n_inner": None if width == 4 * config.d_model else width,
        "activation_function": ACTIVATIONS[config.activation][0],
    }


def _write_openai_gpt(config: TransformerConfig) -> dict[str, Any]:
    return {**_write_gpt(config), "afn": "gelu" if config.activation is Activation.gelu else config.activation.name}


def _write_gpt(config: TransformerConfig) -> dict[str, Any]:
    return {
        "n_positions": config.context,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
    }


def _gpt_lacks(config: TransformerConfig) -> list[str]:
    kv_heads = (None, config.num_heads)
    found = settings(config, positions=(Positions.learned, Positions.sinusoidal), norm=Norm.layernorm, gated=False)
    found += settings(config, num_kv_heads=kv_heads, qk_norm=NO)
    return found + settings(config, head_channels=(None, config.d_model / config.num_heads))


def _gpt2_lacks(config: TransformerConfig) -> list[str]:
    return _gpt_lacks(config) + settings(config, pre_norm=True)


def _openai_gpt_lacks(config: TransformerConfig) -> list[str]:
    found = _gpt_lacks(config) + settings(config, pre_norm=False)
    found += settings(config, activation=(Activation.relu, Activation.gelu, Activation.silu))
    return found + settings(config, d_ff=(None, 4 * config.d_model))


def _gpt_rows(embedding: str, positions: str, final: str | None) -> Callable[..., Iterator[Row]]:
    def rows(config: TransformerConfig) -> Iterator[Row]:
        yield Row("embedding.weight", (embedding,))
        yield Row("positions.weight", (positions,))
        if not config.tie_embeddings:
            yield Row("head.weight", ("lm_head.weight",))
        if final is not None:
            yield from (Row(f"final_norm.{part}", (f"{final}.{part}",)) for part in ("weight", "bias"))
        for i in range(config.num_layers):
            ours, theirs = f"blocks.{i}.", f"transformer.h.{i}."
            for here, there in (
                ("attention_norm", "ln_1"),
                ("feed_forward_norm", "ln_2"),
                ("attention.qkv", "attn.c_attn"),
                ("attention.out", "attn.c_proj"),
                ("feed_forward.up", "mlp.c_fc"),
                ("feed_forward.down", "mlp.c_proj"),
            ):
                how = "same" if here.endswith("norm") else "transposed"
                yield Row(f"{ours}{here}.weight", (f"{theirs}{there}.weight",), how)
                yield Row(f"{ours}{here}.bias", (f"{theirs}{there}.bias",))

    return rows


GPTS = (
    Family(
        name="gpt2",
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        read=_read_gpt2,
        write=_write_gpt2,
        lacks=_gpt2_lacks,
        rows=_gpt_rows("transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f"),
        learned_positions="transformer.wpe.weight",
        ignored=(".attn.bias", ".attn.masked_bias"),
    ),
    Family(
        name="openai-gpt",
        architecture="OpenAIGPTLMHeadModel",
        prefix="transformer.",
        read=_read_openai_gpt,
        write=_write_openai_gpt,
        lacks=_openai_gpt_lacks,
        rows=_gpt_rows("transformer.tokens_embed.weight", "transformer.positions_embed.weight", None),
        learned_positions="transformer.positions_embed.weight",
        ignored=(".attn.bias", "position_ids"),
    ),
)
