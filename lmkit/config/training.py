"""Configuration of optimizers, learning-rate schedules, devices and the training loop."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from lmkit.config.check import Problems


@dataclass(kw_only=True)
class OptimizerConfig:
    """Base of the ``optimizer`` group."""

    lr: float = 1e-3
    """Peak learning rate (> 0); the schedule multiplies it by a factor from 0 to 1."""
    weight_decay: float = 0.0
    """Weight decay (>= 0) on matrices only: decoupled for adamw and muon, an L2 term for the others."""
    clip_norm: float | None = 1.0
    """Clip the global gradient norm to this (> 0); null: no clipping."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check(0 < self.lr < float("inf"), "optimizer.lr", self.lr, "must be > 0 and finite")
            check(0 <= self.weight_decay < float("inf"), "optimizer.weight_decay", self.weight_decay, "must be >= 0")
            check(
                self.clip_norm is None or self.clip_norm > 0,
                "optimizer.clip_norm",
                self.clip_norm,
                "must be > 0 or null",
            )
            self._check(check)

    def _check(self, check: Problems) -> None:
        """Checks of the subclass, reported together with those of the base."""


@dataclass(kw_only=True)
class SgdConfig(OptimizerConfig):
    """Stochastic gradient descent, with momentum and Nesterov's variant."""

    lr: float = 1.0
    """Peak learning rate (> 0)."""
    momentum: float = 0.0
    """Momentum (0 <= m < 1)."""
    nesterov: bool = False
    """Nesterov momentum; needs momentum > 0."""

    def _check(self, check: Problems) -> None:
        check(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "must be at least 0 and below 1")
        check(
            not self.nesterov or self.momentum > 0, "optimizer.nesterov", self.nesterov, "needs optimizer.momentum > 0"
        )


@dataclass(kw_only=True)
class AdagradConfig(OptimizerConfig):
    """Adagrad (Duchi et al. 2011)."""

    lr: float = 0.02
    """Peak learning rate (> 0)."""
    eps: float = 1e-10
    """Added to the denominator (> 0)."""

    def _check(self, check: Problems) -> None:
        check(self.eps > 0, "optimizer.eps", self.eps, "must be > 0")


@dataclass(kw_only=True)
class AdadeltaConfig(OptimizerConfig):
    """Adadelta (Zeiler 2012)."""

    lr: float = 1.0
    """Peak learning rate (> 0)."""
    rho: float = 0.95
    """Decay of the running averages (0 <= rho < 1)."""
    eps: float = 1e-6
    """Added under the square roots (> 0)."""

    def _check(self, check: Problems) -> None:
        check(0 <= self.rho < 1, "optimizer.rho", self.rho, "must be at least 0 and below 1")
        check(self.eps > 0, "optimizer.eps", self.eps, "must be > 0")


@dataclass(kw_only=True)
class RmspropConfig(OptimizerConfig):
    """RMSprop (Tieleman & Hinton 2012)."""

    lr: float = 1e-3
    """Peak learning rate (> 0)."""
    alpha: float = 0.99
    """Decay of the squared-gradient average (0 <= alpha < 1)."""
    momentum: float = 0.0
    """Momentum (0 <= m < 1)."""
    eps: float = 1e-8
    """Added to the denominator (> 0)."""

    def _check(self, check: Problems) -> None:
        check(0 <= self.alpha < 1, "optimizer.alpha", self.alpha, "must be at least 0 and below 1")
        check(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "must be at least 0 and below 1")
        check(self.eps > 0, "optimizer.eps", self.eps, "must be > 0")


@dataclass(kw_only=True)
class AdamConfig(OptimizerConfig):
    """Adam (Kingma & Ba 2015); weight decay is an L2 term."""

    beta1: float = 0.9
    """Decay of the gradient average (0 <= beta1 < 1)."""
    beta2: float = 0.999
    """Decay of the squared-gradient average (0 <= beta2 < 1)."""
    eps: float = 1e-8
    """Added to the denominator (> 0)."""

    def _check(self, check: Problems) -> None:
        check(0 <= self.beta1 < 1, "optimizer.beta1", self.beta1, "must be at least 0 and below 1")
        check(0 <= self.beta2 < 1, "optimizer.beta2", self.beta2, "must be at least 0 and below 1")
        check(self.eps > 0, "optimizer.eps", self.eps, "must be > 0")


@dataclass(kw_only=True)
class AdamwConfig(AdamConfig):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    lr: float = 2e-3
    """Peak learning rate (> 0)."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices (>= 0)."""
    beta2: float = 0.99
    """Decay of the squared-gradient average (0 <= beta2 < 1)."""


@dataclass(kw_only=True)
class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al. 2024) on the hidden matrices, AdamW on embeddings, the head, gains and biases."""

    lr: float = 0.02
    """Peak learning rate of the hidden matrices (> 0)."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices (>= 0)."""
    momentum: float = 0.95
    """Nesterov momentum of the hidden matrices (0 <= m < 1)."""
    ns_steps: int = 5
    """Newton-Schulz iterations (1 to 10), in fp32 on the CPU and bf16 on CUDA."""
    adam_lr: float = 2e-3
    """Peak learning rate of everything else (> 0)."""
    beta1: float = 0.9
    """AdamW's decay of the gradient average (0 <= beta1 < 1)."""
    beta2: float = 0.99
    """AdamW's decay of the squared-gradient average (0 <= beta2 < 1)."""
    eps: float = 1e-8
    """AdamW's addition to the denominator (> 0)."""

    def _check(self, check: Problems) -> None:
        check(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "must be at least 0 and below 1")
        check(1 <= self.ns_steps <= 10, "optimizer.ns_steps", self.ns_steps, "must be between 1 and 10")
        check(0 < self.adam_lr < float("inf"), "optimizer.adam_lr", self.adam_lr, "must be > 0 and finite")
        check(0 <= self.beta1 < 1, "optimizer.beta1", self.beta1, "must be at least 0 and below 1")
        check(0 <= self.beta2 < 1, "optimizer.beta2", self.beta2, "must be at least 0 and below 1")
        check(self.eps > 0, "optimizer.eps", self.eps, "must be > 0")


@dataclass(kw_only=True)
class ScheduleConfig:
    """Base of the ``schedule`` group. A schedule is a pure function of the step and of the run's progress (0 to 1)."""

    warmup_steps: int | None = None
    """Linear warm-up over this many steps (>= 0); null: ``warmup_ratio`` of the run."""
    warmup_ratio: float = 0.02
    """Linear warm-up over this share of the run, where warmup_steps is null (0 to 1)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check(
                self.warmup_steps is None or self.warmup_steps >= 0,
                "schedule.warmup_steps",
                self.warmup_steps,
                "must be >= 0 or null",
            )
            check(0 <= self.warmup_ratio <= 1, "schedule.warmup_ratio", self.warmup_ratio, "must be between 0 and 1")
            self._check(check)

    def _check(self, check: Problems) -> None:
        """Checks of the subclass, reported together with those of the base."""


@dataclass(kw_only=True)
class ConstantConfig(ScheduleConfig):
    """Constant after warm-up."""


@dataclass(kw_only=True)
class _DecayingConfig(ScheduleConfig):
    final_ratio: float = 0.0
    """Learning rate at the end, as a share of the peak (0 to 1)."""

    def _check(self, check: Problems) -> None:
        check(0 <= self.final_ratio <= 1, "schedule.final_ratio", self.final_ratio, "must be between 0 and 1")


@dataclass(kw_only=True)
class CosineConfig(_DecayingConfig):
    """Half a cosine from the peak to the final ratio (Loshchilov & Hutter 2017)."""


@dataclass(kw_only=True)
class LinearConfig(_DecayingConfig):
    """A straight line from the peak to the final ratio."""


@dataclass(kw_only=True)
class WsdConfig(_DecayingConfig):
    """Warm-up, stable, decay (Hu et al. 2024): constant, then a straight line to the final ratio."""

    decay_ratio: float = 0.4
    """Share of the run spent decaying (0 < r <= 1)."""

    def _check(self, check: Problems) -> None:
        super()._check(check)
        check(0 < self.decay_ratio <= 1, "schedule.decay_ratio", self.decay_ratio, "must be above 0 and at most 1")


@dataclass(kw_only=True)
class InverseSqrtConfig(ScheduleConfig):
    """Falls with the inverse square root of the step after warm-up (Vaswani et al. 2017, section 5.3)."""


@dataclass(kw_only=True)
class PlateauConfig(ScheduleConfig):
    """Multiplies the rate by ``factor`` when the validation loss has not improved for ``patience`` evaluations."""

    factor: float = 0.5
    """Multiplier at a plateau (0 < f < 1)."""
    patience: int = 1
    """Evaluations without improvement that are tolerated before the rate falls (>= 0)."""
    min_ratio: float = 0.001
    """The rate never falls below this share of the peak (0 to 1)."""

    def _check(self, check: Problems) -> None:
        check(0 < self.factor < 1, "schedule.factor", self.factor, "must be between 0 and 1")
        check(self.patience >= 0, "schedule.patience", self.patience, "must be >= 0")
        check(0 <= self.min_ratio <= 1, "schedule.min_ratio", self.min_ratio, "must be between 0 and 1")


@dataclass(kw_only=True)
class SoftmaxConfig:
    """The loss in training: cross-entropy over the whole vocabulary. Also the base of the ``softmax`` group.

    Evaluation always uses the exact softmax.
    """


@dataclass(kw_only=True)
class SampledSoftmaxConfig(SoftmaxConfig):
    """Cross-entropy over a sample of the vocabulary: much cheaper for large vocabularies and small models."""

    num_frequent: int = 500
    """This many of the most frequent tokens are always in the sample (>= 0)."""
    num_sampled: int = 300
    """Expected number of rarer tokens that are drawn for each batch (>= 1); the batch's targets come on top."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check(self.num_frequent >= 0, "softmax.num_frequent", self.num_frequent, "must be >= 0")
            check(self.num_sampled >= 1, "softmax.num_sampled", self.num_sampled, "must be >= 1")


class EmbeddingInit(Enum):
    """Where embeddings start."""

    random = "random"
    cooccurrence = "cooccurrence"


class BiasInit(Enum):
    """Where the biases of the output layer start."""

    zero = "zero"
    log_frequency = "log_frequency"


@dataclass(kw_only=True)
class InitConfig:
    """What of the training text goes into the initial parameters, before the first step."""

    embeddings: EmbeddingInit = EmbeddingInit.random
    """random, or cooccurrence: a singular value decomposition of the counts of neighbouring tokens."""
    output_bias: BiasInit = BiasInit.log_frequency
    """zero, or log_frequency: the log of each token's share of train, where the model has output biases."""


class DeviceType(Enum):
    """Where tensors live."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Precision(Enum):
    """Number format of the matrix products; parameters and optimizer state stay in fp32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Switch(Enum):
    """on, off, or let lmkit decide and say what it decided."""

    auto = "auto"
    on = "on"
    off = "off"


@dataclass(kw_only=True)
class DeviceConfig:
    """Where and how to compute. ``auto`` picks what is fast there and the run says what was picked."""

    type: DeviceType = DeviceType.auto
    """Device: auto (cuda, then mps, then cpu), cpu, cuda or mps."""
    index: int | None = None
    """Number of the CUDA device; null: the current one."""
    precision: Precision = Precision.auto
    """auto: bf16 on CUDA cards that have it in hardware, fp32 elsewhere (never bf16 on a CPU)."""
    compile: Switch = Switch.auto
    """torch.compile; auto: on for CUDA, off elsewhere."""
    fused: Switch = Switch.auto
    """Fused optimizer kernels; auto: wherever torch has them."""
    threads: int | None = None
    """CPU threads (>= 1); null: one per physical core that this process may use."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check(self.threads is None or self.threads >= 1, "device.threads", self.threads, "must be >= 1 or null")
            check(self.index is None or self.index >= 0, "device.index", self.index, "must be >= 0 or null")


class Order(Enum):
    """How the stream of training tokens is cut into batches."""

    auto = "auto"
    lanes = "lanes"
    windows = "windows"


class NonFinite(Enum):
    """What to do when the loss or the gradient of a batch is not finite; in all cases that update is not made."""

    stop = "stop"
    skip = "skip"
    rollback = "rollback"


class OnUsr1(Enum):
    """What SIGUSR1 asks for."""

    stop = "stop"
    save = "save"


DEFAULT_MAX_EPOCHS = 3.0


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
    """lanes: contiguous text with carried state; windows: random order; auto: lanes for recurrent models."""
    max_steps: int | None = None
    """Stop after this many optimizer steps (>= 1); null: no limit."""
    max_epochs: float | None = None
    """Stop after this many passes over train (> 0, fractions allowed); null: 3 if nothing else ends the run."""
    budget: str | None = None
    """Wall-clock time for the whole command, e.g. 90s, 10m, 1h30m: the schedule is fitted to it; null: no limit."""
    patience: int | None = None
    """Stop early after this many evaluations without a better validation loss (>= 1); null: never."""
    ema_decay: float | None = None
    """Decay per step of an exponential average of the weights (0 < d < 1) that is evaluated and saved; null: none."""
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
            check(self.batch_size >= 1, "train.batch_size", self.batch_size, "must be >= 1")
            check(
                micro >= 1 and self.batch_size % max(micro, 1) == 0,
                "train.micro_batch_size",
                micro,
                f"must divide train.batch_size={self.batch_size}",
            )
            check(self.seq_len >= 1, "train.seq_len", self.seq_len, "must be >= 1")
            check(
                self.max_steps is None or self.max_steps >= 1, "train.max_steps", self.max_steps, "must be >= 1 or null"
            )
            check(
                self.max_epochs is None or 0 < self.max_epochs < float("inf"),
                "train.max_epochs",
                self.max_epochs,
                "must be > 0 or null",
            )
            check(self.patience is None or self.patience >= 1, "train.patience", self.patience, "must be >= 1 or null")
            check(
                self.ema_decay is None or 0 < self.ema_decay < 1,
                "train.ema_decay",
                self.ema_decay,
                "must be between 0 and 1 or null",
            )
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
                "must be > 0 or null",
            )
            check(self.max_skips >= 0, "train.max_skips", self.max_skips, "must be >= 0")
            check(self.workers >= 0, "train.workers", self.workers, "must be >= 0")

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


def parse_duration(text: str) -> float | None:
    """Seconds in a duration such as ``90s``, ``10m``, ``1h30m``, ``2d`` or a bare number of seconds, else None."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        seconds = float(text)
        return seconds if seconds > 0 else None
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text)
    if not text or match is None:
        return None
    seconds = sum(float(part or 0) * unit for part, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True))
    return seconds if seconds > 0 else None


@dataclass(kw_only=True)
class LogConfig:
    """What is shown and recorded while training."""

    every_steps: int = 10
    """Write a line to metrics.jsonl and refresh the progress line every so many steps (>= 1)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check(self.every_steps >= 1, "log.every_steps", self.every_steps, "must be >= 1")


@dataclass(kw_only=True)
class EvalConfig:
    """Validation while training: always over the whole valid split."""

    every_steps: int | None = None
    """Evaluate every so many steps (>= 1); null: ten times over the run, at least 20 steps apart, and at its end."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check(
                self.every_steps is None or self.every_steps >= 1,
                "eval.every_steps",
                self.every_steps,
                "must be >= 1 or null",
            )


OnSaveError = Enum("OnSaveError", ["continue", "stop"])
"""What to do when a checkpoint cannot be saved; by name, since ``continue`` is a keyword."""


@dataclass(kw_only=True)
class SaveConfig:
    """Checkpoints. The newest ones, the best one by validation loss and pinned ones (``lmkit runs pin``) are kept."""

    every_steps: int | None = None
    """Save every so many steps (>= 1); null: after each evaluation, and at the end in any case."""
    keep: int = 2
    """Keep this many of the newest checkpoints, beside the best one (>= 1)."""
    keep_every: int | None = None
    """Also keep the checkpoints whose step is a multiple of this (>= 1); null: none."""
    on_error: OnSaveError = OnSaveError["continue"]
    """A save that fails twice: continue (exit code 6 in the end if the last one failed), or stop at once."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check(
                self.every_steps is None or self.every_steps >= 1,
                "save.every_steps",
                self.every_steps,
                "must be >= 1 or null",
            )
            check(self.keep >= 1, "save.keep", self.keep, "must be >= 1")
            check(
                self.keep_every is None or self.keep_every >= 1,
                "save.keep_every",
                self.keep_every,
                "must be >= 1 or null",
            )


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


@dataclass(kw_only=True)
class ExistingRunConfig(RunRootConfig):
    """Which run is used. On the command line ``run=DIR`` is short for ``run.path=DIR``."""

    path: str | None = None
    """Existing run to use; null: the newest finished run in ``run.root``."""
    checkpoint: str = "best"
    """Which checkpoint of the run to use: best, latest, or a name such as step-000000001000."""


@dataclass(kw_only=True)
class RunConfig(NewRunConfig, ExistingRunConfig):
    """Which run to start from, and where the new one is made."""
