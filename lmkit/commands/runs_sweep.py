"""lmkit runs sweep: what has become of the jobs of a multirun, seeds folded, and the command that retries the rest."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from lmkit.commands.runs_compare import Facts, letters, lowest, read_facts
from lmkit.commands.runs_show import differing, settings
from lmkit.commands.runs_text import NOTHING, columns, format_loss, format_step
from lmkit.console import format_number, plural
from lmkit.errors import CheckpointError
from lmkit.store.browse import PER_TOKEN, Status, find_runs
from lmkit.store.found import RUN_INFO
from lmkit.store.sweeps import Job, read, read_failures

SEED = "seed"
MOST_PROBLEM = 120
"""Characters of an error that the table shows."""


@dataclass(frozen=True)
class _Row:
    """A job and, if it has begun, its run."""

    job: Job
    facts: Facts | None

    @property
    def state(self) -> str:
        """done, running, stopped (on request), failed (with what), or not started."""
        if self.facts is None:
            return "not started"
        status = self.facts.summary.status
        states = {Status.finished: "done", Status.running: "running", Status.stopped: "stopped"}
        return states.get(status, f"failed ({status.name})")

    @property
    def loss(self) -> float | None:
        return None if self.facts is None else self.facts.summary.best_valid_loss


def sweep_table(root: Path) -> str:
    """The jobs, the settings with seeds folded, the best, and how to go on. Raises CheckpointError for no sweep."""
    sweep = read(root)
    jobs = sweep.jobs if sweep is not None else _jobs_of_runs(root)
    if not jobs:
        raise CheckpointError(f"{root} holds no sweep and no runs", "name the run.dir of a multirun (-m)")
    rows = [_Row(job, _facts(root / job.folder)) for job in jobs]
    groups = letters([None if row.facts is None else row.facts.tokens_key for row in rows])
    failures = read_failures(root)
    lines = _job_lines(rows, groups, failures)
    lines += ["", *_folded_lines(rows, groups)]
    states = ("done", "running", "stopped", "failed", "not started")
    counts = {state: sum(row.state.startswith(state) for row in rows) for state in states}
    counted = [f"{number} {state}" for state, number in counts.items() if number]
    lines += ["", f"{plural(len(rows), 'job')}: {', '.join(counted)}"]
    if sweep is not None and counts["stopped"] + counts["failed"] + counts["not started"]:
        words = [word for word in sweep.command if not word.startswith(("resume=", "run.dir="))]
        words += [f"run.dir={root}", "resume=true"]  # where it is now
        lines += ["retry what is not done:", f"  {shlex.join(words)}"]
    return "\n".join(lines) + "\n"


def _facts(run_dir: Path) -> Facts | None:
    return read_facts(run_dir, run_dir.name) if (run_dir / RUN_INFO).is_file() else None


def _jobs_of_runs(root: Path) -> list[Job]:
    """The runs in a folder without sweep.json as jobs, told apart by the settings that differ."""
    paths = list(find_runs(root))
    asked = [{k: v for k, v in settings(path).items() if not k.endswith("(digest)")} for path in paths]
    keys = sorted(differing(asked))
    return [
        Job(path.relative_to(root).as_posix(), {key: values[key] for key in keys if key in values})
        for path, values in zip(paths, asked, strict=True)
    ]


def _words(words: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in words.items()) or NOTHING


def _job_lines(rows: Sequence[_Row], groups: Sequence[str], failures: dict[str, str]) -> list[str]:
    best = lowest([row.loss for row in rows], groups)
    several = _num_texts(rows, groups) > 1
    table = [["job", "settings", "state", "step", "valid loss", "ppl per token", ""]]
    for number, (row, group) in enumerate(zip(rows, groups, strict=True)):
        summary = None if row.facts is None else row.facts.summary
        note = f"best of {group}" if several and number in best else "best" if number in best else ""
        if row.state.startswith(("failed", "not")) and row.job.folder in failures:
            note = failures[row.job.folder][:MOST_PROBLEM]
        table.append(
            [
                row.job.folder,
                _words(row.job.words),
                row.state,
                format_step(None if summary is None else summary.step),
                format_loss(row.loss),
                NOTHING if summary is None or summary.token_ppl is None else format_number(summary.token_ppl),
                note,
            ]
        )
    return columns(table, right=(3, 4, 5))


def _folded_lines(rows: Sequence[_Row], groups: Sequence[str]) -> list[str]:
    """Jobs that differ in the seed only, as one line each; empty lines where no job has a seed of its own."""
    if not any(SEED in row.job.words for row in rows):
        return [_comparable(groups, rows)]
    folded: dict[tuple[str, str], list[_Row]] = {}
    for row, group in zip(rows, groups, strict=True):
        words = {key: value for key, value in row.job.words.items() if key != SEED}
        if row.state == "done":
            folded.setdefault((_words(words), group), []).append(row)
    table = [["seeds folded", "seeds", "valid loss", "spread", "ppl per token", ""]]
    losses = [[row.loss for row in same if row.loss is not None] for same in folded.values()]
    means = [mean(values) if values else None for values in losses]
    best = lowest(means, [group for _, group in folded])
    for number, (((shown, _), same), values) in enumerate(zip(folded.items(), losses, strict=True)):
        middle = means[number]
        have_ppl = all(row.facts is not None and row.facts.summary.token_ppl is not None for row in same)
        table.append(
            [
                shown,
                str(len(values)),
                format_loss(middle),
                f"{stdev(values):.4f}" if len(values) > 1 else NOTHING,
                NOTHING if middle is None or not have_ppl else format_number(math.exp(min(middle, 700.0))),
                "best" if number in best else "",
            ]
        )
    note = "valid loss: mean of the lowest of each seed; spread: sample standard deviation; perplexity: of that mean"
    return [*columns(table, right=(1, 2, 3, 4)), note, _comparable(groups, rows)]


def _num_texts(rows: Sequence[_Row], groups: Sequence[str]) -> int:
    """How many different texts, or tokens of them, the jobs that have begun are trained on."""
    return len({group for group, row in zip(groups, rows, strict=True) if row.facts is not None})


def _comparable(groups: Sequence[str], rows: Sequence[_Row]) -> str:
    if _num_texts(rows, groups) > 1:
        return "jobs of different data or tokenizers are NOT compared with each other"
    units = dict.fromkeys(row.facts.summary.loss_unit for row in rows if row.facts is not None)
    return f"all on the same data and tokens; losses in {' or '.join(units) or PER_TOKEN}"
