"""lmkit eval-ppl: perplexity of a run over every token of a split, with all counts and how it was taken."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from lmkit import storage
from lmkit.config.commands import EvalPplConfig
from lmkit.config.data import BenchmarkConfig
from lmkit.console import Console, format_duration, format_number, table_lines
from lmkit.device import Device, resolve_device
from lmkit.errors import ConfigError, DataError, ResourceError
from lmkit.evaluate import perplexity, summarize
from lmkit.loading import LoadedRun, load_run
from lmkit.prepared import PreparedData, prepare


def run(cfg: EvalPplConfig) -> dict[str, Any]:
    """Score the split; the table goes to standard output, the numbers to ``output`` and back to the caller."""
    console = Console()
    output = None if cfg.output is None else _writable(Path(cfg.output))
    device = resolve_device(cfg.device)
    loaded = load_run(cfg.run, device=device, console=console)
    same_data = cfg.dataset is None or cfg.dataset == loaded.dataset
    prepared = prepare(loaded.dataset if cfg.dataset is None else cfg.dataset, loaded.tokenizer, console)
    if cfg.split not in prepared.splits:
        raise DataError(f"{prepared.name} has no {cfg.split} split", f"it has {', '.join(prepared.splits)}")
    result = score(cfg, loaded, prepared, device, console)
    result["trained_on_this_dataset"] = same_data
    sys.stdout.write("\n".join(table(result)) + "\n")
    sys.stdout.flush()
    if output is not None:
        _write(output, result)
    return result


def score(
    cfg: EvalPplConfig, loaded: LoadedRun, prepared: PreparedData, device: Device, console: Console
) -> dict[str, Any]:
    """All numbers and the protocol of one split."""
    split, carried = prepared.splits[cfg.split], loaded.model_config.carries_state
    context = cfg.context or loaded.model.context or 0
    stride = cfg.stride or max(1, context // 2)
    if carried and (cfg.context is not None or cfg.stride is not None):
        raise ConfigError("context and stride do not apply to a model with carried state", "leave them out")
    with console.progress(split.num_tokens, f"scoring {prepared.name} {cfg.split}") as bar:
        tally = perplexity(
            loaded.model,
            split.tokens,
            loaded.tokenizer.eos_id,
            carries_state=carried,
            context=context,
            stride=stride,
            seq_len=cfg.seq_len,
            batch_size=cfg.batch_size,
            device=device,
            progress=lambda done: bar.update(done),
        )
    how = "state carried over the whole split" if carried else f"windows of {context} tokens, stride {stride}"
    tokenizer = loaded.tokenizer
    protocol = (
        f"{prepared.name}/{cfg.split} {tokenizer.kind} V={tokenizer.vocab_size}; {how}; first token given eos;"
        f" eos and unk scored; static; temperature 1; {device.precision.name}"
    )
    return {
        **summarize(tally, split),
        "dataset": prepared.name,
        "source": prepared.report["source"],
        "split": cfg.split,
        "protocol": protocol,
        "context": None if carried else context,
        "stride": None if carried else stride,
        "run": str(loaded.path),
        "checkpoint": loaded.checkpoint.name,
        "step": loaded.step,
        "checkpoint_digest": loaded.checkpoint_digest,
        "text_digest": split.text_digest,
        "tokenizer_digest": tokenizer.digest,
        "device": device.description,
        "word_level": isinstance(loaded.dataset, BenchmarkConfig) and tokenizer.kind == "word",
    }


def table(result: dict[str, Any]) -> list[str]:
    """The result for people. Each perplexity says per what."""
    speed = result["num_tokens"] / max(result["eval_seconds"], 1e-9)
    rows = [
        ("perplexity per word (eos counted)", format_number(result["word_ppl"])),
        ("perplexity per token", format_number(result["token_ppl"])),
        ("bits per byte", f"{result['bits_per_byte']:.4f}"),
        ("bits per character", f"{result['bits_per_char']:.4f}"),
        ("accuracy (next token)", f"{100 * result['accuracy']:.2f} %"),
        ("negative log-likelihood, nats", f"{result['nats']:,.2f}"),
        ("tokens scored", f"{result['num_tokens']:,}"),
        ("of them <unk>", f"{result['num_unk']:,}"),
        ("words + ends of line", f"{result['num_words']:,}"),
        ("bytes", f"{result['num_bytes']:,}"),
        ("time", f"{format_duration(result['eval_seconds'])}, {format_number(speed)} tokens/s"),
    ]
    title = f"{result['dataset']} {result['split']} ({result['source']}), {result['checkpoint']}"
    return [*table_lines(title, rows), f"protocol: {result['protocol']}"]


def _writable(path: Path) -> Path:
    """The output file's absolute path; ConfigError before any work if it cannot be written there."""
    path = path.expanduser().absolute()
    if path.is_dir():
        raise ConfigError(f"output={path} is a directory", "name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"output={path}: the directory {path.parent} does not exist", "make it, or name another")
    if not os.access(path.parent, os.W_OK):
        raise ResourceError(f"output={path}: cannot write in {path.parent}", "name another file")
    return path


def _write(path: Path, result: dict[str, Any]) -> None:
    """Write whole or not at all."""
    try:
        storage.replace_file(path, (json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise storage.resource_error("write", path, error) from error
