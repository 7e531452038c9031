"""Models in and out: what is written is read back as it was, and what cannot be expressed is refused by name."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import shapes
import torch
from safetensors.torch import load_file, save_file

from lmkit.config.export import ExportFormat
from lmkit.config.model import Activation, Norm, Positions, TransformerConfig
from lmkit.errors import ConfigError, DataError, ResourceError
from lmkit.hf import ImportedModel, exporting, import_hf, resolve_hf
from lmkit.hf.exporting import Source, export_as, read_plain
from lmkit.hf.families import FAMILIES, family_for
from lmkit.models.transformer import Transformer
from lmkit.tokenizers import ByteTokenizer, CharTokenizer, HfTokenizer, Tokenizer, WordTokenizer, convert

LLAMA = TransformerConfig(d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48, context=40)
GPT2 = replace(LLAMA, num_kv_heads=None, **shapes.GPT2)
GPT = replace(GPT2, pre_norm=False, d_ff=128, activation=Activation.relu)
GEMMA = replace(LLAMA, head_channels=12, activation=Activation.gelu, scale_embeddings=True)
MODELS = {
    "gpt2": GPT2,
    "openai-gpt": GPT,
    "llama": replace(LLAMA, tie_embeddings=False, rope_theta=5e5),
    "mistral": replace(LLAMA, num_heads=6, d_model=40, head_channels=8),
    "qwen2": replace(LLAMA, qkv_bias=True),
    "qwen3": replace(LLAMA, qk_norm=True, head_channels=12),
    "gemma": GEMMA,
}
"""Family -> a Transformer that this family is the first to express."""


def qwen2_bytes() -> HfTokenizer:
    """Bytes, cut in the way of Qwen2, which transformers asks of that family."""
    spec = json.loads(convert.hf_json(ByteTokenizer()))
    split = {"type": "Split", "pattern": {"Regex": convert.QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, spec["pre_tokenizer"]]}
    spec["normalizer"] = {"type": "NFC"}
    return HfTokenizer(json.dumps(spec).encode())


HF_BYTES = qwen2_bytes()
VANILLA = replace(GPT, positions=Positions.sinusoidal, scale_embeddings=True)


@pytest.fixture
def _no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files here are our own: trying each in a child process would take most of the time."""
    monkeypatch.setattr(convert, "try_in_child", lambda cls, content: None)


pytestmark = pytest.mark.usefixtures("_no_child")


def source_of(config: TransformerConfig, tokenizer: Tokenizer | None = None) -> Source:
    tokenizer = tokenizer or ByteTokenizer()
    model = Transformer(config, tokenizer.vocab_size, seed=1).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return Source(model, config, tokenizer)


def exported(folder: Path, config: TransformerConfig, tokenizer: Tokenizer | None = None) -> Source:
    source = source_of(config, tokenizer)
    folder.mkdir(exist_ok=True)
    export_as(ExportFormat.hf, source, folder)
    return source


def change(folder: Path, **values: Any) -> None:
    """Set keys of a folder's config.json; a value of ... takes the key out."""
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}), encoding="utf-8")


def same_logits(ours: Transformer, imported: ImportedModel) -> bool:
    tokens = torch.randint(ours.vocab_size, (2, min(20, imported.model_config.context)))
    model = imported.build()
    with torch.no_grad():
        a, b = (m.head.logits(m(tokens)[0]) for m in (ours, model))
    return torch.allclose(a, b, atol=1e-5)


def test_transformers_that_cannot_be_imported_stop_no_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError('it needs tokenizers 9')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    (tmp_path / "m").mkdir()
    found = export_as(ExportFormat.hf, source_of(LLAMA), tmp_path / "m")
    assert found["checked"].endswith("; transformers cannot be imported and was not asked (it needs tokenizers 9)")


@pytest.mark.parametrize("name", FAMILIES)
def test_export_then_import_is_the_identity(tmp_path: Path, name: str) -> None:
    assert family_for(MODELS[name]).name == name
    source = exported(tmp_path / "m", MODELS[name], HF_BYTES)
    imported = import_hf(tmp_path / "m")
    assert imported.family == name
    state = source.model.state_dict()
    assert state.keys() == imported.state_dict.keys()
    for key, tensor in state.items():
        close = torch.allclose(tensor, imported.state_dict[key], atol=1e-6)  # gemma stores its norms minus one
        assert torch.equal(tensor, imported.state_dict[key]) or (name == "gemma" and close), key
    assert same_logits(source.model, imported)
    assert imported.tokenizer.encode("añ\n 我").tolist() == source.tokenizer.encode("añ\n 我").tolist()
    assert imported.tokenizer.eos_id == source.tokenizer.eos_id


def test_the_tensors_stand_under_the_names_that_the_families_have(tmp_path: Path) -> None:
    """Export and import share one table: this one is written down from the models of transformers."""
    llama = exported(tmp_path / "llama", MODELS["llama"]).model.state_dict()
    found = load_file(tmp_path / "llama" / "model.safetensors")
    gate_up, qkv = llama["blocks.1.feed_forward.gate_up.weight"], llama["blocks.1.attention.qkv.weight"]
    layer = {
        "self_attn.q_proj": qkv[:32],
        "self_attn.k_proj": qkv[32:48],
        "self_attn.v_proj": qkv[48:],
        "self_attn.o_proj": llama["blocks.1.attention.out.weight"],
        "mlp.gate_proj": gate_up[:48],
        "mlp.up_proj": gate_up[48:],
        "mlp.down_proj": llama["blocks.1.feed_forward.down.weight"],
        "input_layernorm": llama["blocks.1.attention_norm.weight"],
        "post_attention_layernorm": llama["blocks.1.feed_forward_norm.weight"],
    }
    for name, tensor in layer.items():
        assert torch.equal(found.pop(f"model.layers.1.{name}.weight"), tensor)
    rest = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert {name for name in found if ".layers.0." not in name} == rest
    gpt2 = exported(tmp_path / "gpt2", GPT2).model.state_dict()
    found = load_file(tmp_path / "gpt2" / "model.safetensors")
    for theirs, ours in (("attn.c_attn", "attention.qkv"), ("attn.c_proj", "attention.out")):
        assert torch.equal(found[f"transformer.h.1.{theirs}.weight"], gpt2[f"blocks.1.{ours}.weight"].T)
    for theirs, ours in (("mlp.c_fc", "feed_forward.up"), ("mlp.c_proj", "feed_forward.down")):
        assert torch.equal(found[f"transformer.h.1.{theirs}.weight"], gpt2[f"blocks.1.{ours}.weight"].T)
    gemma = exported(tmp_path / "gemma", GEMMA).model.state_dict()
    found = load_file(tmp_path / "gemma" / "model.safetensors")
    assert torch.allclose(found["model.norm.weight"] + 1, gemma["final_norm.weight"], atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_imported_exports_as_the_same_family_and_configuration(tmp_path: Path, name: str) -> None:
    exported(tmp_path / "a", MODELS[name], HF_BYTES)
    once = import_hf(tmp_path / "a")
    family = FAMILIES[name]
    assert family.lacks(once.model_config) == []
    exported(tmp_path / "b", once.model_config, HF_BYTES)
    assert import_hf(tmp_path / "b").model_config == once.model_config


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (VANILLA, "openai-gpt"),
        (replace(GPT2, bias=False, scale_embeddings=True), "gpt2"),
        (replace(GPT2, positions=Positions.sinusoidal, tie_embeddings=False, scale_embeddings=True), "gpt2"),
        (replace(LLAMA, scale_embeddings=True, tie_embeddings=False), "llama"),
        (replace(LLAMA, bias=True), "llama"),
        (replace(LLAMA, qkv_bias=True), "llama"),
    ],
)
def test_a_model_in_other_terms_computes_the_same(tmp_path: Path, config: TransformerConfig, family: str) -> None:
    source = exported(tmp_path / "m", config)
    imported = import_hf(tmp_path / "m")
    assert imported.family == family
    assert same_logits(source.model, imported)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (replace(LLAMA, positions=Positions.sinusoidal), "model.positions=sinusoidal"),
        (replace(LLAMA, pre_norm=False), "model.pre_norm=false"),
        (replace(LLAMA, norm=Norm.layernorm), "model.norm=layernorm"),
        (replace(LLAMA, gated=False), "model.gated=false"),
        (replace(GPT2, num_kv_heads=2), "model.num_kv_heads=2"),
        (replace(VANILLA, d_ff=48), "model.d_ff=48"),
        (replace(LLAMA, bias=True, qkv_bias=False), "model.qkv_bias=false"),
    ],
)
def test_what_no_stock_class_computes_is_refused_by_name(config: TransformerConfig, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        family_for(config)


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("llama", {"rope_theta": ..., "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"quantization_config": {"bits": 4}}),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "x.Y"}}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("gemma", {"final_logit_softcapping": 30.0}),
        ("gemma", {"attn_logit_softcapping": 50.0}),
        ("gemma", {"use_bidirectional_attention": True}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"add_cross_attention": True}),
        ("gpt2", {"activation_function": "gelu"}),
    ],
)
def test_an_option_that_lmkit_lacks_is_refused_by_name(tmp_path: Path, family: str, values: dict[str, Any]) -> None:
    exported(tmp_path / "m", MODELS[family], HF_BYTES)
    change(tmp_path / "m", **values)
    with pytest.raises(ConfigError, match=list(values)[-1]):
        import_hf(tmp_path / "m")


def test_an_unknown_family_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    exported(tmp_path / "m", LLAMA)
    change(tmp_path / "m", model_type="mamba")
    with pytest.raises(ConfigError, match=r"model_type=mamba.*gpt2"):
        import_hf(tmp_path / "m")


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "32"},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": True},
        {"rms_norm_eps": None, "intermediate_size": ...},
        {"tie_word_embeddings": 1},
        {"layer_types": "full"},
        {"vocab_size": 300},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
        {"intermediate_size": 64},
        {"attention_bias": 0},
        {"rope_parameters": [1]},
    ],
)
def test_a_configuration_that_does_not_fit_its_weights_is_a_data_error(tmp_path: Path, values: dict[str, Any]) -> None:
    exported(tmp_path / "m", LLAMA)
    change(tmp_path / "m", **values)
    with pytest.raises(DataError, match="m"):
        import_hf(tmp_path / "m")


def test_heads_that_do_not_fit_are_an_error_with_the_place(tmp_path: Path) -> None:
    exported(tmp_path / "m", LLAMA)
    change(tmp_path / "m", num_attention_heads=5, num_key_value_heads=2)
    with pytest.raises(ConfigError, match=r"config\.json.*num_kv_heads"):
        import_hf(tmp_path / "m")


def test_the_new_place_of_rope_theta_is_read(tmp_path: Path) -> None:
    exported(tmp_path / "m", replace(LLAMA, rope_theta=5e5))
    change(tmp_path / "m", rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    assert import_hf(tmp_path / "m").model_config.rope_theta == 5e5


@pytest.mark.parametrize(("family", "more"), [("mistral", {}), ("qwen2", {"use_sliding_window": True})])
def test_a_window_shorter_than_the_context_ends_the_context(tmp_path: Path, family: str, more: dict[str, Any]) -> None:
    exported(tmp_path / "m", MODELS[family], HF_BYTES)
    change(tmp_path / "m", sliding_window=16, **more)
    assert import_hf(tmp_path / "m").model_config.context == 16


def test_biases_of_a_part_only_are_imported_as_zeros_in_the_rest(tmp_path: Path) -> None:
    source = exported(tmp_path / "m", replace(LLAMA, bias=True))
    path = tmp_path / "m" / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "mlp" not in k or "bias" not in k}, path)
    change(tmp_path / "m", mlp_bias=False)
    state = import_hf(tmp_path / "m").state_dict
    assert not state["blocks.1.feed_forward.down.bias"].any()
    assert torch.equal(state["blocks.1.attention.out.bias"], source.model.state_dict()["blocks.1.attention.out.bias"])


def test_biases_that_the_configuration_announces_must_be_there(tmp_path: Path) -> None:
    exported(tmp_path / "m", LLAMA)
    change(tmp_path / "m", attention_bias=True)
    with pytest.raises(DataError, match=r"q_proj\.bias is missing"):
        import_hf(tmp_path / "m")


# Files


def shard(folder: Path) -> list[str]:
    """Cut model.safetensors in two files with an index; returns their names."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    files = [f"model-{i}-of-2.safetensors" for i in (1, 2)]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file)
    table = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}), encoding="utf-8")
    (folder / "model.safetensors").unlink()
    return files


def test_sharded_files_are_read(tmp_path: Path) -> None:
    source = exported(tmp_path / "m", GPT2)
    shard(tmp_path / "m")
    assert same_logits(source.model, import_hf(tmp_path / "m"))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    exported(tmp_path / "m", GPT2)
    files = shard(tmp_path / "m")
    (tmp_path / "m" / files[1]).unlink()
    with pytest.raises(DataError, match=files[1]):
        import_hf(tmp_path / "m")


@pytest.mark.parametrize("name", ["../../secret.safetensors", "model.bin", "/etc/passwd"])
def test_an_index_cannot_name_files_outside_the_folder_or_pickles(tmp_path: Path, name: str) -> None:
    exported(tmp_path / "m", GPT2)
    shard(tmp_path / "m")
    index = {"weight_map": {"wte.weight": name}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(DataError, match="no safetensors file of the folder"):
        import_hf(tmp_path / "m")


def test_a_pickle_is_refused_with_the_remedy(tmp_path: Path) -> None:
    exported(tmp_path / "m", GPT2)
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"pytorch_model\.bin only, a pickle.*save_pretrained"):
        import_hf(tmp_path / "m")


def test_names_without_the_prefix_and_computed_tensors_are_read_as_in_old_files(tmp_path: Path) -> None:
    source = exported(tmp_path / "m", GPT2)
    path = tmp_path / "m" / "model.safetensors"
    old = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file({**old, "h.0.attn.bias": torch.ones(1, 1, 40, 40), "h.0.attn.masked_bias": torch.tensor(-1e4)}, path)
    assert same_logits(source.model, import_hf(tmp_path / "m"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    exported(tmp_path / "m", LLAMA)
    path = tmp_path / "m" / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    assert {tensor.dtype for tensor in import_hf(tmp_path / "m").state_dict.values()} == {torch.float32}


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    exported(tmp_path / "m", LLAMA)
    path = tmp_path / "m" / "model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ConfigError, match="I8: quantized"):
        import_hf(tmp_path / "m")


def test_tensors_that_nobody_reads_are_refused_by_name(tmp_path: Path) -> None:
    exported(tmp_path / "m", LLAMA)
    path = tmp_path / "m" / "model.safetensors"
    save_file({**load_file(path), "model.layers.0.self_attn.sinks": torch.zeros(3)}, path)
    with pytest.raises(DataError, match="sinks is unknown"):
        import_hf(tmp_path / "m")


@pytest.mark.parametrize(("config", "name"), [(LLAMA, "model.embed_tokens.weight"), (GPT2, "transformer.wte.weight")])
def test_of_tied_weights_a_file_may_hold_the_head_alone(tmp_path: Path, config: TransformerConfig, name: str) -> None:
    source = exported(tmp_path / "m", config)
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    head = tensors.pop(name)
    save_file({**tensors, "lm_head.weight": head}, path)
    assert same_logits(source.model, import_hf(tmp_path / "m"))


def test_a_head_beside_tied_embeddings_must_be_the_same(tmp_path: Path) -> None:
    exported(tmp_path / "m", LLAMA)
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    import_hf(tmp_path / "m")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path)
    with pytest.raises(DataError, match="tie_word_embeddings"):
        import_hf(tmp_path / "m")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff" * 64])
def test_a_missing_or_damaged_file_is_a_data_error_that_names_it(
    tmp_path: Path, file: str, content: bytes | None
) -> None:
    exported(tmp_path / "m", LLAMA)
    if content is None:
        (tmp_path / "m" / file).unlink()
    else:
        (tmp_path / "m" / file).write_bytes(content)
    with pytest.raises(DataError, match=file.replace(".", r"\.")):
        import_hf(tmp_path / "m")


def test_a_padded_vocabulary_gets_tokens_that_no_text_holds(tmp_path: Path) -> None:
    exported(tmp_path / "m", LLAMA)
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    table = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "model.embed_tokens.weight": torch.cat([table, table[:7]])}, path)
    change(tmp_path / "m", vocab_size=264)
    imported = import_hf(tmp_path / "m")
    assert imported.vocab_size == imported.tokenizer.vocab_size == 264
    assert imported.tokenizer.eos_id == 256
    text = "a <|unused_260|> b"
    assert max(imported.tokenizer.encode(text)) < 256
    assert imported.tokenizer.decode([97, 260, 98]) == "ab"


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    exported(tmp_path / "m", LLAMA)
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:200].clone()}, path)
    change(tmp_path / "m", vocab_size=200)
    with pytest.raises(DataError, match=r"only 200 types; put the tokenizer\.json there"):
        import_hf(tmp_path / "m")


def test_a_tokenizer_without_an_end_of_document_is_refused(tmp_path: Path) -> None:
    exported(tmp_path / "m", LLAMA)
    path = tmp_path / "m" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("<|endoftext|>", "<|other|>"), encoding="utf-8")
    with pytest.raises(DataError, match=r"no end-of-document token.*; put the tokenizer\.json there"):
        import_hf(tmp_path / "m")


# Names


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert resolve_hf("model") == (tmp_path / "model").resolve()


@pytest.mark.parametrize("name", ["", "./missing", "/missing/model", "a/b/c", "~/missing", "x\\y"])
def test_what_can_be_no_model_of_the_hub_is_refused_at_once(name: str) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        resolve_hf(name)


def test_the_hub_out_of_reach_is_a_data_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="nobody/nothing is neither a folder nor can it be had from the hub"):
        resolve_hf("nobody/nothing")


# The options that families brought


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma", "mistral"])
def test_decoding_with_a_cache_gives_what_one_pass_gives(name: str) -> None:
    model = source_of(MODELS[name]).model
    tokens = torch.randint(model.vocab_size, (2, 12))
    with torch.no_grad():
        whole, _ = model(tokens)
        state, parts = None, []
        for piece in tokens.split([5, 1, 1, 5], dim=1):
            hidden, state = model(piece, state, use_state=True)
            parts.append(hidden)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma", "mistral"])
def test_training_computes_what_evaluation_computes(name: str) -> None:
    model = source_of(MODELS[name]).model
    tokens = torch.randint(model.vocab_size, (2, 12))
    trained, _ = model(tokens)
    with torch.no_grad():
        evaluated, _ = model(tokens)
    assert torch.allclose(trained, evaluated, atol=1e-5)
    trained.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter is not model.head.weight)


# Plain weights and checks


@pytest.mark.parametrize("config", [LLAMA, VANILLA, MODELS["llama"]])
def test_plain_weights_are_read_as_they_were(tmp_path: Path, config: TransformerConfig) -> None:
    source = source_of(config, WordTokenizer(["a", "b"]))
    export_as(ExportFormat.safetensors, source, tmp_path)
    model, tokenizer = read_plain(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in source.model.state_dict().items())
    assert tokenizer.digest == source.tokenizer.digest


def test_an_export_that_computes_something_else_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(family: Any, config: Any, state: Any) -> dict[str, torch.Tensor]:
        tensors = right(family, config, state)
        name = "model.layers.1.mlp.up_proj.weight"
        return tensors | {name: tensors[name] * 1.01}

    right = exporting.to_theirs
    monkeypatch.setattr(exporting, "to_theirs", wrong)
    with pytest.raises(DataError, match="logits differ by up to"):
        exported(tmp_path / "m", LLAMA)


def test_an_export_whose_tokenizer_differs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = CharTokenizer("".join(sorted(set("abcdefghij"))))
    other = CharTokenizer("".join(sorted(set("abcdefghik"))))
    right = exporting.hf_json
    monkeypatch.setattr(exporting, "hf_json", lambda given: right(other))
    with pytest.raises(DataError, match="encodes text otherwise"):
        exported(tmp_path / "m", LLAMA, tokenizer)


# Other formats


def test_a_missing_package_is_a_resource_error_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for package, kind in (("gguf", ExportFormat.gguf), ("onnx", ExportFormat.onnx)):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ResourceError, match=rf"lmkit\[{package}\]"):
            export_as(kind, source_of(LLAMA), tmp_path)


GGUF = {name: config for name, config in MODELS.items() if name != "openai-gpt"} | {
    "biased": replace(LLAMA, bias=True),
    "sinusoids": replace(GPT2, positions=Positions.sinusoidal, scale_embeddings=True),
}


@pytest.mark.extra("gguf")
@pytest.mark.parametrize("name", GGUF)
def test_a_gguf_file_holds_the_model(tmp_path: Path, name: str) -> None:
    pytest.importorskip("gguf")
    from lmkit.hf.gguf_file import read_gguf

    source = source_of(GGUF[name])
    export_as(ExportFormat.gguf, source, tmp_path)
    model, tokens = read_gguf(tmp_path / "model.gguf")
    assert len(tokens) == source.tokenizer.vocab_size
    x = torch.randint(257, (2, 20))
    with torch.no_grad():
        a, b = (m.head.logits(m(x)[0]) for m in (source.model, model))
    assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.extra("gguf")
def test_rows_of_q_and_k_stand_in_gguf_as_llama_cpp_turns_them(tmp_path: Path) -> None:
    """The formula of llama.cpp's convert_hf_to_gguf.py (LlamaModel.permute)."""
    gguf = pytest.importorskip("gguf")
    source = source_of(LLAMA)
    export_as(ExportFormat.gguf, source, tmp_path)
    stored = {one.name: one.data for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    qkv = source.model.state_dict()["blocks.1.attention.qkv.weight"].numpy()
    for name, rows, heads in (("q", qkv[:32], 4), ("k", qkv[32:48], 2)):
        permuted = rows.reshape(heads, 2, len(rows) // heads // 2, 32).swapaxes(1, 2).reshape(rows.shape)
        assert (stored[f"blk.1.attn_{name}.weight"] == permuted).all()
    assert (stored["blk.1.attn_v.weight"] == qkv[48:]).all()


def test_a_model_that_no_family_computes_is_refused_with_what_the_nearest_lacks() -> None:
    with pytest.raises(ConfigError, match=r"[:,] llama has no model\.memory_tokens=4[,;]"):
        family_for(TransformerConfig(memory_tokens=4))
    with pytest.raises(ConfigError, match=r": qwen3 has no model\.qk_norm=null;"):
        family_for(TransformerConfig(), ["qwen3"])


@pytest.mark.extra("gguf")
def test_gguf_refuses_what_llama_cpp_lacks(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    for config, tokenizer, named in (
        (VANILLA, ByteTokenizer(), "pre_norm"),
        (replace(LLAMA, activation=Activation.relu), ByteTokenizer(), "model.activation=relu"),
        (LLAMA, WordTokenizer(["a"]), "tokenizer like word"),
        (LLAMA, CharTokenizer("ab"), "tokenizer like char"),
    ):
        with pytest.raises(ConfigError, match=named):
            export_as(ExportFormat.gguf, source_of(config, tokenizer), tmp_path)


def test_a_tokenizer_json_that_does_not_say_what_its_model_is_becomes_gguf_too() -> None:
    """As that of GPT-2 on the hub, which is older than the key."""
    from lmkit.hf.gguf_file import _split_name, _vocabulary

    spec = json.loads(convert.hf_json(ByteTokenizer()))
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    del spec["model"]["type"]
    vocabulary = _vocabulary(HfTokenizer(json.dumps(spec).encode()))
    assert (vocabulary.model, vocabulary.split, len(vocabulary.tokens)) == ("gpt2", "gpt-2", 257)
    spec["pre_tokenizer"] = None
    with pytest.raises(ConfigError, match="None and BPE of this one do not"):
        _vocabulary(HfTokenizer(json.dumps(spec).encode()))
    assert _split_name({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}, "model": {}}) is None


@pytest.mark.extra("onnx")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "openai-gpt", "qwen3", "gemma", "vanilla"])
def test_an_onnx_graph_computes_the_logits(tmp_path: Path, name: str) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    about = export_as(ExportFormat.onnx, source_of(MODELS.get(name, VANILLA)), tmp_path)
    assert "ONNX Runtime" in about["checked"]
