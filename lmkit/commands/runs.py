"""lmkit runs: list run directories, keep or remove what is in them. ``runs_*`` beside it show, compare and check."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from lmkit.commands.output import write_text
from lmkit.commands.runs_show import diff, show
from lmkit.commands.runs_sweep import sweep_table
from lmkit.commands.runs_text import (
    NOTHING,
    columns,
    format_bytes,
    format_model,
    format_ppl,
    format_step,
    format_time,
)
from lmkit.commands.runs_verify import verify
from lmkit.config.runs import DEFAULT_PLOT, DEFAULT_ROOT, RunsConfig
from lmkit.errors import CheckpointError, ConfigError, RunLockedError
from lmkit.store import storage
from lmkit.store.browse import PER_TOKEN, RunSummary, find_runs, named_run, read_summary
from lmkit.store.listing import list_checkpoints
from lmkit.store.lock import LOOK_S, NoLocksError, acquire
from lmkit.store.manifest import step_directory, step_of
from lmkit.store.pins import read_pins, write_pins
from lmkit.store.records import encode


def run(cfg: RunsConfig) -> None:
    """Do one action (all but verify-resume). Text goes to standard output, questions to standard error."""
    words = cfg.words
    if cfg.action == "ls":
        root = os.path.expanduser(words[0]) if words else DEFAULT_ROOT
        list_runs(Path(root), as_json=cfg.json, is_default=not words)
    elif cfg.action == "show":
        write_text(show(named_run(words[0])))
    elif cfg.action == "diff":
        write_text(diff(named_run(words[0]), named_run(words[1])))
    elif cfg.action in ("compare", "plot", "report"):
        write_text(_look(cfg))
    elif cfg.action == "sweep":
        write_text(sweep_table(Path(os.path.expanduser(words[0]))))
    elif cfg.action == "verify":
        verify(words)
    elif cfg.action in ("pin", "unpin"):
        set_pin(named_run(words[0]), words[1], pin=cfg.action == "pin")
    elif cfg.action == "replay":
        from lmkit.commands import replay  # the only one of these that needs torch

        replay.run(str(named_run(words[0])), step_number(words[1]))
    else:
        once = {path.resolve(): path for path in map(named_run, words)}
        remove(list(once.values()), ask=not cfg.yes)


def _look(cfg: RunsConfig) -> str:
    """What compare, plot and report print. What they read with matplotlib or numpy is imported here only."""
    runs = [named_run(word) for word in cfg.words]
    if cfg.action == "report":
        from lmkit.commands.runs_report import write_report

        return write_report(runs[0], cfg.to)
    from lmkit.commands.runs_compare import compare, plot

    return compare(runs) if cfg.action == "compare" else plot(runs, cfg.to or DEFAULT_PLOT)


def list_runs(root: Path, *, as_json: bool, is_default: bool) -> None:
    """Print a table, or a JSON object a line, of the runs in ``root``, the newest last."""
    runs = [] if is_default and not root.exists() else [read_summary(path) for path in find_runs(root)]
    runs.sort(key=lambda summary: (summary.created, summary.path))
    if as_json:
        write_text("".join(json.dumps(encode(_plain(summary, root))) + "\n" for summary in runs))
        return
    if not runs:
        print(f"no runs in {root}: lmkit pretrain makes one", file=sys.stderr)
        return
    rows = [["name", "dataset", "model", "step", "status", "best valid ppl", "last log", "size"]]
    rows += [
        [
            _name(summary, root),
            summary.dataset or NOTHING,
            format_model(summary),
            format_step(summary.step),
            summary.status.name,
            format_ppl(summary),
            format_time(summary.last_log),
            format_bytes(summary.num_bytes),
        ]
        for summary in runs
    ]
    write_text("\n".join(columns(rows, right=(3, 7))) + "\n")


def _name(summary: RunSummary, root: Path) -> str:
    return root.name or str(root) if summary.path == root else summary.path.relative_to(root).as_posix()


def _plain(summary: RunSummary, root: Path) -> dict[str, Any]:
    return {
        "name": _name(summary, root),
        "path": str(summary.path.absolute()),
        "status": summary.status.name,
        "created": summary.created,
        "command": summary.command,
        "seed": summary.seed,
        "dataset": summary.dataset,
        "model": summary.model,
        "num_parameters": summary.num_parameters,
        "step": summary.step,
        "best_valid_loss": summary.best_valid_loss,
        "best_valid_nats_per_token": summary.best_valid_loss if summary.loss_unit == PER_TOKEN else None,
        "best_valid_ppl_per_token": summary.token_ppl,
        "best_valid_ppl_per_word": summary.word_ppl,
        "last_log": None if summary.last_log is None else summary.last_log.isoformat(timespec="seconds"),
        "bytes": summary.num_bytes,
    }


def step_number(word: str) -> int:
    """K of ``step=K``. Raises ConfigError."""
    match = re.fullmatch(r"step[=-]0*(\d{1,18})", word)
    if match is None:
        raise ConfigError(f"{word!r} is not a step", "write step=K, as in step=1000")
    return int(match[1])


def set_pin(run_dir: Path, word: str, *, pin: bool) -> None:
    """Pin or unpin the checkpoint that ``step=K`` names. Raises ConfigError or CheckpointError."""
    step, pinned = step_number(word), read_pins(run_dir)
    steps = [step_of(path.name) or 0 for path in list_checkpoints(run_dir)]
    if pin and step not in steps:
        known = f"it has {', '.join(f'step={k}' for k in steps)}" if steps else "it has none yet"
        raise CheckpointError(f"{run_dir} has no checkpoint of step {step}", known)
    if not pin and step not in pinned:
        known = f"pinned: {', '.join(f'step={k}' for k in sorted(pinned))}" if pinned else "nothing is"
        raise CheckpointError(f"step {step} of {run_dir} is not pinned", known)
    write_pins(run_dir, pinned | {step} if pin else pinned - {step})
    if pin and step_directory(step) not in [path.name for path in list_checkpoints(run_dir)]:
        write_pins(run_dir, pinned)
        raise CheckpointError(f"step {step} of {run_dir} was removed by its run in the meantime", "pin a newer one")
    write_text(f"{'pinned' if pin else 'unpinned'} step {step} of {run_dir}\n")


def remove(runs: list[Path], *, ask: bool) -> None:
    """Remove runs; all of them or, where one is in use or a link, none. Raises RunLockedError, ConfigError and such.

    What an rm that was killed has left beside them is removed, too.
    """
    summaries = [read_summary(path) for path in runs] if ask else []
    locks = []
    try:
        for path in runs:
            if path.is_symlink():
                raise ConfigError(f"{path} is a symbolic link", f"name what it points to: {path.resolve()}")
            try:
                locks.append(acquire(path, patience_s=LOOK_S))
            except RunLockedError as error:
                raise RunLockedError(error.problem, "stop it first; nothing was removed") from None
            except NoLocksError as error:
                remedy = "see that no process trains it, and remove the folder by hand"
                raise NoLocksError(f"{error.problem}; nothing was removed", remedy) from None
        if ask and not _agreed(summaries):
            print("nothing was removed", file=sys.stderr)
            return
        for path, lock in zip(runs, locks, strict=True):
            if os.name == "nt":  # a folder with an open file in it cannot be renamed there
                lock.release()
            try:
                trash = storage.put_away(path.absolute())
                lock.release()  # file systems of networks keep a file that is open, and so its folder
                storage.remove_tree(trash)
            except OSError as error:
                raise storage.resource_error("remove", Path(error.filename or path), error) from error  # what is left
            write_text(f"removed {path}\n")
        for folder in sorted({path.absolute().parent for path in runs}):
            storage.empty_trash(folder)
    finally:
        for lock in locks:
            lock.release()


def _agreed(runs: list[RunSummary]) -> bool:
    """Ask on standard error, and read the answer from standard input. Raises ConfigError if nobody can answer."""
    for run in runs:
        what = f"{format_model(run)} on {run.dataset or '?'}, {run.status.name}"
        print(f"{run.path}: {what}, step {format_step(run.step)}, {format_bytes(run.num_bytes)}", file=sys.stderr)
    question = f"remove {'it' if len(runs) == 1 else f'these {len(runs)} runs'} for good? [y/N] "
    print(question, end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer:
        print(file=sys.stderr)
        raise ConfigError("runs rm asks before it removes, and nobody answered", "add --yes")
    return answer.strip().lower() in ("y", "yes")
