"""GGUF version 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), the file of llama.cpp.

llama.cpp turns neighbouring channels of the llama architecture, where lmkit and Hugging Face turn channel i with
i + C/2: the rows of q and k are written in that order (``interleaved``), as llama.cpp's own converter does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmkit.config.model import Activation, Norm, Positions, TransformerConfig
from lmkit.errors import ConfigError, DataError, ResourceError
from lmkit.hf.exporting import Source, compare_logits, logits_of
from lmkit.hf.families import family_for
from lmkit.hf.weights import expressible
from lmkit.models.transformer import Transformer, d_ff
from lmkit.tokenizers import ByteTokenizer, HfTokenizer, SentencePieceTokenizer, Tokenizer
from lmkit.tokenizers.convert import QWEN2_SPLIT, end_name, hf_json
from lmkit.tokenizers.hf import byte_letters

FILE = "model.gguf"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Token types of llama.cpp."""
ARCHITECTURES = {
    "gpt2": "gpt2",
    "gemma": "gemma",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "llama": "llama",
    "mistral": "llama",
}
"""Family -> architecture of llama.cpp."""
ACTIVATIONS = {"gpt2": Activation.gelu, "gemma": Activation.gelu}
"""The one activation that an architecture has; silu where nothing else is said."""
SPLITS = {QWEN2_SPLIT: "qwen2", QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1): "llama-bpe"}
"""Regular expressions of words -> llama.cpp's name of them; Llama 3 differs from Qwen2 in numbers of up to 3 digits."""


def export_gguf(source: Source, folder: Path) -> dict[str, Any]:
    """Write model.gguf, read it again and compare. ResourceError if the package gguf is missing."""
    try:
        import gguf
    except ImportError:
        raise ResourceError("format=gguf needs the package gguf", "pip install 'lmkit[gguf]'") from None
    family = family_for(source.config, tuple(ARCHITECTURES))
    architecture = ARCHITECTURES[family.name]
    wanted = ACTIVATIONS.get(architecture, Activation.silu)
    if source.config.activation is not wanted:
        raise ConfigError(
            f"model.activation={source.config.activation.name}: llama.cpp's {architecture} has only {wanted.name}",
            "use format=hf or format=onnx",
        )
    vocabulary = _vocabulary(source.tokenizer)
    config, state = expressible(family, source.config, source.model.state_dict())
    writer = gguf.GGUFWriter(folder / FILE, architecture)
    for key, value in _numbers(architecture, config).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{architecture}.{key}", value)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.split is not None:
        writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(source.tokenizer.eos_id)
    writer.add_eos_token_id(source.tokenizer.eos_id)
    if source.tokenizer.unk_id is not None:
        writer.add_unk_token_id(source.tokenizer.unk_id)
    writer.add_add_bos_token(True)  # a prompt begins a text, as for lmkit generate
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_remove_extra_whitespaces(False)
    for name, tensor in _tensors(architecture, config, state):
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model, tokens = read_gguf(folder / FILE)
    difference = compare_logits(source, logits_of(model))
    if tokens != vocabulary.tokens:
        raise DataError(f"{FILE} was written with other tokens than the run's")
    checked = f"logits differ by at most {difference:.1e} after reading the file again"
    return {"architecture": f"{architecture} (GGUF)", "checked": checked + vocabulary.note}


def read_gguf(path: Path) -> tuple[Transformer, list[str]]:
    """The model and the tokens of what ``export_gguf`` wrote, from the file's own metadata."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = str(fields["general.architecture"])
    numbers = {key.partition(".")[2]: value for key, value in fields.items() if key.startswith(f"{architecture}.")}
    tensors = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
    tokens = [str(token) for token in fields["tokenizer.ggml.tokens"]]
    config = _config(architecture, numbers, tensors)
    model = Transformer(config, len(tokens), seed=0)
    state = {}
    for ours, (name, parts) in _names(architecture, config):
        whole = [tensors[one] for one in ([name] if isinstance(name, str) else name)]
        turned = [_interleaved(t, heads, back=True) if heads else t for t, heads in zip(whole, parts, strict=True)]
        state[ours] = torch.cat(turned)
    if config.tie_embeddings:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state)
    return model.eval(), tokens


def _numbers(architecture: str, config: TransformerConfig) -> dict[str, int | float]:
    """Metadata below the name of the architecture."""
    numbers: dict[str, int | float] = {
        "context_length": config.context,
        "embedding_length": config.d_model,
        "block_count": config.num_layers,
        "feed_forward_length": d_ff(config),
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.kv_heads,
    }
    if architecture == "gpt2":
        return numbers | {"attention.layer_norm_epsilon": float(config.norm_eps)}
    return numbers | {
        "attention.key_length": config.channels,
        "attention.value_length": config.channels,
        "rope.dimension_count": config.channels,
        "rope.freq_base": float(config.rope_theta),
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
    }


def _config(architecture: str, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TransformerConfig:
    """The inverse of ``_numbers``; what metadata does not say is seen from which tensors there are."""
    old, width = architecture == "gpt2", int(numbers["embedding_length"])
    heads = int(numbers["attention.head_count"])
    bias = "blk.0.attn_output.bias" in tensors
    return TransformerConfig(
        d_model=width,
        num_layers=int(numbers["block_count"]),
        num_heads=heads,
        num_kv_heads=int(numbers["attention.head_count_kv"]),
        head_channels=None if old else int(numbers["attention.key_length"]),
        d_ff=int(numbers["feed_forward_length"]),
        context=int(numbers["context_length"]),
        positions=Positions.learned if old else Positions.rotary,
        rope_theta=float(numbers.get("rope.freq_base", 10000.0)),
        norm=Norm.layernorm if old else Norm.rmsnorm,
        norm_eps=float(numbers[f"attention.layer_norm_{'' if old else 'rms_'}epsilon"]),
        activation=ACTIVATIONS.get(architecture, Activation.silu),
        gated=not old,
        bias=bias,
        qkv_bias="blk.0.attn_q.bias" in tensors if not old else None,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        tie_embeddings="output.weight" not in tensors,
        scale_embeddings=architecture == "gemma",
    )


Place = tuple[str | list[str], list[int]]
"""Names in the file, and for each the heads whose rows are interleaved there (0: as they are)."""


def _names(architecture: str, config: TransformerConfig) -> Iterator[tuple[str, Place]]:
    """Our name -> where it stands in the file."""
    old, parts = architecture == "gpt2", ("weight", "bias")
    yield "embedding.weight", ("token_embd.weight", [0])
    if old:
        yield "positions.weight", ("position_embd.weight", [0])
    for part in parts if old else parts[:1]:
        yield f"final_norm.{part}", (f"output_norm.{part}", [0])
    if not config.tie_embeddings:
        yield "head.weight", ("output.weight", [0])
    turned = [config.num_heads, config.kv_heads, 0] if architecture == "llama" else [0, 0, 0]
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}.", f"blk.{i}."
        for here, there in (("attention_norm", "attn_norm"), ("feed_forward_norm", "ffn_norm")):
            for part in parts if old else parts[:1]:
                yield f"{ours}{here}.{part}", (f"{theirs}{there}.{part}", [0])
        for one in ("q_norm", "k_norm") if config.qk_norm else ():
            yield f"{ours}attention.{one}.weight", (f"{theirs}attn_{one}.weight", [0])
        for part in parts if config.has_qkv_bias else parts[:1]:
            split = [f"{theirs}attn_{one}.{part}" for one in "qkv"]
            yield f"{ours}attention.qkv.{part}", (f"{theirs}attn_qkv.{part}", [0]) if old else (split, turned)
        for part in parts if config.bias else parts[:1]:
            yield f"{ours}attention.out.{part}", (f"{theirs}attn_output.{part}", [0])
            gates = [f"{theirs}ffn_gate.{part}", f"{theirs}ffn_up.{part}"]
            if old:
                yield f"{ours}feed_forward.up.{part}", (gates[1], [0])
            else:
                yield f"{ours}feed_forward.gate_up.{part}", (gates, [0, 0])
            yield f"{ours}feed_forward.down.{part}", (f"{theirs}ffn_down.{part}", [0])


def _tensors(architecture: str, config: TransformerConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    rows = {
        "qkv": [config.channels * heads for heads in (config.num_heads, config.kv_heads, config.kv_heads)],
        "gate_up": [d_ff(config)] * 2,
    }
    for ours, (names, parts) in _names(architecture, config):
        if isinstance(names, str):
            yield names, state[ours]
            continue
        split = torch.split(state[ours], rows[ours.split(".")[-2]])
        for name, tensor, heads in zip(names, split, parts, strict=True):
            yield name, _interleaved(tensor, heads) if heads else tensor


def _interleaved(rows: Tensor, heads: int, *, back: bool = False) -> Tensor:
    """Rows i and i + C/2 of each head next to each other, or ``back``."""
    pairs = (heads, -1, 2) if back else (heads, 2, -1)
    return rows.reshape(*pairs, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in llama.cpp's terms."""

    model: str
    """``llama``: sentencepiece by merging; ``t5``: sentencepiece by likelihood; ``gpt2``: merges of bytes."""
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    split: str | None = None
    """How ``gpt2`` cuts the text into words first."""
    note: str = ""


def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Raises ConfigError if llama.cpp has no such tokenizer."""
    match tokenizer:
        case SentencePieceTokenizer():
            return _pieces(tokenizer)
        case ByteTokenizer():
            letters = byte_letters()
            tokens = [*letters, end_name(tokenizer)]
            no_merge = [f"{letters[0]} {letters[0]}"]  # llama.cpp wants one; its result is no token
            return Vocabulary("gpt2", tokens, [NORMAL] * 256 + [CONTROL], [], no_merge, "gpt-2")
        case HfTokenizer():
            return _merged_bytes(tokenizer)
    raise ConfigError(
        f"llama.cpp has no tokenizer like {tokenizer.kind}",
        "train with tokenizer=sentencepiece or tokenizer=byte, or use format=hf",
    )


def _pieces(tokenizer: SentencePieceTokenizer) -> Vocabulary:
    pieces, scores = tokenizer.pieces_and_scores()
    types = []
    for id, piece in enumerate(pieces):
        special = CONTROL if id == tokenizer.eos_id else UNKNOWN if id == tokenizer.unk_id else NORMAL
        types.append(BYTE if tokenizer.is_byte(id) else USER_DEFINED if piece == "\n" else special)
    if not tokenizer.is_unigram():
        return Vocabulary("llama", pieces, types, scores, [])
    note = "; llama.cpp has no bytes for unigram pieces: characters outside the vocabulary become <unk> there"
    return Vocabulary("t5", pieces, types, scores, [], note=note)


def _merged_bytes(tokenizer: HfTokenizer) -> Vocabulary:
    """A byte-level BPE that cuts text in a way that llama.cpp knows."""
    spec = json.loads(hf_json(tokenizer))
    split, model, normalizer = _split_name(spec), spec["model"], spec.get("normalizer")
    kind = model.get("type", "BPE" if "merges" in model else "the model")  # older files, such as GPT-2's, do not say it
    if kind != "BPE" or split is None or normalizer not in (None, {"type": "NFC"}):
        cut = (spec.get("pre_tokenizer") or {}).get("type")
        raise ConfigError(
            f"format=gguf needs a tokenizer.json that cuts text as GPT-2's, Llama 3's, Qwen2's or SmolLM's does; {cut} "
            f"and {kind} of this one do not",
            "use format=hf and llama.cpp's convert_hf_to_gguf.py",
        )
    tokens = [tokenizer.token_text(id) or f"<|unused_{id}|>" for id in range(tokenizer.vocab_size)]
    tokens[tokenizer.eos_id] = end_name(tokenizer)
    added = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in spec["added_tokens"]}
    added[tokenizer.eos_id] = CONTROL
    types = [added.get(id, NORMAL) for id in range(len(tokens))]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    note = "" if normalizer is None else "; llama.cpp does not normalise text to NFC, as the run's tokenizer does"
    return Vocabulary("gpt2", tokens, types, [], merges, split, note)


def _split_name(spec: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer.json cuts text into words; None if it has none."""
    cut = spec.get("pre_tokenizer") or {}
    *before, last = (cut["pretokenizers"] or [{}]) if cut.get("type") == "Sequence" else [cut]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(before) > 1:
        return None
    first = before[0] if before else {}
    if first.get("type") == "Split":
        whole = first["behavior"] == "Isolated" and not first["invert"] and not last.get("use_regex", True)
        name = SPLITS.get(first["pattern"].get("Regex")) if whole else None
    elif not last.get("use_regex", True):
        name = None
    elif first.get("type") == "Digits":
        name = "smollm" if first["individual_digits"] else None
    else:
        name = None if before else "gpt-2"
    return name if bool(spec["model"].get("ignore_merges")) == (name == "llama-bpe") else None
