"""Whether a run can go on with a configuration and its data, and what is said and noted about what changed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmkit.commands.new_data import DATA_ORDER, order_of
from lmkit.commands.runs_show import NOT_COMPARED
from lmkit.commands.runs_text import columns
from lmkit.config.commands import FinetuneConfig, PretrainConfig
from lmkit.config.model import ModelConfig
from lmkit.config.plain import NEWER, from_plain
from lmkit.config.text import flatten, format_value
from lmkit.config.training import STREAM_KEYS
from lmkit.console import Console
from lmkit.errors import CheckpointError, ConfigError
from lmkit.snapshots import state_in
from lmkit.store.browse import read_journal
from lmkit.store.checkpoint import Snapshot
from lmkit.store.environment import environment
from lmkit.store.manifest import CONFIG, STATE, read_manifest
from lmkit.store.runs import Change, Run

IMMUTABLE = (
    "command", "model", "seed", "optimizer.kind", "train.batch_size", "train.seq_len", "train.order", "train.shuffle",
    "train.seq_len_jitter", "adapter", "tune", "objective", "base_sha256",
    "task.kind", "task.class_weights", "task.dropout", "task.metric", "task.network", "task.pooling",
    "task.beta", "task.label_smoothing", "task.sft_weight",
)  # fmt: skip
"""Keys that decide what a run computes: a run cannot be resumed with another value. The rest may change; that data and
tokenizer stay the same their digests tell, wherever they lie now."""
UNREAD_OF_ROWS = ("train.seq_len", *(f"train.{key}" for key in STREAM_KEYS))
"""Those of them that tasks on rows do not read; they are refused now, and older runs may have been given some."""
LENGTH = ("train.max_steps", "train.max_epochs", "train.budget", "train.patience")
"""Keys with another value of which a finished run goes on."""


def check_known(path: Path, snapshot: Snapshot) -> None:
    """Raise CheckpointError if configuration or state of a checkpoint have keys that this version does not know."""
    file = CONFIG
    try:
        config_of(snapshot.config)
        order_of(snapshot.config)
        file = STATE
        state_in(snapshot)
    except ConfigError as error:
        made = read_manifest(path).environment.get("lmkit")
        raise CheckpointError(f"{path / file} was made by lmkit {made}: {error}") from None


def check_new(run: Run) -> None:
    """Raise CheckpointError if there was a checkpoint, so that no run begins anew without a word."""
    saved = [event.get("step") for event in read_journal(run.path) if event.get("event") == "save"]
    if saved:
        raise CheckpointError(
            f"{run.path} has no checkpoint any more, but was saved after step {saved[-1]}",
            "bring its checkpoints back, or begin a new run with another run.dir",
        )


def check_origin(run: Run, digests: Mapping[str, str], path: Path, console: Console, *, new_data: bool = False) -> None:
    """Raise ConfigError if a checkpoint was trained on other data (unless ``new_data``: they may be others) or with
    another tokenizer, whatever run.json says."""
    told = read_manifest(path).digests
    before = {name: told[name] for name in digests if name in told and not (new_data and name == "data")}
    run.refuse_changes(before, digests, functools.partial(show_changes, console))


def config_of(stored: Mapping[str, Any]) -> PretrainConfig | FinetuneConfig:
    """The configuration that a run has stored. Raises ConfigError for keys that this version does not know."""
    beside = {"command", "vocab_size", "run", "resume", DATA_ORDER}
    command = stored.get("command")
    if command not in ("pretrain", "finetune"):
        raise ConfigError(f"command={command!r} is unknown", NEWER)
    if command == "pretrain":
        return from_plain(PretrainConfig, {key: value for key, value in stored.items() if key not in beside})
    from_plain(ModelConfig, stored["model"], where="config.model")
    beside |= {"model", "base", "base_sha256", "base_had_base", "corpus", "fitted"}
    return from_plain(FinetuneConfig, {key: value for key, value in stored.items() if key not in beside})


def say_environment(run: Run, checkpoint: Path, console: Console) -> None:
    """Say and note it if the last bits of the results may differ because the software or the machine did change."""
    before, now = read_manifest(checkpoint).environment, environment() | run.place
    changed = [f"{key} {before[key]} -> {now[key]}" for key in now if before.get(key, now[key]) != now[key]]
    if changed:
        run.journal("environment", {"changed": changed})
        console.say(f"the order is the same, but not promised bit for bit: {', '.join(changed)}")


def check_resumable(old: dict[str, Any], new: dict[str, Any], console: Console | None = None) -> list[str]:
    """Differences between a stored and a new configuration that are allowed and concern the training, as text.

    Raises ConfigError naming every key that must not change; the console is shown their values in two columns.
    """
    before, after = dict(flatten(old)), dict(flatten(new))
    changed = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    said = {key: f"{key}: {format_value(before.get(key))} -> {format_value(after.get(key))}" for key in changed}
    told = [key for key in changed if key.partition(".")[0] in old]  # other sections are newer than the run
    unread = UNREAD_OF_ROWS if (old.get("task") or {}).get("kind") in ("classify", "regress") else ()
    told = [key for key in told if key not in unread]
    # the average that schedule-free training keeps is told from its other weights by it
    fixed = (*IMMUTABLE, "optimizer.beta1") if before.get("optimizer.kind") == "schedule_free" else IMMUTABLE
    fatal = [key for key in told if any(key == k or key.startswith(f"{k}.") for k in fixed)]
    if fatal:
        pairs = ", ".join(said[key] for key in fatal)
        if console is not None:
            show_changes(console, [(key, before.get(key), after.get(key)) for key in fatal])
        raise ConfigError(f"the run cannot be resumed with other values ({pairs})", "start a new run, or use finetune")
    beside = (*NOT_COMPARED, DATA_ORDER, "base_had_base")  # an older lmkit has not written down the last one
    return [text for key, text in said.items() if key.partition(".")[0] not in beside]


def show_changes(console: Console, changes: Sequence[Change]) -> None:
    """What the run has and what there is now, side by side."""
    rows = [[key, format_value(before), format_value(now)] for key, before, now in changes]
    console.say("\n".join(columns([["key", "the run", "now"], *rows], indent=2)))
