"""Agreement with the transformers library, where it is installed: logits, greedy text, token ids, both ways."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import shapes
import torch

from lmkit.config.data import (
    ByteTokenizerConfig,
    CharTokenizerConfig,
    SentencePieceKind,
    SentencePieceTokenizerConfig,
    TokenizerConfig,
    WordTokenizerConfig,
)
from lmkit.config.export import ExportFormat
from lmkit.config.model import Activation, TransformerConfig
from lmkit.hf import import_hf
from lmkit.hf.exporting import Source, export_as
from lmkit.hf.sample import PAGE
from lmkit.models.transformer import Transformer
from lmkit.tokenizers import ByteTokenizer, Tokenizer, train_tokenizer

VOCAB = 257
GPT = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": None,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {**GPT, "n_inner": 40, "activation_function": "gelu_new"}),
    "openai-gpt": ("openai-gpt", {**GPT, "afn": "gelu"}),
    "llama": ("llama", {**LLAMA, "rope_theta": 5e5}),
    "llama-with-biases": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "smollm": ("llama", {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**LLAMA, "head_dim": 16, "sliding_window": None}),
    "mistral-with-window": ("mistral", {**LLAMA, "sliding_window": 24}),
    "qwen2": ("qwen2", {**LLAMA, "rope_theta": 1e6}),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 12, "tie_word_embeddings": True}),
    "gemma": ("gemma", {**LLAMA, "num_key_value_heads": 1, "head_dim": 16}),
}


def random_model(folder: Path, name: str) -> Any:
    """A randomly initialised model of a family, saved with a tokenizer."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    family, values = CONFIGS[name]
    config = transformers.AutoConfig.for_model(family, **values)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size="30KB" if name in ("llama", "gpt2") else "1GB")
    from lmkit.tokenizers.convert import hf_json

    (folder / "tokenizer.json").write_bytes(hf_json(ByteTokenizer()))
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_an_imported_model_has_the_logits_and_the_greedy_text_of_the_original(tmp_path: Path, name: str) -> None:
    original = random_model(tmp_path, name)
    imported = import_hf(tmp_path)
    model = imported.build()
    tokens = torch.randint(VOCAB, (3, min(40, imported.model_config.context)))
    with torch.no_grad():
        theirs, ours = original(tokens).logits, model.head.logits(model(tokens)[0])
    assert float((theirs - ours).abs().max()) < 1e-4
    prompt = tokens[:1, :8]
    assert greedy(model, prompt, 12) == generated(original, prompt, 12)


def greedy(model: Transformer, tokens: torch.Tensor, count: int) -> list[int]:
    """The prompt and its most probable continuation, one token after the other from the cache."""
    ids, state, last = tokens[0].tolist(), None, tokens
    with torch.no_grad():
        for _ in range(count):
            hidden, state = model(last, state, use_state=True)
            ids.append(int(model.head.logits(hidden[:, -1]).argmax()))
            last = torch.tensor([ids[-1:]])
    return ids


def generated(model: Any, tokens: torch.Tensor, count: int) -> list[int]:
    """The same from the generate method of transformers."""
    mask = torch.ones_like(tokens)
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found: list[int] = model.generate(tokens, attention_mask=mask, **options)[0].tolist()
    return found


PRESETS = {
    "small": TransformerConfig(d_model=32, num_layers=2, num_heads=4, context=64),
    "medium": TransformerConfig(d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, context=64),
    "gpt2": TransformerConfig(d_model=32, num_layers=2, num_heads=4, context=64, **shapes.GPT2),
    "vanilla": TransformerConfig(d_model=32, num_layers=2, num_heads=4, context=64, **shapes.VANILLA),
    "qwen2": TransformerConfig(d_model=32, num_layers=2, num_heads=4, context=64, qkv_bias=True),
    "qwen3": TransformerConfig(d_model=32, num_layers=2, num_heads=4, context=64, qk_norm=True, head_channels=12),
    "gemma": TransformerConfig(
        d_model=32, num_layers=2, num_heads=4, context=64, activation=Activation.gelu, scale_embeddings=True
    ),
}
"""Small models of the shapes of the presets, and of the shapes that families brought."""


def exported(folder: Path, config: TransformerConfig, tokenizer: Tokenizer) -> Source:
    model = Transformer(config, tokenizer.vocab_size, seed=1).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    source = Source(model, config, tokenizer)
    folder.mkdir(exist_ok=True)
    export_as(ExportFormat.hf, source, folder)
    return source


@pytest.mark.extra("hf")
@pytest.mark.parametrize("name", PRESETS)
def test_every_shape_loads_with_no_custom_code_and_continues_greedily_the_same(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    source = exported(tmp_path, PRESETS[name], ByteTokenizer())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True)
    prompt = torch.randint(VOCAB, (1, 8))
    assert greedy(source.model, prompt, 12) == generated(model, prompt, 12)


@pytest.mark.extra("hf")
@pytest.mark.parametrize(
    "config",
    [
        WordTokenizerConfig(),
        CharTokenizerConfig(),
        ByteTokenizerConfig(),
        SentencePieceTokenizerConfig(vocab_size=500),
        SentencePieceTokenizerConfig(vocab_size=500, algorithm=SentencePieceKind.bpe),
    ],
    ids=["word", "char", "byte", "unigram", "bpe"],
)
def test_every_tokenizer_encodes_a_page_of_mixed_text_the_same(tmp_path: Path, config: TokenizerConfig) -> None:
    transformers = pytest.importorskip("transformers")
    text = PAGE * 3 + Path(__file__).read_text(encoding="utf-8")
    tokenizer = train_tokenizer(config, lambda: iter([text]))
    exported(tmp_path, PRESETS["small"], tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for sample in (PAGE, text, "", "\n", " x ", "one\ntwo"):
        assert theirs.encode(sample) == tokenizer.encode(sample).tolist()
    ids = tokenizer.encode("the cat\nsat\n").tolist()
    assert theirs.decode(ids) == tokenizer.decode(ids)
    assert theirs.eos_token_id == (None if tokenizer.ends_lines else tokenizer.eos_id)
    again = import_hf(tmp_path).tokenizer
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert again.eos_id == tokenizer.eos_id


@pytest.mark.extra("gguf")
@pytest.mark.extra("hf")
@pytest.mark.parametrize("name", ["medium", "gpt2", "qwen2", "qwen3"])
def test_the_gguf_reader_of_transformers_finds_the_same_model(tmp_path: Path, name: str) -> None:
    """Another program's reader, which turns the rows of q and k back by itself. It takes GPT-2's context and the
    channels of Qwen3's heads for granted."""
    transformers = pytest.importorskip("transformers")
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package)
    usual = {"gpt2": {"context": 1024}, "qwen3": {"head_channels": 128}}
    config = replace(PRESETS[name], **usual.get(name, {}))
    source = exported(tmp_path / "hf", config, ByteTokenizer())
    (tmp_path / "gguf").mkdir()
    export_as(ExportFormat.gguf, source, tmp_path / "gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32, local_files_only=True
    ).eval()
    tokens = torch.randint(VOCAB, (2, 20))
    with torch.no_grad():
        ours = source.model.head.logits(source.model(tokens)[0])
        assert float((model(tokens).logits - ours).abs().max()) < 1e-4
