"""lmkit runs report: what is shown of a run on its page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmkit.commands.output import output_path, write_file
from lmkit.commands.runs_compare import Facts, read_facts
from lmkit.commands.runs_page import Chart, RunPage, render
from lmkit.commands.runs_text import (
    NOTHING,
    format_bytes,
    format_model,
    format_step,
    format_time,
    parse_time,
)
from lmkit.config.runs import DEFAULT_REPORT
from lmkit.config.text import flatten, format_value
from lmkit.console import format_duration, format_number
from lmkit.store.browse import PER_TOKEN, read_journal, read_newest_config, readable, section
from lmkit.store.found import read_info

ROUTINE = ("save", "verify", "retire", "finished", "start")
"""Events of the journal that are no incidents."""
MOST_SAMPLES = 20
"""Samples that are shown, spread over the run."""

CHARTS = [
    ("loss", "Loss", "", {"train": "loss", "valid": "valid_loss"}, False),
    ("lr", "Learning rate", "of the first parameter group", {"learning rate": "lr"}, True),
    ("grad-norm", "Gradient norm", "before clipping", {"gradient norm": "grad_norm"}, True),
    ("speed", "Speed", "training {unit}s per second", {"{unit}s/s": "tokens_per_s"}, True),
]
"""Id, heading, unit (empty: that of the run's losses), name of each curve -> its key in metrics.jsonl, whether the axis
begins at zero; ``{unit}`` is what the run counts."""
CHARTS_APART = [
    ("loss", "Loss in training", "", {"train": "loss"}, False),
    ("valid-loss", "Loss of validation", "", {"valid": "valid_loss"}, False),
    *CHARTS[1:],
]
"""Of a run whose validation is another measure than what it learns."""


def write_report(run_dir: Path, to: str | None) -> str:
    """Write the page; returns what to say. Raises ConfigError or ResourceError."""
    path = output_path(str(run_dir / DEFAULT_REPORT) if to is None else to, "to")
    if to is None:
        path = run_dir.resolve() / DEFAULT_REPORT  # a link there is replaced and not followed
    write_file(path, render(gather(run_dir)).encode("utf-8"), "to")
    return f"wrote {path}\n"


def gather(run_dir: Path) -> RunPage:
    """All that is known of a run; what is damaged is left out."""
    facts = read_facts(run_dir, run_dir.name)
    summary, info = facts.summary, readable(read_info, run_dir)
    manifest, _ = read_newest_config(run_dir)
    environment = {} if manifest is None else manifest.environment
    begun, last = format_time(parse_time(summary.created)), format_time(summary.last_log)
    return RunPage(
        title=f"{run_dir.absolute().name}: {format_model(summary)} on {summary.dataset or '?'}",
        lead=f"{summary.status.name} at step {format_step(summary.step)}; begun {begun}, last log {last}",
        numbers=_numbers(facts),
        protocol=[*_protocol(facts), ("run id", str(info.get("run_id", NOTHING)))],
        charts=_charts(facts),
        samples=_samples(facts.metrics),
        incidents=_incidents(read_journal(run_dir)),
        environment=[(key, str(value)) for key, value in sorted(environment.items())],
        config=[(key, format_value(value)) for key, value in sorted(flatten(facts.config)) if value is not None],
        command=shlex.join(summary.command),
    )


def _numbers(facts: Facts) -> list[tuple[str, str]]:
    summary, end = facts.summary, facts.summary.end
    unit = f" ({PER_TOKEN})" if summary.loss_unit == PER_TOKEN else ""
    values: dict[str, Any] = {
        f"valid loss, lowest{unit}": summary.best_valid_loss,
        "valid perplexity per token": summary.token_ppl,
        "valid perplexity per word, ends of line counted": summary.word_ppl,
        "valid bits per byte, at the end": end.get("bits_per_byte"),
        f"train loss, last{unit}": facts.last_row.get("loss"),
        "parameters": summary.num_parameters,
        "steps": summary.step,
        "epochs": end.get("epochs", facts.last_row.get("epoch")),
        f"{summary.unit}s trained on": end.get(f"trained_{summary.unit}s", facts.last_row.get("num_targets")),
        f"{summary.unit}s per second, median": facts.tokens_per_s,
    }
    rows = [(name, format_number(value)) for name, value in values.items() if isinstance(value, int | float)]
    elapsed_s = end.get("elapsed_s", facts.last_row.get("elapsed_s"))
    if isinstance(elapsed_s, int | float):
        rows.append(("time", format_duration(elapsed_s)))
    memory = facts.last_row.get("memory_bytes")
    if isinstance(memory, int | float):
        rows.append(("memory, last", format_bytes(memory)))
    return [*rows, ("size on disk", format_bytes(summary.num_bytes))]


def _protocol(facts: Facts) -> list[tuple[str, str]]:
    """How validation was taken while training, and on what."""
    rows: list[tuple[str, str]] = []
    if facts.summary.loss_unit == PER_TOKEN:
        rows.append(("scored", "every token of valid once, the first given the end token"))
        rows += [("text before a token", facts.span)] if facts.config else []
    result = facts.result
    for name, key in (("tokens", "num_tokens"), ("words, ends of line included", "num_words"), ("bytes", "num_bytes")):
        if isinstance(result.get(key), int):
            rows.append((f"{name} of valid", f"{result[key]:,}"))
    tokenizer = section(facts.config, "tokenizer").get("kind")
    rows += [] if tokenizer is None else [("tokenizer", str(tokenizer))]
    return rows + [(f"{name} digest", str(digest)) for name, digest in sorted(facts.digests.items())]


def _charts(facts: Facts) -> list[Chart]:
    summary = facts.summary

    def curve(key: str) -> tuple[list[float], list[float]]:
        points = [(row["step"], row[key]) for row in facts.metrics if isinstance(row.get(key), int | float)]
        return [x for x, _ in points], [y for _, y in points]

    def named(text: str) -> str:
        return text.format(unit=summary.unit)

    return [
        Chart(
            id,
            heading,
            named(unit) or summary.loss_unit,
            {named(name): curve(key) for name, key in keys.items()},
            from_zero=from_zero,
        )
        for id, heading, unit, keys, from_zero in (CHARTS_APART if summary.validates_otherwise else CHARTS)
    ]


def _samples(metrics: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    rows = [(row["step"], row["sample"]) for row in metrics if isinstance(row.get("sample"), str)]
    if len(rows) <= MOST_SAMPLES:
        return rows
    return [rows[i * (len(rows) - 1) // (MOST_SAMPLES - 1)] for i in range(MOST_SAMPLES)]


def _incidents(journal: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Everything in the journal that was not routine."""
    hidden = ("time", "event", "pid")
    return [
        (
            str(event.get("time", ""))[:19].replace("T", " "),
            str(event.get("event", "?")),
            ", ".join(f"{key}: {_detail(key, value)}" for key, value in event.items() if key not in hidden),
        )
        for event in journal
        if event.get("event") not in ROUTINE
    ]


def _detail(key: str, value: Any) -> str:
    return shlex.join(map(str, value)) if key == "command" and isinstance(value, list) else format_value(value)
