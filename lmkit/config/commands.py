"""Configuration of the subcommands that prepare, train and evaluate: one root dataclass for each."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from lmkit.config.adapter import AdapterConfig, TuneConfig
from lmkit.config.check import Problems
from lmkit.config.data import DatasetConfig, TokenizerConfig
from lmkit.config.evaluation import CacheConfig, DynamicConfig, ProtocolConfig
from lmkit.config.loggers import LoggerConfig
from lmkit.config.machine import DeviceConfig
from lmkit.config.model import ModelConfig
from lmkit.config.objectives import ObjectiveConfig
from lmkit.config.optimization import OptimizerConfig, ScheduleConfig
from lmkit.config.parallel import ParallelConfig
from lmkit.config.softmax import SoftmaxConfig
from lmkit.config.start import InitConfig, StartConfig
from lmkit.config.tasks import ClassifyTaskConfig, LmTaskConfig, RegressTaskConfig, TaskConfig
from lmkit.config.training import (
    EvalConfig,
    ExistingRunConfig,
    LogConfig,
    NewRunConfig,
    RunConfig,
    SaveConfig,
    TrainConfig,
)


@dataclass(kw_only=True)
class PrepareConfig:
    """lmkit prepare: read, clean and tokenize a corpus once, into the cache."""

    dataset: DatasetConfig
    """Corpus."""
    tokenizer: TokenizerConfig
    """Tokenizer."""
    force: bool = False
    """Prepare again even if the result is in the cache."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(kw_only=True)
class PretrainConfig:
    """lmkit pretrain: train a model from scratch; prepares what is missing."""

    dataset: DatasetConfig
    """Corpus."""
    tokenizer: TokenizerConfig
    """Tokenizer."""
    model: ModelConfig
    """Model."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is learnt."""
    optimizer: OptimizerConfig
    """Optimizer."""
    schedule: ScheduleConfig
    """Learning-rate schedule."""
    init: InitConfig = field(default_factory=InitConfig)
    """What the parameters start from."""
    softmax: SoftmaxConfig = field(default_factory=SoftmaxConfig)
    """Loss over the vocabulary."""
    device: DeviceConfig = field(default_factory=DeviceConfig)
    """Device."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Processes that train together."""
    train: TrainConfig
    """Training loop."""
    log: LogConfig = field(default_factory=LogConfig)
    """Logging."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """Where metrics go besides the run's metrics.jsonl."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Validation."""
    save: SaveConfig = field(default_factory=SaveConfig)
    """Checkpoints."""
    run: NewRunConfig = field(default_factory=NewRunConfig)
    """Run directory."""
    resume: bool = False
    """Continue the run in run.dir, or start it when there is nothing yet."""
    plan: bool = False
    """Only say what the run would take: parameters, memory, disk, time, and the largest micro-batch that fits."""
    seed: int = 1
    """Seed of initialisation, order and dropout (>= 0)."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        with Problems() as check:
            _check_run(check, self)
            check(
                self.objective.name == self.model.objective,
                "objective",
                self.objective.name,
                f"does not train this model, which needs objective={self.model.objective}",
            )


@dataclass(kw_only=True)
class FinetuneConfig:
    """lmkit finetune: teach a run more text or a task, as a new run with its tokenizer."""

    task: TaskConfig = field(default_factory=TaskConfig)
    """What is learnt."""
    predict: str | None = None
    """Rows to predict for, after training; without task=, nothing is trained and run=DIR, a classifier, predicts."""
    output: str | None = None
    """Where the predictions go (.jsonl); null: beside the file of ``predict``, as NAME.predictions.jsonl."""
    adapter: AdapterConfig | None = None
    """Low-rank adapters to train instead of the model's weights; null: none."""
    tune: TuneConfig = field(default_factory=TuneConfig)
    """Which parameters are trained, when, and how fast."""
    dataset: DatasetConfig
    """Corpus of task=lm."""
    optimizer: OptimizerConfig
    """Optimizer."""
    schedule: ScheduleConfig
    """Learning-rate schedule."""
    softmax: SoftmaxConfig = field(default_factory=SoftmaxConfig)
    """Loss over the vocabulary."""
    device: DeviceConfig = field(default_factory=DeviceConfig)
    """Device."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Processes that train together."""
    train: TrainConfig
    """Training loop."""
    log: LogConfig = field(default_factory=LogConfig)
    """Logging."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """Where metrics go besides the run's metrics.jsonl."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Validation."""
    save: SaveConfig = field(default_factory=SaveConfig)
    """Checkpoints."""
    init: StartConfig = field(default_factory=StartConfig)
    """init=hf:NAME_OR_DIR: the model to start from, instead of a run."""
    run: RunConfig = field(default_factory=RunConfig)
    """run=DIR: the run to start from; run.dir=DIR: the run to make."""
    resume: bool = False
    """Continue the run in run.dir, or start it when there is nothing yet."""
    seed: int = 1
    """Seed of order and dropout (>= 0)."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        if type(self.task) is TaskConfig:  # a default of a subclass would not let Hydra choose another one
            self.task = LmTaskConfig()
        with Problems() as check:
            _check_run(check, self)
            check(
                self.init.weights is None or self.run.path is None,
                "init.weights",
                self.init.weights,
                "and run= both say what to start from: leave one out",
            )
            check(
                self.predict is None or isinstance(self.task, LmTaskConfig | ClassifyTaskConfig | RegressTaskConfig),
                "predict",
                self.predict,
                "needs task=classify or task=regress, or no task and run=DIR of such a run",
            )
            check(self.output is None or self.predict is not None, "output", self.output, "needs predict=FILE")
            if self.predict is not None and isinstance(self.task, LmTaskConfig):
                self._check_only_predicts(check)

    def _check_only_predicts(self, check: Problems) -> None:
        """Note what would train something, or name another model, where predict=FILE alone does neither."""
        rule = "has no use with predict=FILE and no task, which trains nothing: set task=, or leave it out"
        for key, value in (("init.weights", self.init.weights), ("run.dir", self.run.dir)):
            check(value is None, key, value, rule)
        check(self.adapter is None, "adapter", "NAME", rule)
        check(not self.resume, "resume", self.resume, rule)
        check.unused("tune", self.tune, [field.name for field in fields(TuneConfig)], rule)


def _check_run(check: Problems, cfg: PretrainConfig | FinetuneConfig) -> None:
    """Note what is wrong with the seed of a run, or with how it is to go on."""
    check.at_least(0, "", cfg, "seed")
    check(not cfg.resume or cfg.run.dir is not None, "resume", cfg.resume, "needs run.dir=DIR, the run to continue")
    new_data = cfg.run.allow_data_change
    check(cfg.resume or not new_data, "run.allow_data_change", new_data, "needs resume=true")


@dataclass(kw_only=True)
class EvalPplConfig:
    """lmkit eval-ppl: perplexity of a run over every token of a split, with counts and protocol."""

    run: ExistingRunConfig = field(default_factory=ExistingRunConfig)
    """Run to evaluate."""
    adapter: str | None = None
    """Folder of an adapter that was finetuned from the run, as in RUN/adapter; null: none."""
    dataset: DatasetConfig | None = None
    """Corpus to evaluate on; null: the corpus the run was trained on."""
    split: str = "test"
    """Split to score: train, valid or test."""
    protocol: ProtocolConfig | None = None
    """How the text is read and counted; null: mikolov for word-level sets, sentence for VAE and GAN, else stream."""
    context: int | None = None
    """Tokens per window of a Transformer, so that it sees at most so many before each (>= 1); null: as in training."""
    stride: int | None = None
    """Tokens scored per window (1 to context): smaller gives each token more context; null: half the context."""
    seq_len: int = 1024
    """Tokens per forward pass of a model with carried state (>= 1); changes the speed, not the number."""
    batch_size: int = 16
    """Windows scored at once (>= 1); changes the speed, not the number."""
    temperature: str = "1"
    """Divide the logits by this number (> 0); ``valid``: by the one from 0.6 to 1.7 that is best on valid."""
    mc_samples: int = 0
    """Average the probabilities of this many passes with dropout (>= 0; Gal & Ghahramani 2016: MC dropout); 0: none."""
    latent_samples: int = 50
    """Samples of the latent vector behind the bound of a sentence VAE (>= 1): more make it tighter and cost as much."""
    dynamic: DynamicConfig | None = None
    """Dynamic evaluation."""
    cache: CacheConfig | None = None
    """Cache model."""
    ensemble: list[str] = field(default_factory=list)
    """Further runs whose probabilities are averaged with this one's."""
    mix: list[str] = field(default_factory=list)
    """Models to interpolate with: ``kn5``, ``unigram`` or runs."""
    weights: str = "valid"
    """Mixture weights: ``valid`` finds the best on valid, ``equal``, or numbers, the run's own first."""
    compare: list[str] = field(default_factory=list)
    """Runs or files of per-word probabilities to compare with by a paired bootstrap; results in JSON by their ppl."""
    word_probs: str | None = None
    """Write the probability of each token to this file, one a line."""
    baselines: bool = True
    """Show what unigrams, kn5, xz and gzip make of the same text."""
    checks: bool = True
    """Prove the number: causality, sums, batch size, train and test overlap; about 1 % of the time."""
    bootstrap: int = 1000
    """Resamples behind confidence intervals (>= 0; 0: none)."""
    report: str | None = None
    """Write a page with charts and the text coloured by surprisal to this HTML file."""
    report_tokens: int = 4000
    """Tokens of the text that the page shows (>= 0)."""
    device: DeviceConfig = field(default_factory=DeviceConfig)
    """Device."""
    output: str | None = None
    """Write the numbers to this JSON file."""
    seed: int = 1
    """Seed of resampling and of MC dropout (>= 0)."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check(self.split in ("train", "valid", "test"), "split", self.split, "must be train, valid or test")
            check.at_least(1, "", self, "context", "stride", or_null=True)
            check.at_least(1, "", self, "seq_len", "batch_size", "latent_samples")
            check.at_least(0, "", self, "mc_samples", "bootstrap", "report_tokens", "seed")
            named: dict[str, str] = {}
            for key, file in (("output", self.output), ("report", self.report), ("word_probs", self.word_probs)):
                first = key if file is None else named.setdefault(file, key)
                check(first == key, key, file, f"is the file of {first}, too: name another")
            shown = self.report is not None or self.report_tokens == EvalPplConfig.report_tokens
            check(shown, "report_tokens", self.report_tokens, "needs report=FILE")
            check(
                self.temperature == "valid" or _positive(self.temperature),
                "temperature",
                self.temperature,
                "must be a number > 0, or valid",
            )
            texts = self.weights.split(",")
            check(
                self.weights in ("valid", "equal")
                or (all(map(_fraction, texts)) and abs(sum(map(float, texts)) - 1) < 1e-6),
                "weights",
                self.weights,
                "must be valid, equal, or numbers that sum to 1, as in 0.9,0.1",
            )
            check(
                not (self.mc_samples and self.dynamic),
                "mc_samples",
                self.mc_samples,
                "cannot be combined with dynamic evaluation",
            )


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def _fraction(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False
