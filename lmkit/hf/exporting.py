"""Models out: a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load, or plain weights.

What is written is read again and run on the same tokens; an export whose logits differ is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmkit.config.export import ExportFormat
from lmkit.config.model import TransformerConfig
from lmkit.config.plain import from_plain, to_plain
from lmkit.errors import DataError, is_out_of_memory
from lmkit.hf.families import FAMILIES, family_for
from lmkit.hf.importing import CONFIG, read_model
from lmkit.hf.keys import read_json
from lmkit.hf.sample import sample_text
from lmkit.hf.weights import WEIGHTS, expressible, to_theirs, write_weights
from lmkit.models.transformer import Transformer
from lmkit.rng import derive_key
from lmkit.tokenizers import HfTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from lmkit.tokenizers.base import HEADER_FILE, one_line
from lmkit.tokenizers.convert import cuts_like_qwen2, end_name, hf_json

TOLERANCE = 1e-4
"""Largest difference between two logits, in fp32, relative to the largest logit where that is above 1."""
PROBE_TOKENS = 64


@dataclass(frozen=True)
class Source:
    """What is exported."""

    model: Transformer
    """On the CPU, in fp32 and evaluation mode."""
    config: TransformerConfig
    tokenizer: Tokenizer

    @cached_property
    def sample(self) -> str:
        """Text that the tokenizers are compared on."""
        return sample_text(self.tokenizer)


Logits = Callable[[Tensor], Tensor]
"""(B, T) tokens -> (B, T, V) fp32 logits."""


def export_as(kind: ExportFormat, source: Source, folder: Path) -> dict[str, Any]:
    """Write and check; ``architecture`` and ``checked`` of the result are for people.

    Raises ConfigError if the format cannot express the model, ResourceError if a package is missing, and DataError if
    what was written is not the same.
    """
    match kind:
        case ExportFormat.hf:
            return export_hf(source, folder)
        case ExportFormat.safetensors:
            return export_safetensors(source, folder)
        case ExportFormat.gguf:
            from lmkit.hf.gguf_file import export_gguf

            return export_gguf(source, folder)
        case ExportFormat.onnx:
            from lmkit.hf.onnx_file import export_onnx

            return export_onnx(source, folder)


def export_hf(source: Source, folder: Path) -> dict[str, Any]:
    """Write the folder and check it; returns what the model card says about it."""
    config, state = source.config, dict(source.model.state_dict())
    names = [name for name in FAMILIES if name != "qwen2" or cuts_like_qwen2(source.tokenizer)]
    family = family_for(config, names)
    made, state = expressible(family, config, state)
    write_weights(folder / WEIGHTS, to_theirs(family, made, state))
    end = source.tokenizer.eos_id
    ends_text = None if source.tokenizer.ends_lines else end
    description = {
        "architectures": [family.architecture],
        "model_type": family.name,
        **family.write(made),
        "vocab_size": source.model.vocab_size,
        "bos_token_id": end,
        "eos_token_id": ends_text,
        "torch_dtype": "float32",
    }
    write_json(folder / CONFIG, description)
    write_tokenizer(source, folder)
    difference = compare_logits(source, logits_of(read_model(folder).build()))
    written = HfTokenizer((folder / HEADER_FILE).read_bytes())
    compare_ids(source, written.encode(source.sample).tolist(), HEADER_FILE)
    checked = f"logits of the import differ by at most {difference:.1e}, sample text gets the same ids"
    if find_spec("transformers") is not None:
        checked += _check_with_transformers(source, folder)
    return {"architecture": family.architecture, "checked": checked}


def write_tokenizer(source: Source, folder: Path) -> None:
    """tokenizer.json, and what AutoTokenizer has to know besides."""
    (folder / HEADER_FILE).write_bytes(hf_json(source.tokenizer))
    named = {} if source.tokenizer.ends_lines else {"eos_token": end_name(source.tokenizer)}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": source.config.context,
        "clean_up_tokenization_spaces": False,
        **named,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def _check_with_transformers(source: Source, folder: Path) -> str:
    """Load the folder as its users will, and compare; returns what to say of it."""
    try:
        import transformers
    except Exception as error:  # one of its own parts is missing, or of another time
        return f"; transformers cannot be imported and was not asked ({one_line(error)})"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model.eval()
    except (OSError, ValueError, ImportError, KeyError, TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise DataError(f"transformers {transformers.__version__} cannot load the folder ({one_line(error)})") from None

    @torch.no_grad()
    def logits(tokens_BT: Tensor) -> Tensor:
        found: Tensor = model(tokens_BT).logits
        return found

    difference = compare_logits(source, logits)
    compare_ids(source, tokenizer.encode(source.sample, add_special_tokens=True), "AutoTokenizer")
    return f"; transformers {transformers.__version__} agrees (logits to {difference:.1e}, the same ids)"


def export_safetensors(source: Source, folder: Path) -> dict[str, Any]:
    """Plain weights under lmkit's names, its own configuration and its own tokenizer."""
    state = dict(source.model.state_dict())
    if source.config.tie_embeddings:
        del state["head.weight"]
    write_weights(folder / WEIGHTS, state)
    write_json(folder / CONFIG, {"model": to_plain(source.config), "vocab_size": source.model.vocab_size})
    (folder / "tokenizer").mkdir()
    source.tokenizer.save(folder / "tokenizer")
    model, tokenizer = read_plain(folder)
    difference = compare_logits(source, logits_of(model))
    compare_ids(source, tokenizer.encode(source.sample).tolist(), "tokenizer/")
    checked = f"logits differ by at most {difference:.1e} after reading, sample text gets the same ids"
    return {"architecture": "lmkit Transformer", "checked": checked}


def read_plain(folder: Path) -> tuple[Transformer, Tokenizer]:
    """What ``export_safetensors`` wrote."""
    from safetensors.torch import load_file

    data = read_json(folder / CONFIG)
    config = from_plain(TransformerConfig, data["model"], where="model")
    model = config.build(data["vocab_size"], seed=0)
    assert isinstance(model, Transformer)
    state = load_file(folder / WEIGHTS)
    if config.tie_embeddings:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state)
    return model.eval(), load_tokenizer(folder / "tokenizer")


def logits_of(model: Transformer) -> Logits:
    """The model as a function."""

    @torch.no_grad()
    def run(tokens_BT: Tensor) -> Tensor:
        hidden_BTD, _ = model(tokens_BT)
        return model.head.logits(hidden_BTD)

    return run


def probe_tokens(source: Source, length: int | None = None) -> Tensor:
    """(2, T): the first tokens of the sample, if it has as many, and random ones."""
    length = min(length or PROBE_TOKENS, source.config.context)
    generator = torch.Generator().manual_seed(derive_key(0, "export"))
    random_T = torch.randint(source.model.vocab_size, (length,), generator=generator)
    ids = torch.from_numpy(source.tokenizer.encode(source.sample))[:length]
    return torch.stack([ids if len(ids) == length else random_T.flip(0), random_T])


def compare_logits(source: Source, theirs: Logits, length: int | None = None) -> float:
    """The largest difference on texts of ``length`` tokens. Raises DataError if it is above the tolerance."""
    tokens_BT = probe_tokens(source, length)
    expected, found = logits_of(source.model)(tokens_BT), theirs(tokens_BT)
    difference = float((expected - found).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise DataError(f"the exported model computes something else: logits differ by up to {difference:.3g}")
    return difference


def compare_ids(source: Source, found: Sequence[int], name: str) -> None:
    """Raises DataError, naming the place, if the sample got other ids than the run's tokenizer gives."""
    expected = source.tokenizer.encode(source.sample).tolist()
    if expected != list(found) and not _equal_up_to_rounding(source.tokenizer, expected, found):
        at = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), len(found))
        before = source.tokenizer.decode(expected[max(0, at - 8) : at])
        raise DataError(f"{name} encodes text otherwise than the run's tokenizer, after {before!r}")


def _equal_up_to_rounding(tokenizer: Tokenizer, expected: Sequence[int], found: Sequence[int]) -> bool:
    """Whether two ways of cutting a text are equally probable: sentencepiece adds in fp32, the others in fp64."""
    if not isinstance(tokenizer, SentencePieceTokenizer) or not tokenizer.is_unigram():
        return False
    _, scores = tokenizer.pieces_and_scores()
    totals = [sum(scores[id] for id in ids) for ids in (expected, found)]
    return abs(totals[0] - totals[1]) < 1e-3 and tokenizer.decode(expected) == tokenizer.decode(list(found))


def write_json(path: Path, data: dict[str, Any]) -> None:
    """A JSON object for people to read."""
    path.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", newline="\n")
