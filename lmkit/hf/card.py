"""The model card: README.md of an exported folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmkit import __version__

USES = {
    "hf": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")
```
In lmkit: `lmkit pretrain init=hf:DIR`.
""",
    "safetensors": """\
`model.safetensors` has the weights under lmkit's names (fp32), `config.json` the configuration of the model and the
size of the vocabulary, `tokenizer/` the tokenizer.
""",
    "gguf": """\
```
llama-cli -m DIR/model.gguf -p "the company said"
```
""",
    "onnx": """\
`tokenizer.json` is read by the tokenizers library. `model.onnx` maps `tokens` (batch, time), int64, to `logits` (batch,
time, vocabulary), float32.
```python
import onnxruntime
logits = onnxruntime.InferenceSession("DIR/model.onnx").run(None, {"tokens": tokens})[0]
```
""",
}
EXCEPTIONS = """\
The tokenizer gives the ids that the model was trained with, except that in a text the written name of a control token
(such as `<|endoftext|>` or `</s>`) becomes that token{pieces}.
"""
PIECES = ", and that the character U+2581 and names of bytes such as `<0x41>` are read as a blank and as that byte"


@dataclass(frozen=True)
class Facts:
    """What is known of a run."""

    name: str
    format: str
    about: Mapping[str, Any]
    """What the export found."""
    config: Mapping[str, Any]
    """The stored configuration."""
    info: Mapping[str, Any]
    """run.json."""
    result: Mapping[str, Any]
    """The numbers of result.json, of these weights; or nothing."""
    step: int
    num_parameters: int
    tokenizer_kind: str
    vocab_size: int
    digests: Mapping[str, str]


def card(facts: Facts) -> str:
    """The text of README.md."""
    lines = [f"# {facts.name}", "", f"A language model trained with lmkit {__version__}.", "", "## Model", ""]
    lines += _table(
        {
            "architecture": facts.about["architecture"],
            "parameters": f"{facts.num_parameters:,}",
            "context": f"{facts.config['model']['context']} tokens",
            "tokenizer": f"{facts.tokenizer_kind}, {facts.vocab_size:,} types",
            "steps": f"{facts.step:,}",
            "trained on sequences of": f"{facts.config['train']['seq_len']} tokens",
        }
    )
    lines += ["", "## Use", "", USES[facts.format]]
    if facts.format != "safetensors":
        lines += [EXCEPTIONS.format(pieces=PIECES if facts.tokenizer_kind == "sentencepiece" else "")]
    lines += ["## Data", "", "```json", json.dumps(facts.config["dataset"], ensure_ascii=False, indent=1), "```", ""]
    lines += ["## Perplexity", "", *_numbers(facts.result, facts.step), ""]
    if command := facts.info.get("command"):
        lines += ["## Command", "", "```", shlex.join(map(str, command)), "```", ""]
    lines += ["## Checks", "", f"{facts.about['checked']}.", "", "## Digests (SHA-256)", ""]
    return "\n".join([*lines, *_table(facts.digests), ""])


def _numbers(result: Mapping[str, Any], step: int) -> list[str]:
    if not isinstance(result.get("token_ppl"), int | float):
        return ["No result: these weights were not evaluated on a text where they were trained."]
    rows = {"split": result.get("split", "valid"), "dataset": result.get("dataset", "?")}
    for key, name in (
        ("word_ppl", "perplexity per word"),
        ("token_ppl", "perplexity per token"),
        ("bits_per_byte", "bits per byte"),
        ("num_tokens", "tokens scored"),
        ("num_words", "words"),
    ):
        value = result.get(key)
        if isinstance(value, int | float):
            rows[name] = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
    how = f"Taken after step {step:,} over every token of the split (an `<eos>` for each line counts as a word)."
    return [how, "", *_table(rows)]


def _table(rows: Mapping[str, Any]) -> list[str]:
    return ["| what | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]
