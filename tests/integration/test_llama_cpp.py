"""llama.cpp itself, through llama-cpp-python, on exported GGUF files: its tokens, its logits, its continuation."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapes
import torch
import yaml

from lmkit import presets
from lmkit.commands import export, generate, pretrain
from lmkit.config.commands import PretrainConfig
from lmkit.config.data import SentencePieceKind, SentencePieceTokenizerConfig
from lmkit.config.export import ExportConfig, ExportFormat
from lmkit.config.generation import GenerateConfig, SamplingConfig
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import Activation, Positions, TransformerConfig
from lmkit.config.plain import from_plain
from lmkit.config.training import ExistingRunConfig
from lmkit.errors import ConfigError
from lmkit.hf.exporting import Source, export_as
from lmkit.hf.sample import PAGE
from lmkit.models.transformer import Transformer
from lmkit.tokenizers import ByteTokenizer, HfTokenizer, Tokenizer, train_tokenizer
from lmkit.tokenizers.convert import QWEN2_SPLIT

pytestmark = pytest.mark.extra("llama-cpp")

SMALL = TransformerConfig(d_model=32, num_layers=2, num_heads=4, context=64)
GPT = replace(SMALL, **shapes.GPT2)
SHAPES = {
    "llama": replace(SMALL, num_kv_heads=2, tie_embeddings=False),
    "llama-with-biases": replace(SMALL, bias=True),
    "smollm": replace(SMALL, num_kv_heads=1),
    "mistral": replace(SMALL, head_channels=16, rope_theta=5e5),
    "qwen2": replace(SMALL, qkv_bias=True, num_kv_heads=2),
    "qwen3": replace(SMALL, qk_norm=True, head_channels=12),
    "gemma": replace(SMALL, activation=Activation.gelu, scale_embeddings=True, num_kv_heads=1, head_channels=16),
    "gpt2": GPT,
    "gpt2-with-sinusoids": replace(GPT, positions=Positions.sinusoidal, scale_embeddings=True),
}
"""Small models of the shapes of the families."""
TEXT = PAGE * 3 + Path(__file__).read_text(encoding="utf-8")
SAMPLES = [
    PAGE,
    TEXT,
    "",
    " ",
    "\n",
    " x ",
    "one\ntwo",
    "a  b\n\n  c",
    "Hello world 12345",
    "don't DON'T",
    "<0x41>",
    "</s>",
]


def llama(path: Path) -> Any:
    """The file as llama.cpp loads it, keys and values kept in fp32."""
    llama_cpp = pytest.importorskip("llama_cpp")
    options = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "n_threads": 1}
    return llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, **options)


@contextlib.contextmanager
def exported(folder: Path, config: TransformerConfig, tokenizer: Tokenizer) -> Iterator[tuple[Transformer, Any]]:
    """A model of random weights, and the same from its file."""
    for package in ("gguf", "llama_cpp"):
        pytest.importorskip(package)
    model = Transformer(config, tokenizer.vocab_size, seed=1).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    export_as(ExportFormat.gguf, Source(model, config, tokenizer), folder)
    theirs = llama(folder / "model.gguf")
    yield model, theirs
    theirs.close()


def greedy(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """The most probable continuation, by whole forward passes."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model.head.logits(model(torch.tensor([ids]))[0][:, -1]).argmax()))
    return ids[len(prompt) :]


def agree(model: Transformer, config: TransformerConfig, theirs: Any) -> None:
    """The logits of 16 random tokens, and 24 tokens after them. llama.cpp looks gelu up in a table of fp16 values."""
    prompt = torch.randint(model.vocab_size, (16,), generator=torch.Generator().manual_seed(3)).tolist()
    theirs.eval(prompt)
    with torch.no_grad():
        ours = model.head.logits(model(torch.tensor([prompt]))[0])[0].numpy()
    tolerance = 5e-3 if config.activation is Activation.gelu else 1e-4
    assert float(np.abs(theirs.scores[:16] - ours).max()) < tolerance
    stream = theirs.generate(prompt, temp=0.0)
    assert [next(stream) for _ in range(24)] == greedy(model, prompt, 24)


@pytest.mark.parametrize("name", SHAPES)
def test_every_family_has_the_logits_and_the_greedy_tokens(tmp_path: Path, name: str) -> None:
    with exported(tmp_path, SHAPES[name], ByteTokenizer()) as (model, theirs):
        agree(model, SHAPES[name], theirs)


TRANSFORMERS = [
    name
    for name in presets.names_in("model")
    if presets.schema_name("model", name) == "transformer" and name != "transformer_xl"  # memory: no stock architecture
]
REFUSED = {"vanilla": "pre_norm"}
"""Presets that llama.cpp has no architecture for, and the key that it lacks."""


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_transformer_preset_agrees_or_is_refused_by_name(tmp_path: Path, name: str) -> None:
    values = yaml.safe_load((presets.config_dir() / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    del values["defaults"]
    preset = from_plain(TransformerConfig, values)
    small = replace(preset, d_model=8 * preset.num_heads, num_layers=2, context=64)
    refusal = pytest.raises(ConfigError, match=REFUSED[name]) if name in REFUSED else contextlib.nullcontext()
    with refusal, exported(tmp_path, small, ByteTokenizer()) as (model, theirs):
        agree(model, small, theirs)


def pieces(kind: SentencePieceKind) -> Tokenizer:
    return train_tokenizer(SentencePieceTokenizerConfig(vocab_size=600, algorithm=kind), lambda: iter([TEXT]))


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
AFTER = {**BYTE_LEVEL, "use_regex": False}
CUTS: dict[str, dict[str, Any]] = {
    "gpt2": BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]},
}
for cut, regex in (("qwen2", QWEN2_SPLIT), ("llama3", QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|"))):
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    CUTS[cut] = {"type": "Sequence", "pretokenizers": [split, AFTER]}


def merges_of_bytes(cut: str) -> Tokenizer:
    """A byte-level BPE trained by the tokenizers library, with a special and a plain added token.

    It is trained on words as GPT-2 cuts them, so that its merges would join what the other ways keep apart.
    """
    tokenizers = pytest.importorskip("tokenizers")
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    spec = json.loads(learner.to_str()) | {"pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL}
    learner = tokenizers.Tokenizer.from_str(json.dumps(spec))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    learner.train_from_iterator([TEXT, " 12345 DON'T" * 20], trainer)
    learner.add_tokens(["<call>"])
    spec = json.loads(learner.to_str()) | {"pre_tokenizer": CUTS[cut]}
    spec["model"]["ignore_merges"] = cut == "llama3"
    return HfTokenizer(json.dumps(spec).encode())


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte": ByteTokenizer,
    "bpe": lambda: pieces(SentencePieceKind.bpe),
    "unigram": lambda: pieces(SentencePieceKind.unigram),
    **{cut: (lambda cut=cut: merges_of_bytes(cut)) for cut in CUTS},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_itself_cuts_text_into_the_same_tokens(tmp_path: Path, name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    with exported(tmp_path, SMALL, tokenizer) as (model, theirs):
        samples = [*SAMPLES, "a <call> b"] if name in CUTS else SAMPLES
        for sample in samples:
            expected = tokenizer.encode(sample).tolist()
            if name == "unigram":  # llama.cpp has no bytes there, as the export says
                known = {id for id, piece in enumerate(tokenizer.pieces_and_scores()[0]) if not piece.startswith("<0x")}  # type: ignore[attr-defined]
                if not set(expected) <= known:
                    continue
            assert theirs.tokenize(sample.encode(), add_bos=False, special=False) == expected, sample
            assert theirs.tokenize(sample.encode(), add_bos=True, special=False) == [tokenizer.eos_id, *expected]
        ids = tokenizer.encode("Hello world").tolist()
        assert theirs.detokenize(ids).decode() == tokenizer.decode(ids)
        prompt = [tokenizer.eos_id, *tokenizer.encode("one\ntwo").tolist()]
        stream = theirs.generate(theirs.tokenize(b"one\ntwo"), temp=0.0)
        assert [next(stream) for _ in range(20)] == greedy(model, prompt, 20)


def test_a_tokenizer_that_llama_cpp_cuts_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    other = {"type": "Split", "pattern": {"Regex": r"\w+|\s"}, "behavior": "Isolated", "invert": False}
    for cut in (AFTER, {"type": "Sequence", "pretokenizers": [other, AFTER]}, {**BYTE_LEVEL, "add_prefix_space": True}):
        monkeypatch.setitem(CUTS, "other", cut)
        tokenizer = merges_of_bytes("other")
        source = Source(Transformer(SMALL, tokenizer.vocab_size, seed=1).eval(), SMALL, tokenizer)
        with pytest.raises(ConfigError, match="cuts text as GPT-2's"):
            export_as(ExportFormat.gguf, source, tmp_path)


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_a_prompt_is_continued_as_lmkit_generate_does(
    tmp_path: Path, config: Callable[..., PretrainConfig], name: str
) -> None:
    """From pretraining through the command export to the text that llama.cpp's users see."""
    for package in ("gguf", "llama_cpp"):
        pytest.importorskip(package)
    made = config(SMALL, max_steps=60, seq_len=64)
    if name == "bpe":
        made.tokenizer = SentencePieceTokenizerConfig(vocab_size=320, algorithm=SentencePieceKind.bpe)
    pretrain.run(made)
    run = ExistingRunConfig(path=str(tmp_path / "run"), root=str(tmp_path))
    export.run(ExportConfig(run=run, to=str(tmp_path / "out"), format=ExportFormat.gguf))
    found = generate.run(
        GenerateConfig(
            run=run,
            max_new_tokens=40,
            sampling=SamplingConfig(temperature=0.0),
            device=DeviceConfig(type=DeviceType.cpu, threads=1),
        ),
        ["the cat"],
    )
    theirs = llama(tmp_path / "out" / "model.gguf")
    text = theirs("the cat", max_tokens=40, temperature=0.0, repeat_penalty=1.0)["choices"][0]["text"]
    theirs.close()
    assert len(text) > 10
    assert text == found[0]["text"]
