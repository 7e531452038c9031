"""lmkit eval-ppl: perplexity of a run over every token of a split, with all counts and how it was taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmkit.commands.output import output_path, write_json, write_text
from lmkit.config.commands import EvalPplConfig
from lmkit.console import Console, format_duration, format_number, table_lines
from lmkit.data.prepared import PreparedData, prepare
from lmkit.device import Device, resolve_device
from lmkit.errors import ConfigError, DataError
from lmkit.evaluation.plan import check_window
from lmkit.evaluation.scoring import perplexity, summarize
from lmkit.loading import LoadedRun, load_run

COUNTING_SEQ_LEN = 4096
"""Tokens per forward pass of a model that counts: its history is short, so that nothing speaks for fewer."""


@dataclass(frozen=True)
class Protocol:
    """How a text is scored."""

    carries_state: bool
    memory: str
    """What a model with carried state looks back on."""
    context: int | None
    """None with carried state, as is stride."""
    stride: int | None
    seq_len: int
    batch_size: int

    def describe(self) -> str:
        if self.carries_state:
            return self.memory
        return f"windows of {self.context} tokens, stride {self.stride}"


def run(cfg: EvalPplConfig) -> dict[str, Any]:
    """Score the split; the table goes to standard output, the numbers to ``output`` and back to the caller."""
    console = Console()
    output = None if cfg.output is None else output_path(cfg.output)
    device = resolve_device(cfg.device)
    loaded = load_run(cfg.run, device=device, console=console)
    protocol = choose_protocol(cfg, loaded)
    dataset = loaded.dataset if cfg.dataset is None else cfg.dataset
    prepared = prepare(dataset, loaded.tokenizer, console)
    if cfg.split not in prepared.splits:
        raise DataError(f"{prepared.name} has no {cfg.split} split", f"it has {', '.join(prepared.splits)}")
    result = score(loaded, prepared, cfg.split, protocol, device, console)
    result["trained_on_this_dataset"] = dataset == loaded.dataset
    write_text("\n".join(table(result)) + "\n")
    if output is not None:
        write_json(output, result)
    return result


def choose_protocol(cfg: EvalPplConfig, loaded: LoadedRun) -> Protocol:
    """What the configuration and the model's family make of it. Raises ConfigError."""
    if loaded.model_config.carries_state:
        if cfg.context is not None or cfg.stride is not None:
            raise ConfigError(
                f"context and stride do not apply to run={loaded.path}, whose state carries the whole past",
                "leave them out",
            )
        seq_len = COUNTING_SEQ_LEN if loaded.model_config.trains_by_counting else cfg.seq_len
        return Protocol(True, loaded.model_config.memory, None, None, seq_len, 1)
    context = cfg.context or loaded.context
    if context is None:
        raise ConfigError("the model's context is unbounded", "choose one with context=TOKENS")
    stride = cfg.stride or max(1, context // 2)
    check_window(context, stride, loaded.model.context)
    return Protocol(False, "", context, stride, cfg.seq_len, cfg.batch_size)


def score(
    loaded: LoadedRun, prepared: PreparedData, split_name: str, protocol: Protocol, device: Device, console: Console
) -> dict[str, Any]:
    """All numbers of one split and how they were taken, as JSON data."""
    split, tokenizer = prepared.splits[split_name], loaded.tokenizer
    with console.progress(split.num_tokens, f"scoring {prepared.name} {split_name}") as bar:
        tally = perplexity(
            loaded.model,
            split.tokens,
            tokenizer.eos_id,
            carries_state=protocol.carries_state,
            context=protocol.context or 1,
            stride=protocol.stride or 1,
            seq_len=protocol.seq_len,
            batch_size=protocol.batch_size,
            device=device,
            progress=lambda done: bar.update(done),
        )
    line = (
        f"{prepared.name}/{split_name}; {tokenizer.kind} tokens, {tokenizer.vocab_size:,} types;"
        f" {protocol.describe()}; first token given eos; eos and <unk> scored; static; temperature 1;"
        f" {device.precision.name}"
    )
    return {
        **summarize(tally, split),
        "dataset": prepared.name,
        "source": prepared.report["source"],
        "split": split_name,
        "protocol": line,
        "context": protocol.context,
        "stride": protocol.stride,
        "run": str(loaded.path),
        "checkpoint": loaded.checkpoint.name,
        "step": loaded.step,
        "checkpoint_digest": loaded.checkpoint_digest,
        "text_digest": split.text_digest,
        "tokenizer": tokenizer.kind,
        "tokenizer_digest": tokenizer.digest,
        "device": device.description,
        "precision": device.precision.name,
    }


def table(result: dict[str, Any]) -> list[str]:
    """The result for people. Each perplexity says per what."""
    speed = result["num_tokens"] / max(result["eval_seconds"], 1e-9)
    rows = [
        ("perplexity per word (ends of line counted)", format_number(result["word_ppl"])),
        (f"perplexity per token ({result['tokenizer']})", format_number(result["token_ppl"])),
        ("bits per byte", f"{result['bits_per_byte']:.4f}"),
        ("bits per character", f"{result['bits_per_char']:.4f}"),
        ("accuracy, next token", f"{100 * result['accuracy']:.2f} %"),
        ("negative log-likelihood, nats", f"{result['nats']:,.2f}"),
        ("words and ends of line", f"{result['num_words']:,}"),
        ("tokens, all scored", f"{result['num_tokens']:,}"),
        ("<unk> among them", f"{result['num_unk']:,}"),
        ("bytes", f"{result['num_bytes']:,}"),
        ("characters", f"{result['num_chars']:,}"),
        ("time", f"{format_duration(result['eval_seconds'])}, {format_number(speed)} tokens/s"),
    ]
    title = f"{result['dataset']} {result['split']} ({result['source']}), {result['checkpoint']}"
    return [*table_lines(title, rows), f"protocol: {result['protocol']}"]
