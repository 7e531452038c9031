"""What a run learns and how it is judged: batches, their loss, a validation. The training loop knows nothing else."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lmkit.config.training import TrainConfig
from lmkit.data.batches import Batches
from lmkit.device import Device
from lmkit.models.base import State
from lmkit.tokenizers import Tokenizer


@dataclass(frozen=True)
class Validation:
    """What a validation found."""

    loss: float
    """What best checkpoint, early stopping and plateau schedule go by: the lower, the better."""
    metrics: dict[str, float]
    """Further numbers for metrics.jsonl, by name."""
    text: str
    """The numbers in one line for people."""
    result: dict[str, Any]
    """What goes into result.json when this was the last validation."""
    rows: list[tuple[str, str]] = field(default_factory=list)
    """What goes into the table that is shown at the end: (name, value)."""


class Task(ABC):
    """What a run learns. A task is built for one model and one data set, and holds no state of the training."""

    tokenizer: Tokenizer
    """Saved with every checkpoint; turns a batch's ids into text for people."""
    data_name: str
    """For people: what it is trained on."""
    data_digest: str
    """Changes with the training data or the way they are cut into examples."""
    batches: Batches
    carries_state = False
    """Whether the model's state is carried from batch to batch."""
    shapes_vary = False
    """Whether batches are of many shapes, each as long as its longest row, for models with attention."""
    unit = "token"
    """What is counted as a target."""
    num_targets: int
    """Targets per epoch."""
    pace_changes_at: tuple[float, ...] = ()
    """Shares of the run (0 to 1) from which on a step does other work than before, and so takes another time."""

    def begin(self) -> None:
        """Set the model's initial parameters from the data; called once, before the first step of a new run."""
        return

    @abstractmethod
    def loss(self, forward: nn.Module, batch: Any, state: State | None, progress: float) -> tuple[Tensor, State | None]:
        """Summed loss (scalar, differentiable) of a micro-batch, and the model's state after it.

        ``forward`` is the task's model, compiled where that was asked for. Random numbers come from torch's global
        generator, which the loop keys by (seed, step, micro-batch). ``progress`` is the share of the run that is done.
        """

    def loss_scale(self, batch: Any, progress: float) -> float:
        """What the summed loss of each micro-batch is multiplied by, where it is no sum over the targets of ``batch``,
        by whose number the loop divides it."""
        return 1.0

    def lr_scale(self, batch: Any, progress: float) -> float:
        """What the learning rate of the update from this batch is multiplied by, beside the schedule's factor."""
        return 1.0

    def lr_factors(self) -> dict[str, float]:
        """What the peak learning rate of single parameters is multiplied by: name -> factor, where it is not 1."""
        return {}

    @abstractmethod
    def validate(self, *, device: Device, micro_batch_size: int, progress: Callable[[int], None]) -> Validation:
        """Judge the model on all validation data. What ``progress``, called now and then, raises passes on."""

    def validation_s(self, *, device: Device, micro_batch_size: int) -> float:
        """Seconds that a validation will take."""
        start = time.monotonic()
        self.validate(device=device, micro_batch_size=micro_batch_size, progress=lambda _: None)
        return time.monotonic() - start

    def sample(self, num_tokens: int, *, device: Device) -> str | None:
        """A text that the model makes up as it is now; None: the task makes none."""
        return None

    def state_from_tensors(self, tensors: dict[str, Tensor]) -> State:
        """The inverse of State.tensors, for tasks that carry state."""
        raise TypeError(f"{type(self).__name__} carries no state from step to step")

    def shown(self, loss: float) -> tuple[str, str]:
        """Name and value of a loss in the progress line."""
        return "loss", f"{loss:.4f}"

    def shown_valid(self, loss: float) -> tuple[str, str]:
        """Name and value of a validation's loss in the progress line."""
        name, value = self.shown(loss)
        return f"valid {name}", value

    def fitted(self) -> dict[str, Any]:
        """What was learnt from the data beside parameters (labels, means), as JSON data; stored with the run."""
        return {}

    def length_limit(self, train: TrainConfig) -> tuple[str, str] | None:
        """The key that limits how many tokens a sequence has, and what to tell of it; None: there are no tokens."""
        return "train.seq_len", f"train.seq_len={train.seq_len}"

    def advice(self, run: str) -> str:
        """Commands to go on with, for people. ``run``: its path as a shell takes it."""
        return f"lmkit eval-ppl run={run}   lmkit generate run={run} --prompt TEXT"

    def row_losses(self, forward: nn.Module, batch: Any, state: State | None) -> list[float] | None:
        """Summed loss of each row of a micro-batch under the exact softmax, for ``runs replay``; None: not told."""
        return None
