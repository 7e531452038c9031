"""Configuration of the training loop, and of the run directory that it writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from lmkit.config.check import Problems
from lmkit.errors import ConfigError


class Order(Enum):
    """How the stream of training tokens is cut into batches."""

    auto = "auto"
    lanes = "lanes"
    windows = "windows"


class Shuffle(Enum):
    """What of the text of lanes changes its place from epoch to epoch."""

    none = "none"
    blocks = "blocks"
    documents = "documents"


class NonFinite(Enum):
    """What to do when the loss or the gradient of a batch is not finite; in all cases that update is not made."""

    stop = "stop"
    skip = "skip"
    rollback = "rollback"


class OnUsr1(Enum):
    """What SIGUSR1 asks for."""

    stop = "stop"
    save = "save"


class Average(Enum):
    """Averages of the weights over the steps."""

    ema = "ema"
    swa = "swa"
    nt_asgd = "nt_asgd"


DEFAULT_MAX_EPOCHS, MOST_EPOCHS = 3.0, 1e9
STREAM_KEYS = ("order", "shuffle", "seq_len_jitter")
"""Keys of ``train`` that say how a stream of tokens is cut and ordered: where none is read they would do nothing."""


@dataclass(kw_only=True)
class TrainConfig:
    """The training loop. A run ends at the first of max_steps, max_epochs and budget that is reached."""

    batch_size: int = 32
    """Sequences per optimizer step, over all devices and micro-batches (>= 1)."""
    micro_batch_size: int | None = None
    """Sequences per forward pass; must divide batch_size (gradients are accumulated); null: batch_size."""
    seq_len: int = 128
    """Tokens per sequence (>= 1); at most model.context where the model has one."""
    order: Order = Order.auto
    """lanes: contiguous text with carried state; windows: random order; auto: lanes where the model carries one."""
    shuffle: Shuffle = Shuffle.none
    """Lanes: each epoch in the order of the text (none), or in one of its own of blocks of 16 seq_len, or of documents
    (lines where the tokenizer is word, whose end token ends each line)."""
    seq_len_jitter: bool = False
    """Lanes: draw the length of each batch around seq_len and scale its learning rate along (Merity et al. 2018)."""
    max_steps: int | None = None
    """Stop after this many optimizer steps (>= 1); null: no limit."""
    max_epochs: float | None = None
    """Stop after this many passes over train (> 0, fractions allowed); null: 3 if nothing else ends the run."""
    budget: str | None = None
    """Wall-clock time of the whole run, from its start in each command that trains it, e.g. 90s, 10m, 1h30m: the
    schedule is fitted to it, and a new run makes at least one step; null: no limit."""
    patience: int | None = None
    """Stop early after this many evaluations without a better validation loss (>= 1); null: never."""
    average: Average | None = None
    """Average of the weights that is evaluated and saved: ema, swa or nt_asgd; null: ema where ema_decay is given."""
    ema_decay: float | None = None
    """Decay per step of the exponential average of the weights (0 < d < 1); null: no such average."""
    swa_start: float = 0.75
    """average=swa: the mean of the weights after each step behind this share of the run (0 to below 1)."""
    asgd_patience: int = 5
    """average=nt_asgd: the mean from when a valid loss is above the lowest of those before the last so many (>= 1)."""
    nonfinite: NonFinite = NonFinite.stop
    """At a loss or gradient that is not finite: stop, skip the batch, or rollback to the last checkpoint without it."""
    max_skips: int = 10
    """With nonfinite=skip or rollback, stop when more batches than this were left out (>= 0)."""
    spike_nats: float | None = None
    """Treat a loss this far above the running mean (> 0, nats per token) like one that is not finite; null: never."""
    time_limit: str | None = None
    """Stop and save shortly before this wall-clock time of the command, e.g. 3d; null: before a SLURM job's end."""
    on_usr1: OnUsr1 = OnUsr1.stop
    """What the signal SIGUSR1 asks for: stop (save and exit with 75), or save and go on."""
    workers: int = 0
    """Threads that put batches together ahead of the training (>= 0); changes the speed only."""

    def __post_init__(self) -> None:
        micro = self.batch_size if self.micro_batch_size is None else self.micro_batch_size
        with Problems() as check:
            check.at_least(1, "train", self, "batch_size")
            check(
                micro >= 1 and self.batch_size % max(micro, 1) == 0,
                "train.micro_batch_size",
                micro,
                f"must divide train.batch_size={self.batch_size}",
            )
            check.at_least(1, "train", self, "seq_len")
            long_enough = self.seq_len >= 10 or not self.seq_len_jitter
            check(long_enough, "train.seq_len", self.seq_len, "must be >= 10 with train.seq_len_jitter=true")
            check.at_least(1, "train", self, "max_steps", or_null=True)
            check(
                self.max_epochs is None or 0 < self.max_epochs <= MOST_EPOCHS,
                "train.max_epochs",
                self.max_epochs,
                f"must be > 0 and at most {MOST_EPOCHS:g}, or null",
            )
            check.at_least(1, "train", self, "patience", or_null=True)
            check(
                self.ema_decay is None or 0 < self.ema_decay < 1,
                "train.ema_decay",
                self.ema_decay,
                "must be above 0 and below 1, or null",
            )
            ema = self.average is Average.ema
            check(
                self.average is None or ema == (self.ema_decay is not None),
                "train.average",
                self.average,
                "needs train.ema_decay" if ema else "excludes train.ema_decay",
            )
            check.below_one("train", self, "swa_start")
            check.at_least(1, "train", self, "asgd_patience")
            check(
                self.budget is None or parse_duration(self.budget) is not None,
                "train.budget",
                self.budget,
                "must be a duration such as 90s, 10m or 1h30m",
            )
            check(
                self.time_limit is None or parse_duration(self.time_limit) is not None,
                "train.time_limit",
                self.time_limit,
                "must be a duration such as 90m, 12h or 3d",
            )
            check(
                self.spike_nats is None or 0 < self.spike_nats < float("inf"),
                "train.spike_nats",
                self.spike_nats,
                "must be > 0 and finite, or null",
            )
            check.at_least(0, "train", self, "max_skips", "workers")

    def note_unused(self, check: Problems) -> None:
        """Note keys that would do nothing without another. Asked of what is to be trained now only, not of old runs."""
        for used, name, needed in (
            (self.average is Average.swa, "swa_start", "average=swa"),
            (self.average is Average.nt_asgd, "asgd_patience", "average=nt_asgd"),
            (self.nonfinite is not NonFinite.stop, "max_skips", "nonfinite=skip or rollback"),
        ):
            check.unused("train", self, () if used else (name,), f"needs train.{needed}: set it, or leave this out")

    @property
    def epochs_limit(self) -> float | None:
        """max_epochs, or the default where neither it nor max_steps nor budget is given."""
        unlimited = self.max_epochs is None and self.max_steps is None and self.budget is None
        return DEFAULT_MAX_EPOCHS if unlimited else self.max_epochs

    @property
    def budget_s(self) -> float | None:
        """The budget in seconds."""
        return None if self.budget is None else parse_duration(self.budget)

    @property
    def time_limit_s(self) -> float | None:
        """The time limit in seconds."""
        return None if self.time_limit is None else parse_duration(self.time_limit)


def check_length(seq_len: int, context: int | None) -> None:
    """Raise ConfigError if sequences are longer than what the model can read (None: any)."""
    if context is not None and seq_len > context:
        raise ConfigError(
            f"train.seq_len={seq_len} is longer than model.context={context}", f"set train.seq_len={context} or less"
        )


def parse_duration(text: str) -> float | None:
    """Seconds in a duration such as ``90s``, ``10m``, ``1h30m``, ``2d`` or a bare number of seconds, else None."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        text += "s"
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text)
    if not text or match is None:
        return None
    seconds = sum(float(part or 0) * unit for part, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True))
    return seconds if 0 < seconds < float("inf") else None


@dataclass(kw_only=True)
class LogConfig:
    """What is shown and recorded while training."""

    every_steps: int = 10
    """Write a line to metrics.jsonl and refresh the progress line every so many steps (>= 1)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.at_least(1, "log", self, "every_steps")


@dataclass(kw_only=True)
class EvalConfig:
    """Validation while training: always over the whole valid split."""

    every_steps: int | None = None
    """Evaluate every so many steps (>= 1); null: ten times over the run (with train.average=nt_asgd at least once an
    epoch), at least 20 steps apart, and at its end; with train.budget as often as it takes at most 3 % of it."""
    sample_tokens: int = 0
    """After each validation, draw a text of this many tokens for ``lmkit runs report`` (>= 0; 0: none)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.at_least(1, "eval", self, "every_steps", or_null=True)
            check.at_least(0, "eval", self, "sample_tokens")


OnSaveError = Enum("OnSaveError", ["continue", "stop"])
"""What to do when a checkpoint cannot be saved; by name, since ``continue`` is a keyword."""


@dataclass(kw_only=True)
class SaveConfig:
    """Checkpoints. The newest ones, the best one by validation loss and pinned ones (``lmkit runs pin``) are kept."""

    every_steps: int | None = None
    """Save every so many steps (>= 1), and at the end in any case; null: after each evaluation and every 10 minutes,
    but so seldom that saving takes at most 1 % of the time; one copy, of the best state or the newest, waits."""
    keep: int = 2
    """Keep this many of the newest checkpoints, beside the best one (>= 2)."""
    keep_every: int | None = None
    """Keep checkpoints whose step is a multiple of this (>= 1), make them if ``every_steps`` is null; null: none."""
    on_error: OnSaveError = OnSaveError["continue"]
    """A save that fails twice: continue (exit code 6 in the end if the last one failed), or stop at once."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.at_least(1, "save", self, "every_steps", or_null=True)
            check(self.keep >= 2, "save.keep", self.keep, "must be >= 2, so that one is whole whatever happens")
            check.at_least(1, "save", self, "keep_every", or_null=True)


@dataclass(kw_only=True)
class RunRootConfig:
    """What every command that has to do with runs needs to know."""

    root: str = "runs"
    """Folder in which runs are made and looked for."""


@dataclass(kw_only=True)
class NewRunConfig(RunRootConfig):
    """Where a run is made."""

    dir: str | None = None
    """Directory of the run to make; null: a new one in ``run.root``, named after the time, dataset and model."""
    lock: bool = True
    """Refuse to train where a file system has no locks; off: do it, and see to it that no second process does."""
    allow_data_change: bool = False
    """With resume: go on though the data changed (not their tokens' vocabulary), in an order that begins anew."""


@dataclass(kw_only=True)
class ExistingRunConfig(RunRootConfig):
    """Which run is used. On the command line ``run=DIR`` is short for ``run.path=DIR``."""

    path: str | None = None
    """Existing run to use, or its name in ``run.root``; null: the newest finished run there."""
    checkpoint: str = "best"
    """Which checkpoint of the run to use: best, latest, or a name such as step-000000001000."""
    allow_nonfinite: bool = False
    """Use it even if it has weights that are NaN or infinite, to look at them. A run never goes on from such a one."""


@dataclass(kw_only=True)
class RunConfig(NewRunConfig, ExistingRunConfig):
    """Which run to start from, and where the new one is made."""
