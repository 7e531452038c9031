"""Configuration of what finetuning teaches: the ``task`` group."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from lmkit.config.check import Problems
from lmkit.config.model import ModelConfig


@dataclass(kw_only=True)
class TaskConfig:
    """Base of the ``task`` group."""


@dataclass(kw_only=True)
class LmTaskConfig(TaskConfig):
    """More text: predict each token of ``dataset`` from those before it."""

    replay: float = 0.0
    """Share of each batch's sequences that come from the corpus the run was trained on (0 to below 1); 0: none."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.below_one("task", self, "replay")


class Pooling(Enum):
    """How the hidden vectors of a text become one."""

    last = "last"
    mean = "mean"


class Truncation(Enum):
    """What to do with a text of more than ``max_tokens`` tokens."""

    keep_start = "keep_start"
    keep_end = "keep_end"
    refuse = "refuse"


class ClassifyMetric(Enum):
    """What makes one classifier better than another: the higher, the better."""

    accuracy = "accuracy"
    macro_f1 = "macro_f1"


class RegressMetric(Enum):
    """What makes one regression better than another, in the target's own units: the lower, the better."""

    mse = "mse"
    mae = "mae"


@dataclass(kw_only=True)
class RowsTaskConfig(TaskConfig):
    """Base of the tasks whose examples are rows of named columns."""

    data: str = "???"
    """Rows to learn from: a .jsonl, .json, .csv or .tsv file, or hub:NAME (split train)."""
    valid: str | None = None
    """Rows to judge on: a file, or hub:NAME (split validation); null: ``valid_fraction`` of the data."""
    valid_fraction: float = 0.1
    """Share of the rows, drawn by the seed, that are held out where ``valid`` is null (above 0 to 0.5)."""
    text: str | None = "text"
    """Column of the text; null (regress only): there is none."""
    pair: str | None = None
    """Column of a second text that is read after the first; null: none."""
    max_tokens: int | None = None
    """Longest text, with its end tokens (>= 4); null: the model's context, or 512 where it has none."""
    truncation: Truncation = Truncation.keep_start
    """Longer texts: keep_start, keep_end, or refuse them. Of a pair the longer text is cut first."""
    pooling: Pooling = Pooling.last
    """Vector of a text: the hidden vector of its last token, or the mean over its tokens."""
    dropout: float = 0.1
    """Dropout on the vector of the text (0 <= p < 1)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            held_out = self.valid_fraction
            check(0 < held_out <= 0.5, "task.valid_fraction", held_out, "must be above 0 and at most 0.5")
            check(self.pair is None or self.text is not None, "task.pair", self.pair, "needs task.text")
            check(self.max_tokens is None or self.max_tokens >= 4, "task.max_tokens", self.max_tokens, "must be >= 4")
            check.below_one("task", self, "dropout")
            self._check(check)

    def _check(self, check: Problems) -> None:
        """Checks of the subclass, reported together with those of the base."""


@dataclass(kw_only=True)
class ClassifyTaskConfig(RowsTaskConfig):
    """A text, or a pair of texts, to one of the labels that stand in the data."""

    label: str = "label"
    """Column of the label."""
    class_weights: str = "none"
    """Weight of each label in the loss: none, balanced, or numbers > 0 (1,2.5) in the order of the labels, which are
    sorted as text: 10 before 2."""
    metric: ClassifyMetric = ClassifyMetric.accuracy
    """What best checkpoint and train.patience go by: accuracy or macro_f1; the valid loss is 1 - metric."""

    def _check(self, check: Problems) -> None:
        check(self.text is not None, "task.text", self.text, "must be the column of the text")
        good = self.class_weights in ("none", "balanced") or self.weight_list is not None
        check(good, "task.class_weights", self.class_weights, "must be none, balanced, or numbers > 0 as in 1,2.5")

    @property
    def weight_list(self) -> list[float] | None:
        """The numbers, where class_weights are numbers."""
        try:
            weights = [float(part) for part in self.class_weights.split(",")]
        except ValueError:
            return None
        return weights if all(0 < weight < float("inf") for weight in weights) else None


class NetworkActivation(Enum):
    """Non-linearities of the hidden layer."""

    sigmoid = "sigmoid"
    relu = "relu"
    tanh = "tanh"


class NetworkInit(Enum):
    """What the weights of a network start from: normal with a standard deviation that depends on the fan-in."""

    xavier = "xavier"
    kaiming = "kaiming"
    normal = "normal"


@dataclass(kw_only=True)
class NetworkConfig(ModelConfig):
    """Network with one hidden layer, from numbers to a number."""

    d_hidden: int = 64
    """Width of the hidden layer (>= 1)."""
    activation: NetworkActivation = NetworkActivation.relu
    """Non-linearity: sigmoid, relu or tanh."""
    init: NetworkInit = NetworkInit.xavier
    """Variance of the initial weights: xavier (2 / (fan-in + fan-out)), kaiming (2 / fan-in) or normal (0.0001)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.at_least(1, "task.network", self, "d_hidden")


@dataclass(kw_only=True)
class RegressTaskConfig(RowsTaskConfig):
    """A text, numbers or both to a number, by mean squared error."""

    target: str = "target"
    """Column of the number to predict."""
    text: str | None = None
    """Column of a text; null: none, and then no run is needed to start from."""
    numeric: list[str] = field(default_factory=list)
    """Columns of numbers, which are standardised by mean and standard deviation of the training rows."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """Network that reads the numbers and the vector of the text."""
    metric: RegressMetric = RegressMetric.mse
    """What best checkpoint and train.patience go by, in the target's units: mse or mae."""

    def _check(self, check: Problems) -> None:
        inputs = bool(self.numeric) or self.text is not None
        check(inputs, "task.numeric", self.numeric, "needs columns, or task.text")
        check(len(set(self.numeric)) == len(self.numeric), "task.numeric", self.numeric, "names a column twice")
        named = [*self.numeric, *(name for name in (self.text, self.pair) if name is not None)]
        check(self.target not in named, "task.target", self.target, "is also a column to predict from")
