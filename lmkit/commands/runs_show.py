"""lmkit runs show and diff: what a run is, and what differs between two."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lmkit.commands.runs_text import (
    NOTHING,
    columns,
    format_bytes,
    format_loss,
    format_model,
    format_ppl,
    format_step,
    format_time,
    named_values,
    parse_time,
)
from lmkit.config.text import flatten, format_value
from lmkit.console import format_duration, format_number
from lmkit.errors import CheckpointError
from lmkit.store.audit import audit_checkpoint
from lmkit.store.browse import (
    PER_TOKEN,
    RunSummary,
    Status,
    read_journal,
    read_newest_config,
    read_summary,
    readable,
    section,
)
from lmkit.store.found import LOCK_INFO, METRICS, read_info, read_metrics, read_result
from lmkit.store.listing import best_first, comparable, list_checkpoints, loss_and_data
from lmkit.store.manifest import step_of
from lmkit.store.pins import read_pins
from lmkit.store.records import read_object

NOT_COMPARED = ("run", "resume", "debug", "command", "logger")
"""Parts of a configuration that do not decide what is computed."""
SCORES = ("accuracy", "macro_f1", "rmse", "mae", "r2")
"""Numbers of result.json beside likelihoods that are shown."""


def show(run_dir: Path) -> str:
    """Everything about a run on one page; what is damaged is left out, or said."""
    summary = read_summary(run_dir)
    info = readable(read_info, run_dir)
    manifest, config = read_newest_config(run_dir)
    about = [
        ("status", f"{summary.status.name} at step {format_step(summary.step)}{_holder(run_dir, summary.status)}"),
        ("command", shlex.join(summary.command) or NOTHING),
        ("created", f"{format_time(parse_time(summary.created))}, last log {format_time(summary.last_log)}"),
        ("run id", str(info.get("run_id", NOTHING))),
        ("model", format_model(summary)),
        ("seed", NOTHING if summary.seed is None else str(summary.seed)),
        ("size", format_bytes(summary.num_bytes)),
    ]
    digests = {} if manifest is None else manifest.digests
    for name, digest in sorted({**section(info, "digests"), **digests}.items()):
        about.append((f"{name} digest", str(digest)))
    if manifest is not None:
        about.append(("environment", ", ".join(f"{k} {v}" for k, v in sorted(manifest.environment.items()))))
    lines = [str(run_dir), *named_values(about)]
    if config:
        lines += ["", "configuration", *named_values(_config_rows(config))]
    lines += ["", "checkpoints", *_checkpoint_lines(run_dir)]
    lines += ["", "numbers", *named_values(_number_rows(run_dir, summary))]
    return "\n".join(lines) + "\n"


def _holder(run_dir: Path, status: Status) -> str:
    if status is not Status.running:
        return ""
    holder = readable(lambda path: read_object(path / LOCK_INFO), run_dir)
    return f", by process {holder.get('pid', '?')} on {holder.get('host', '?')}"


def _config_rows(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """One row a section, without what is null."""
    rows, plain = [], []
    for name, value in sorted(config.items()):
        if isinstance(value, dict):
            kind = value.get("kind")
            words = [f"{k}={format_value(v)}" for k, v in flatten(value) if v is not None and k != "kind"]
            title = [] if kind in (None, name) else [f"{kind}:" if words else str(kind)]
            rows.append((name, " ".join([*title, *words])))
        elif name != "command":
            plain.append(f"{name}={format_value(value)}")
    return [*(row for row in rows if row[1]), ("also", " ".join(plain))]


def _checkpoint_lines(run_dir: Path) -> list[str]:
    paths = list_checkpoints(run_dir)
    if not paths:
        return ["  none yet"]
    hashed = {
        str(event.get("checkpoint")): event.get("self")
        for event in read_journal(run_dir)
        if event.get("event") == "verify"
    }
    try:
        pinned = read_pins(run_dir)
    except CheckpointError:
        pinned = frozenset()
    found = {path.name: _loss_and_data(path) for path in paths}
    known = comparable(paths[::-1], found)
    best = best_first(paths[::-1], known)[0]
    rows = [["step", "size", "valid loss", "verified", ""]]
    for path in paths:
        audit, loss, step = audit_checkpoint(path, hashes=False), found[path.name][0], step_of(path.name) or 0
        marks = ["best"] if path == best and known[path.name] is not None else []
        marks += ["pinned"] if step in pinned else []
        if audit.damage or audit.manifest is None:
            verified, size = f"DAMAGED: {'; '.join(audit.damage)}", NOTHING
        else:
            verified = "when saved" if hashed.get(path.name) == audit.manifest.digest else "no"
            size = format_bytes(audit.manifest.total_bytes)
        rows.append([f"{step:,}", size, format_loss(loss), verified, ", ".join(marks)])
    return columns(rows, right=(0, 1, 2), indent=2)


def _loss_and_data(path: Path) -> tuple[float | None, str | None]:
    try:
        return loss_and_data(path)
    except CheckpointError:
        return None, None


def _number_rows(run_dir: Path, summary: RunSummary) -> list[tuple[str, str]]:
    """The best validation so far, the last line of the log, and the result of the end, or of an earlier one."""
    rows = [("best valid ppl", format_ppl(summary))]
    metrics = read_metrics(run_dir)
    for title, key in (("last train", "loss"), ("last valid", "valid_loss")):
        row = next((row for row in reversed(metrics) if key in row), None)
        if row is not None:
            words = [f"{k} {_short(v)}" for k, v in row.items() if k not in ("step", "progress", "memory_bytes")]
            rows.append((title, f"step {row['step']:,}: {', '.join(words)}"))
    try:
        result = read_result(run_dir)
    except CheckpointError as error:
        return [*rows, ("result", str(error))]
    if result is not None:
        title, first = ("result (valid)", []) if summary.end else ("earlier end (valid)", ["step"])
        keys = (*first, "word_ppl", "token_ppl", "bits_per_byte", *SCORES, "epochs", "elapsed_s")
        rows.append((title, ", ".join(f"{key} {_short(result[key])}" for key in keys if key in result)))
    if not metrics and result is None:
        rows.append((METRICS, "no rows yet"))
    return rows


def _short(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return format_number(value) if is_number else str(value)


def diff(first: Path, second: Path) -> str:
    """What differs between two runs, in two columns."""
    lines = []
    asked = [settings(path) for path in (first, second)]
    numbers = [_numbers(path) for path in (first, second)]
    for name, (left, right) in (("configuration", asked), ("numbers", numbers)):
        keys = differing((left, right))
        if name == "configuration":
            keys.sort()
        if keys:
            rows = [[name, str(first), str(second)]]
            rows += [[key, left.get(key, NOTHING), right.get(key, NOTHING)] for key in keys]
            lines += [*columns(rows), ""]
        else:
            lines += [f"{name}: the same", ""]
    return "\n".join(lines[:-1]) + "\n"


def settings(run_dir: Path) -> dict[str, str]:
    """What was asked for: the configuration, or where no checkpoint has it yet the command."""
    info = readable(read_info, run_dir)
    _, config = read_newest_config(run_dir)
    kept = {key: value for key, value in config.items() if key not in NOT_COMPARED}
    values = {key: format_value(value) for key, value in flatten(kept)}
    if not values:
        values = {"command (no checkpoint yet)": shlex.join(map(str, info.get("command", [])))}
    digests = {f"{key} (digest)": str(value)[:12] for key, value in section(info, "digests").items()}
    return {"command": str(config.get("command", NOTHING)), "seed": str(info.get("seed", NOTHING)), **values, **digests}


def differing(tables: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys that have not the same value in all, in the order in which they come."""
    keys = dict.fromkeys(key for table in tables for key in table)
    return [key for key in keys if len({table.get(key) for table in tables}) > 1]


def _numbers(run_dir: Path) -> dict[str, str]:
    """What came out of it."""
    summary = read_summary(run_dir)
    result, metrics = summary.end, read_metrics(run_dir)
    speeds = [row["tokens_per_s"] for row in metrics if isinstance(row.get("tokens_per_s"), float)]
    title = "best valid nats per token" if summary.loss_unit == PER_TOKEN else "best valid loss"
    values = {
        "status": summary.status.name,
        "parameters": NOTHING if summary.num_parameters is None else f"{summary.num_parameters:,}",
        "step": format_step(summary.step),
        "best valid ppl per word": NOTHING if summary.word_ppl is None else format_number(summary.word_ppl),
        "best valid ppl per token": NOTHING if summary.token_ppl is None else format_number(summary.token_ppl),
        title: format_loss(summary.best_valid_loss),
    }
    if speeds:
        values[f"{summary.unit}s/s (median)"] = format_number(median(speeds))
    if isinstance(result.get("elapsed_s"), float):
        values["time"] = format_duration(result["elapsed_s"])
    for key in ("epochs", f"trained_{summary.unit}s", "word_ppl", "token_ppl", "bits_per_byte", *SCORES):
        if key in result:
            values[f"result: {key}"] = _short(result[key])
    return values
