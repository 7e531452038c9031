"""A validation in the middle of a run: one process judges the weights to use, for all, unless the run is to stop."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from typing import NamedTuple

from lmkit.config.training import NonFinite
from lmkit.errors import DivergedError
from lmkit.sharding import unsharded
from lmkit.signals import StopRequests
from lmkit.store.runs import Run
from lmkit.tasks import Validation
from lmkit.train import Trainer


class Interrupted(Exception):
    """A validation was broken off because the run is to stop."""


class Judgement(NamedTuple):
    """What a validation found, and how long it took."""

    validation: Validation
    sample: str | None
    """What the model wrote, where that was asked for."""
    took_s: float


@contextlib.contextmanager
def judged(trainer: Trainer) -> Iterator[None]:
    """Context in which the model has the weights to use, averaged if there is an average, and all of them, so that the
    first process can run it alone; entered in all processes at once."""
    average = contextlib.nullcontext() if trainer.average is None else trainer.average.applied(trainer.model)
    with average, unsharded(trainer.model):
        yield


def judge(trainer: Trainer, stop: StopRequests, run: Run, *, sample_tokens: int) -> Judgement:
    """Validate the model as it is now, and let it write ``sample_tokens``; called in all processes at once. The others
    get to know the loss and the time.

    Raises Interrupted if the run is to stop, and DivergedError, which is noted in the journal, for a loss that is not
    finite.
    """
    alone: list[tuple[Validation, str | None]] = []
    start = time.monotonic()

    def judge_alone() -> str:
        with contextlib.suppress(Interrupted):
            alone.append(_judge_alone(trainer, stop, run, sample_tokens))
        return json.dumps([alone[0][0].loss, time.monotonic() - start] if alone else None)

    with judged(trainer):
        told = json.loads(trainer.world.tell(judge_alone))
    if told is None:
        raise Interrupted
    loss, took_s = told
    validation, sample = alone[0] if alone else (Validation(loss, {}, "", {}), None)
    return Judgement(validation, sample, took_s)


def _judge_alone(trainer: Trainer, stop: StopRequests, run: Run, sample_tokens: int) -> tuple[Validation, str | None]:
    """The validation, and what the model writes where that is asked for."""

    def break_off(_num_tokens: int) -> None:
        if stop.deferring and stop.requested is not None:
            raise Interrupted

    task, device, step = trainer.task, trainer.device, trainer.state.step
    try:
        found = task.validate(device=device, micro_batch_size=trainer.micro_batch_size, progress=break_off)
        if not math.isfinite(found.loss):
            raise DivergedError(
                f"the validation loss after step {step} is {found.loss}; no checkpoint was touched",
                "lower optimizer.lr, or clip with optimizer.clip_norm",
            )
    except DivergedError:
        run.journal("nonfinite", {"step": step, "policy": NonFinite.stop.name})
        raise
    return found, task.sample(sample_tokens, device=device) if sample_tokens else None
