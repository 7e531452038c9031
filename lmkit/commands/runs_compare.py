"""lmkit runs compare and plot: several runs side by side, never as if numbers of different texts could be compared."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from lmkit.commands.output import output_path
from lmkit.commands.runs_show import differing, settings
from lmkit.commands.runs_text import NOTHING, columns, format_loss, format_step
from lmkit.console import format_duration, format_number
from lmkit.errors import CheckpointError, ResourceError
from lmkit.plots import Curve, plot_curves
from lmkit.store.browse import (
    PER_TOKEN,
    RunSummary,
    is_of_present_data,
    read_newest_config,
    read_summary,
    readable,
    section,
)
from lmkit.store.found import read_info, read_metrics, read_result

LONGEST = 36
"""Characters of a setting that the table shows."""
BEST = "*"


@dataclass(frozen=True)
class Facts:
    """What is known of one run; what is not known is None or empty."""

    name: str
    summary: RunSummary
    result: dict[str, Any]
    """result.json, which is of an earlier end where the run trains on (on other data: empty); numbers of the end are in
    ``summary.end``."""
    config: dict[str, Any]
    digests: dict[str, Any]
    metrics: list[dict[str, Any]]
    """The rows of metrics.jsonl; none where it cannot be read."""
    losses: list[tuple[int, float]]
    """Step and validation loss, in the summary's ``loss_unit``."""
    last_row: dict[str, Any]
    """The last row of metrics about training."""
    tokens_per_s: float | None

    @property
    def tokens_key(self) -> str | None:
        """Equal for two runs only if their losses per token are of the same tokens; None: not known."""
        data, tokenizer = self.digests.get("data"), self.digests.get("tokenizer")
        return None if data is None or tokenizer is None else f"{data}/{tokenizer}"

    @property
    def words_key(self) -> str | None:
        """Equal for two runs only if their perplexities per word are of the same words, whatever the tokenizer, and as
        many of them read as <unk>: the more are, the lower it is."""
        words, size, unknown = (self.result.get(f"num_{name}") for name in ("words", "bytes", "unk"))
        dataset, tokenizer = section(self.config, "dataset"), section(self.config, "tokenizer")
        if words is None or size is None or not dataset:
            return None
        if dataset.get("kind") == "benchmark":
            dataset = {**dataset, "path": None}  # the text is the same wherever it lies
        if dataset.get("kind") == "benchmark" and not str(dataset.get("name")).endswith("_raw"):  # has <unk> as a word
            unknown = tokenizer.get("vocab_size") if tokenizer.get("kind") == "word" else None
        return json.dumps([dataset, words, size, unknown], sort_keys=True)

    @property
    def span(self) -> str:
        """How validation while training reads the text."""
        model = section(self.config, "model")
        if memory := model.get("memory_tokens"):
            return f"{memory} tokens in each layer, across all segments"
        if model.get("kind") in ("vae_lstm", "relgan"):
            return "each sentence on its own"
        if model.get("kind") == "transformer":
            return f"windows of {section(self.config, 'train').get('seq_len', '?')} tokens side by side"
        return "state carried over the whole text"


def read_facts(run_dir: Path, name: str) -> Facts:
    """Read a run; what is damaged makes for fewer values."""
    try:
        metrics = read_metrics(run_dir)
    except CheckpointError:
        metrics = []
    train = [row for row in metrics if "loss" in row]
    result, (_, config) = readable(read_result, run_dir), read_newest_config(run_dir)
    speeds = [row["tokens_per_s"] for row in train if isinstance(row.get("tokens_per_s"), float)]
    return Facts(
        name=name,
        summary=read_summary(run_dir),
        result=result if is_of_present_data(result, config) else {},
        config=config,
        digests=section(readable(read_info, run_dir), "digests"),
        metrics=metrics,
        losses=[(row["step"], row["valid_loss"]) for row in metrics if isinstance(row.get("valid_loss"), float)],
        last_row=train[-1] if train else {},
        tokens_per_s=median(speeds) if speeds else None,
    )


def letters(keys: Sequence[str | None]) -> list[str]:
    """A letter for each key, the same for equal keys; what is not known shares its letter with nothing."""
    known: dict[object, str] = {}
    return [known.setdefault(i if key is None else key, _letter(len(known))) for i, key in enumerate(keys)]


def _letter(number: int) -> str:
    return chr(65 + number) if number < 26 else f"A{number}"


def lowest(values: Sequence[float | None], groups: Sequence[str]) -> set[int]:
    """Positions of the lowest value of every group that has at least two."""
    best = set()
    for group in set(groups):
        there = [
            (v, i)
            for i, (v, g) in enumerate(zip(values, groups, strict=True))
            if g == group and v is not None and not math.isnan(v)
        ]
        best |= {min(there)[1]} if len(there) > 1 else set()
    return best


def compare(run_dirs: Sequence[Path]) -> str:
    """The tables: numbers, then the settings that differ."""
    runs = [read_facts(path, str(path)) for path in run_dirs]
    tokens, words = letters([run.tokens_key for run in runs]), letters(_words_keys(runs))
    rows = [["numbers", *(run.name for run in runs)], *_about_rows(runs)]
    rows.append(["same text and tokens", *tokens])
    rows += _loss_rows(runs, tokens)
    rows.append(["same words", *words])
    rows.append(["  ppl per word, best", *_starred([run.summary.word_ppl for run in runs], words, format_number)])
    lines = [*columns([row for row in rows if set(row[1:]) != {NOTHING}]), "", *_notes(runs, tokens, words)]
    asked = [settings(path) for path in run_dirs]
    if keys := sorted(differing(asked)):
        table = [["settings that differ", *(run.name for run in runs)]]
        table += [[key, *(_cut(values.get(key, NOTHING)) for values in asked)] for key in keys]
        lines += ["", *columns(table)]
    else:
        lines += ["", "settings: the same"]
    return "\n".join(lines) + "\n"


def _words_keys(runs: Sequence[Facts]) -> list[str | None]:
    """A run that has not ended yet has the words of an ended one on the same tokens."""
    known = {run.tokens_key: run.words_key for run in runs if run.words_key is not None}
    return [run.words_key or known.get(run.tokens_key) or run.tokens_key for run in runs]


def _about_rows(runs: Sequence[Facts]) -> list[list[str]]:
    def number(value: Any) -> str:
        return NOTHING if not isinstance(value, int | float) else format_number(value)

    def seconds(run: Facts) -> str:
        value = run.summary.end.get("elapsed_s", run.last_row.get("elapsed_s"))
        return format_duration(value) if isinstance(value, int | float) else NOTHING

    units = list(dict.fromkeys(run.summary.unit for run in runs))

    def counted(unit: str, run: Facts) -> str:
        known = run.summary.end.get(f"trained_{unit}s", run.last_row.get("num_targets"))
        return number(known) if run.summary.unit == unit else NOTHING

    def speed(unit: str, run: Facts) -> str:
        return number(run.tokens_per_s) if run.summary.unit == unit else NOTHING

    columns_of: dict[str, Callable[[Facts], str]] = {
        "status": lambda run: run.summary.status.name,
        "dataset": lambda run: run.summary.dataset or NOTHING,
        "tokenizer": lambda run: str(section(run.config, "tokenizer").get("kind", NOTHING)),
        "model": lambda run: run.summary.model or NOTHING,
        "parameters": lambda run: number(run.summary.num_parameters),
        "steps": lambda run: format_step(run.summary.step),
        "epochs": lambda run: number(run.summary.end.get("epochs", run.last_row.get("epoch"))),
        **{f"{unit}s trained on": partial(counted, unit) for unit in units},
        "time": seconds,
        **{f"{unit}s/s (median)": partial(speed, unit) for unit in units},
        "train loss, last": lambda run: number(run.last_row.get("loss")),
    }
    return [[name, *map(show, runs)] for name, show in columns_of.items()]


def _loss_rows(runs: Sequence[Facts], groups: Sequence[str]) -> list[list[str]]:
    best = [run.summary.best_valid_loss for run in runs]
    last = [run.losses[-1][1] if run.losses else None for run in runs]
    at = [next((s for s, loss in run.losses if loss == b), None) for run, b in zip(runs, best, strict=True)]
    return [
        ["  valid loss, best", *_starred(best, groups, format_loss)],
        ["    at step", *map(format_step, at)],
        ["  valid loss, last", *map(format_loss, last)],
        ["  ppl per token, best", *_starred([run.summary.token_ppl for run in runs], groups, format_number)],
    ]


def _starred(values: Sequence[float | None], groups: Sequence[str], show: Any) -> list[str]:
    best = lowest(values, groups)
    return [NOTHING if v is None else show(v) + (f" {BEST}" if i in best else "") for i, v in enumerate(values)]


def _notes(runs: Sequence[Facts], tokens: Sequence[str], words: Sequence[str]) -> list[str]:
    """What may be compared with what, and why not."""
    lines = [f"losses: {unit}" for unit in dict.fromkeys(run.summary.loss_unit for run in runs)]
    if len(set(tokens)) > 1:
        lines.append(
            "NOT comparable per token under different letters: other data or another tokenizer "
            f"({_members(runs, tokens)})"
        )
    if len(set(words)) > 1:
        lines.append(
            "NOT comparable per word under different letters: another text, or more of it read as <unk> "
            f"({_members(runs, words)})"
        )
    for group in dict.fromkeys(tokens):
        spans = {run.span for run, g in zip(runs, tokens, strict=True) if g == group}
        if len(spans) > 1:
            lines.append(f"under {group} validation saw different text before a token: {', '.join(sorted(spans))}")
    if any(len([w for w in words if w == word]) > 1 for word in words):
        lines.append(f"{BEST} the lowest under its letter")
    return lines


def _members(runs: Sequence[Facts], groups: Sequence[str]) -> str:
    return "; ".join(
        f"{group}: {', '.join(run.name for run, g in zip(runs, groups, strict=True) if g == group)}"
        for group in dict.fromkeys(groups)
    )


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def plot(run_dirs: Sequence[Path], to: str) -> str:
    """Draw the loss curves of runs into a PNG; returns what to say. Raises ConfigError, CheckpointError, ResourceError.

    With several runs each has a colour: the running mean of its training loss thin, its validation with marks.
    """
    path = output_path(to, "to")
    names = _short_names(run_dirs)
    curves: dict[str, Curve] = {}
    for run_dir, name in zip(run_dirs, names, strict=True):
        rows = read_metrics(run_dir)
        for title, key in (("train", "loss"), ("valid", "valid_loss")):
            points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), float)]
            if points:
                curves[f"{title} {name}"] = ([x for x, _ in points], [y for _, y in points])
    if not curves:
        raise CheckpointError(f"{', '.join(map(str, run_dirs))}: no losses in metrics.jsonl to draw", "train first")
    runs = [read_facts(run_dir, "") for run_dir in run_dirs]
    groups = {run.tokens_key or str(run_dir) for run, run_dir in zip(runs, run_dirs, strict=True)}
    per_token = all(run.summary.loss_unit == PER_TOKEN for run in runs)
    apart = any(run.summary.validates_otherwise for run in runs)
    title = names[0] if len(names) == 1 else ""
    if len(groups) > 1:
        title = "different data or tokenizers: losses cannot be compared"
    try:
        plot_curves(path, curves, title=title, per_token=per_token, apart=apart)
    except OSError as error:
        raise ResourceError(f"cannot write to={path}: {error.strerror or error}", "name another file") from error
    return f"wrote {path}\n"


def _short_names(run_dirs: Sequence[Path]) -> list[str]:
    """Names without the folders that all of them share."""
    paths = [str(path.absolute()) for path in run_dirs]
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, shared) for path in paths]
