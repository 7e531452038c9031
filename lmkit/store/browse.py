"""Looking at runs from outside: finding them, their state, and a summary of each, without torch or any lock held."""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from lmkit.config.runs import DEFAULT_ROOT
from lmkit.errors import CheckpointError, DivergedError, ResourceError, RunLockedError
from lmkit.store import manifest as mf
from lmkit.store import storage
from lmkit.store.found import (
    CHECKPOINTS,
    FINISHED,
    JOURNAL,
    LOCK,
    METRICS,
    RUN_INFO,
    absolute,
    metrics_row,
    read_info,
    read_result,
)
from lmkit.store.listing import list_checkpoints, read_json_entry
from lmkit.store.lock import acquire
from lmkit.store.manifest import Manifest, read_manifest
from lmkit.store.records import read_rows

MAX_DEPTH = 3
"""Folders below the root in which runs are looked for: a multirun makes a folder of runs."""
PAUSE_S = 0.005
"""After so long a lock is looked at again: another one who looked may have held it."""


class Status(Enum):
    """What has become of a run."""

    running = "running"
    """A process holds its lock."""
    finished = "finished"
    """It came to its end."""
    stopped = "stopped"
    """Stopped on request, and saved, unless it was before the first step or by a second signal."""
    diverged = "diverged"
    """It stopped at a loss or gradient that was not finite."""
    crashed = "crashed"
    """It ended in any other way: killed, or an error."""
    unknown = "unknown"
    """Whether it is running cannot be found out here."""


PER_TOKEN = "nats per token"
_OTHER_LOSSES = {
    "classify": "nats per example in training, 1 - task.metric on valid",
    "regress": "squared error of the standardised target in training, task.metric on valid",
    "prefer": "nats per pair",
}
"""Task whose losses are another thing than nats per token -> what they are."""
_OTHER_UNITS = {"classify": "example", "regress": "example", "prefer": "pair"}
"""Task that learns from other things than tokens -> what one of them is called."""


@dataclass(frozen=True)
class RunSummary:
    """One run in a few values; what could not be found out is None."""

    path: Path
    status: Status
    created: str
    """UTC time, ISO 8601."""
    command: list[str]
    seed: int | None
    dataset: str | None
    model: str | None
    """Kind of model, or of cell."""
    num_parameters: int | None
    step: int | None
    """Optimizer steps completed, as far as the log goes."""
    best_valid_loss: float | None
    """Lowest validation loss so far (where the data changed, on the present ones), in ``loss_unit``."""
    objective: str
    """What was learnt; only ``lm`` is validated by exact likelihoods, so that only its runs have perplexities."""
    tokens_per_word: float | None
    """Tokens for each original word of valid, which turns perplexity per token into perplexity per word."""
    last_log: datetime | None
    """When metrics.jsonl was last written, or the journal where there are no metrics (UTC)."""
    num_bytes: int
    end: dict[str, Any]
    """result.json of a run that is at its end; empty before that, also while it trains on after an earlier end."""

    @property
    def loss_unit(self) -> str:
        """What the losses of training and validation are, for people."""
        return _OTHER_LOSSES.get(self.objective, PER_TOKEN)

    @property
    def unit(self) -> str:
        """What is counted in training, in the singular."""
        return _OTHER_UNITS.get(self.objective, "token")

    @property
    def validates_otherwise(self) -> bool:
        """Whether a loss of validation is another measure than one of training."""
        return self.unit == "example"

    @property
    def token_ppl(self) -> float | None:
        """Best validation perplexity per token."""
        return None if self.best_valid_loss is None or self.objective != "lm" else _exp(self.best_valid_loss)

    @property
    def word_ppl(self) -> float | None:
        """Best validation perplexity per original word, if the number of words is known."""
        if self.best_valid_loss is None or self.tokens_per_word is None or self.objective != "lm":
            return None
        return _exp(self.best_valid_loss * self.tokens_per_word)


def is_run(path: Path) -> bool:
    """Whether a directory is a run, as far as can be seen from outside; what cannot be looked into is none."""
    return os.path.isfile(path / RUN_INFO) or os.path.isdir(path / CHECKPOINTS)


def find_runs(root: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
    """The run at ``root``, or all runs at most ``depth`` folders below it. Raises CheckpointError for no folder."""
    if is_run(root):
        yield root
        return
    try:
        folders = sorted(p for p in root.iterdir() if not p.name.startswith(".") and os.path.isdir(p))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {root}: {error.strerror or error}", "name a folder that holds runs"
        ) from None
    for folder in folders:
        with contextlib.suppress(CheckpointError):
            if is_run(folder):
                yield folder
            elif depth > 1:
                yield from find_runs(folder, depth - 1)


def run_names() -> list[str]:
    """The names of the runs in runs/, none if it cannot be read."""
    try:
        return [path.relative_to(DEFAULT_ROOT).as_posix() for path in find_runs(Path(DEFAULT_ROOT))]
    except CheckpointError:
        return []


def named_run(word: str) -> Path:
    """The run that ``word`` names: its path, or its name in runs/. Raises CheckpointError with what was meant."""
    path = Path(os.path.expanduser(word or "?"))
    for found in (path, Path(DEFAULT_ROOT) / path):
        if is_run(found):
            return found
    if os.path.isfile(path / mf.MANIFEST):
        raise CheckpointError(f"{word} is a checkpoint", "name its run")
    if os.path.exists(path):
        raise CheckpointError(f"{word} is not a run directory", f"lmkit runs ls {word} lists the runs in it")
    near = difflib.get_close_matches(path.name, run_names(), n=3)
    raise CheckpointError(
        f"there is no run {word!r}", f"did you mean {' or '.join(near)}?" if near else "lmkit runs ls lists the runs"
    )


BEFORE_A_STEP = {"changed", "data changed", "environment", "error", "interrupted", "no lock"}
"""What a session that goes on writes down before it changes anything of the run."""


def status_of(run_dir: Path) -> Status:
    """What has become of the run: the events of its last session, its result, and whether its lock is held."""
    has_result = _is_of_the_end(run_dir, readable(read_result, run_dir))
    session: list[dict[str, Any]] = []
    for event in read_journal(run_dir):
        if event.get("event") in ("start", "resume"):
            session.clear()
        else:
            session.append(event)
    names = {str(event.get("event")) for event in session}
    if "stopped" in names:
        return Status.stopped
    if "finished" in names and has_result:
        return Status.finished
    try:
        if is_locked(run_dir):
            return Status.running
    except ResourceError:
        return Status.unknown
    if any(map(_is_divergence, session)):
        return Status.diverged
    if has_result and names <= BEFORE_A_STEP:
        return Status.finished
    return Status.stopped if "interrupted" in names else Status.crashed


def newest_finished_run(root: str | Path) -> Path:
    """The run directly under ``root`` that finished last; one that goes on after its end has not finished.

    Raises CheckpointError saying how to make one.
    """
    root = absolute(root)
    try:
        paths = sorted(root.iterdir()) if root.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"cannot read {root}: {error.strerror or error}", "name a run with run=DIR") from None
    results = [(path, readable(read_result, path)) for path in paths]
    ended = [(str(found.get("ended", "")), path, found) for path, found in results if found.get("status") == FINISHED]
    for _, path, result in sorted(ended, reverse=True):
        # where locks cannot be asked, what it has logged and saved since tells
        if _is_of_the_end(path, result) and status_of(path) in (Status.finished, Status.unknown):
            return path
    unfinished = sum(os.path.isfile(path / RUN_INFO) for path in paths)
    raise CheckpointError(
        f"no finished run in {root}{f' ({unfinished} unfinished)' if unfinished else ''}",
        "train one with lmkit pretrain, or name a run with run=DIR",
    )


def _is_of_the_end(run_dir: Path, result: Mapping[str, Any]) -> bool:
    """Whether a result is of the last step that the run has made: one that goes on after its end keeps the old one."""
    steps = [_metrics(run_dir)[1], *(mf.step_of(path.name) for path in _checkpoints(run_dir)[-1:])]
    last, step = max((step for step in steps if step is not None), default=0), result.get("step")
    return result.get("status") == FINISHED and (not isinstance(step, int) or step >= last)


def _is_divergence(event: Mapping[str, Any]) -> bool:
    """Whether an event of the journal says that the run ended since something was not finite."""
    what = (event.get("event"), event.get("policy"), event.get("code"))
    return what in (("nonfinite", "stop", None), ("error", None, DivergedError.exit_code))


def is_locked(run_dir: Path) -> bool:
    """Whether a process holds the run's lock. Raises ResourceError if that cannot be found out."""
    if not (run_dir / LOCK).exists():
        return False
    for pause_s in (PAUSE_S, 0.0):
        try:
            acquire(run_dir).release()
        except RunLockedError:
            time.sleep(pause_s)
        else:
            return False
    return True


def read_journal(run_dir: Path) -> list[dict[str, Any]]:
    """The events of journal.jsonl in order; torn lines are left out."""
    return read_rows(run_dir / JOURNAL)


def read_summary(run_dir: Path) -> RunSummary:
    """Sum a run up. Damaged files make for fewer values and are no error."""
    info = readable(read_info, run_dir)
    result = readable(read_result, run_dir)
    manifest, config = read_newest_config(run_dir)
    validations, last_step = _metrics(run_dir)
    losses = [_number(row.get("valid_loss")) for row in validations if is_of_present_data(row, config)]
    ended = result if is_of_present_data(result, config) else {}
    losses.append(_number(ended.get("best_valid_loss")))
    steps = [last_step, None if manifest is None else manifest.step]
    dataset, model = section(config, "dataset"), section(config, "model")
    command, seed = info.get("command"), info.get("seed")
    num_parameters = _number(result.get("num_parameters"))
    size, last_log = _size_and_time(run_dir)
    status = status_of(run_dir)
    return RunSummary(
        path=run_dir,
        status=status,
        created=str(info.get("created", "")),
        command=[str(word) for word in command] if isinstance(command, list) else [],
        seed=seed if isinstance(seed, int) else None,
        dataset=_text(ended.get("dataset") or dataset.get("name") or dataset.get("kind")),
        model=_text(model.get("cell") or model.get("kind")),
        num_parameters=_num_parameters(manifest) if num_parameters is None else int(num_parameters),
        step=max((step for step in steps if step is not None), default=None),
        best_valid_loss=min((loss for loss in losses if loss is not None), default=None),
        objective=_learnt(config),
        tokens_per_word=_tokens_per_word(ended, config),
        last_log=last_log,
        num_bytes=size,
        end=result if status is Status.finished else {},
    )


def read_newest_config(run_dir: Path) -> tuple[Manifest | None, dict[str, Any]]:
    """Manifest and configuration of the newest checkpoint in which both are whole; None and {} if there is none."""
    for path in _checkpoints(run_dir)[::-1]:
        with contextlib.suppress(CheckpointError):
            return read_manifest(path), read_json_entry(path, mf.CONFIG)
    return None, {}


def _checkpoints(run_dir: Path) -> list[Path]:
    try:
        return list_checkpoints(run_dir)
    except CheckpointError:
        return []


def readable(read: Callable[[Path], dict[str, Any] | None], run_dir: Path) -> dict[str, Any]:
    """What ``read`` finds in a run, {} if there is nothing or it is damaged."""
    try:
        return read(run_dir) or {}
    except CheckpointError:
        return {}


def _metrics(run_dir: Path) -> tuple[list[dict[str, Any]], int | None]:
    """The rows of metrics.jsonl that hold a validation loss, and the last step; the rest is not parsed."""
    try:
        lines = storage.read_regular(run_dir / METRICS).splitlines()
    except OSError:
        return [], None
    rows = [row for line in lines if b'"valid_loss"' in line and (row := metrics_row(line)) is not None]
    steps = (row["step"] for line in reversed(lines) if (row := metrics_row(line)) is not None)
    return rows, next(steps, None)


def is_of_present_data(row: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a row of metrics or a result is of the data that a run of this configuration goes on with."""
    since, step = section(config, "data_order").get("first_step"), row.get("step")
    return not (isinstance(since, int) and isinstance(step, int) and step <= since)


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of a stored configuration, {} if it has none."""
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    """The value if it is a number that can be compared."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    return float(value) if is_number else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _num_parameters(manifest: Manifest | None) -> int | None:
    if manifest is None:
        return None
    return sum(math.prod(spec.shape) for spec in manifest.tensors[mf.MODEL].values())


def _learnt(config: dict[str, Any]) -> str:
    """The objective, or the task where its validation loss is no likelihood."""
    task = str(section(config, "task").get("kind", "lm"))
    return task if task in _OTHER_LOSSES else str(section(config, "objective").get("kind", "lm"))


def _tokens_per_word(result: Mapping[str, Any], config: Mapping[str, Any]) -> float | None:
    """Known once the run has scored valid to the end, and always 1 where tokens are words."""
    words, tokens = _number(result.get("num_words")), _number(result.get("num_tokens"))
    if words and tokens:
        return tokens / words
    return 1.0 if section(config, "tokenizer").get("kind") == "word" else None


def _size_and_time(run_dir: Path) -> tuple[int, datetime | None]:
    """Bytes of all files in the run, and when its log was last written."""
    size = 0
    for folder, _, names in os.walk(run_dir):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(folder, name)).st_size
    for name in (METRICS, JOURNAL):
        with contextlib.suppress(OSError):
            return size, datetime.fromtimestamp((run_dir / name).stat().st_mtime, UTC)
    return size, None


def _exp(nats: float) -> float:
    """exp without overflow."""
    return math.exp(nats) if nats < 700 else math.inf
