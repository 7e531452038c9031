"""What a training will take, before it runs: memory, time, disk; ``pretrain plan=true``.

Where a part of the run does other work than the one before (softmax.exact_from, the adversarial part of objective=gan),
each is counted and timed: the memory is that of the part that takes the most, the time that of all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from lmkit.config.training import EvalConfig, SaveConfig, TrainConfig
from lmkit.console import format_count, format_duration, plural
from lmkit.horizon import EVAL_SHARE, NUM_EVALS, Budget, Horizon, last_step, steps_between_evals
from lmkit.memory import Memory, checkpoint_bytes, estimate_memory, largest_fitting, room_bytes
from lmkit.train import Trainer

ROOM_SHARE = 0.9
"""Part of the free memory that a plan fills."""
MOST_STEPS, MOST_S = 5, 20.0
"""Steps that are timed, after one to warm up; fewer if they take long."""


@dataclass(frozen=True)
class Plan:
    """What a training will take."""

    num_parameters: int
    memory: Memory
    """Of the part of the run that takes the most."""
    peak_from: float
    """The share of the run (0 to 1) that is done when that part begins."""
    micro_batch_size: int
    room_bytes: int
    """What the device has for this process."""
    largest_fitting: int
    """Largest micro-batch that fits (0: not even one row)."""
    length_key: str
    """What limits the length of a row, and so the memory that it takes."""
    tokens_per_epoch: int
    unit: str
    steps: int | None
    """None: only the clock ends the run, and no step was timed."""
    steps_per_epoch: int
    checkpoint_bytes: int
    num_checkpoints: int
    paces: list[tuple[float, float]]
    """Share of the run from which on a step takes so many seconds (median of the timed ones); empty: not timed since it
    would not fit."""
    step_s: float | None
    """Seconds of a step, on the average of the run; None: not timed."""
    validation_s: float | None
    num_validations: int

    @property
    def fits(self) -> bool:
        """Whether a step with the configured micro-batch size fits into ROOM_SHARE of the room."""
        return self.micro_batch_size <= self.largest_fitting

    @property
    def total_s(self) -> float | None:
        """Training and validation; None if not known."""
        if self.step_s is None or self.steps is None:
            return None
        return self.steps * self.step_s + self.num_validations * (self.validation_s or 0.0)

    def rows(self) -> Iterator[tuple[str, str]]:
        """Name and value of everything, for people."""
        memory, rows = self.memory, plural(self.micro_batch_size, "row")
        yield "parameters", format_count(self.num_parameters)
        peak = f"{_bytes(memory.peak(self.micro_batch_size))} of {_bytes(self.room_bytes)}"
        yield "memory at the peak of a step", peak + (f", {_from(self.peak_from)}" if self.peak_from else "")
        yield "  weights", _bytes(memory.weights + memory.average)
        yield "  gradients", _bytes(memory.gradients)
        yield "  optimizer", _bytes(memory.optimizer)
        yield f"  activations of {rows}", _bytes(memory.activations(self.micro_batch_size))
        yield "  backward pass", _bytes(memory.working(self.micro_batch_size))
        if memory.process:
            yield "  the process itself", _bytes(memory.process)
        if memory.copy:
            yield "  the copy for a save", _bytes(memory.copy)
        yield "fits", self._fits_text()
        yield f"{self.unit}s an epoch", format_count(self.tokens_per_epoch)
        yield "steps an epoch", format_count(self.steps_per_epoch)
        if self.steps is not None:
            epochs = self.steps / self.steps_per_epoch
            yield "steps", f"{format_count(self.steps)}, {epochs:.2f} epochs"
        yield (
            "disk",
            (
                f"{_bytes(self.checkpoint_bytes * self.num_checkpoints)}: {self.num_checkpoints} checkpoints of "
                f"{_bytes(self.checkpoint_bytes)}"
            ),
        )
        for share, seconds in self.paces:
            yield f"a step {_from(share)}" if share else "a step", format_duration(seconds)
        if self.validation_s is not None:
            yield "a validation", f"{format_duration(self.validation_s)}, {self.num_validations} of them"
        if self.total_s is not None:
            yield "time", format_duration(self.total_s)

    def _fits_text(self) -> str:
        if self.fits:
            return f"yes; train.micro_batch_size up to {self.largest_fitting} would"
        if self.largest_fitting == 0:
            return f"no, not even one row: use a smaller model or {self.length_key}, or another device"
        return f"no: train.micro_batch_size={self.largest_fitting} would, with the same updates"


def plan(
    trainer: Trainer,
    train: TrainConfig,
    evaluation: EvalConfig,
    save: SaveConfig,
    *,
    num_processes: int = 1,
) -> Plan:
    """What the run of a trainer that has done no step will take. It is of no further use: its weights change here.

    num_processes: so many share the micro-batches of a step, each with the whole model; the memory is that of one of
    them, and the time is without the sums of the gradients.

    Nothing larger than two rows is tried before it is known that a step fits.
    """
    shares = sorted({0.0, *(share for share in trainer.task.pace_changes_at if share < 1.0)})
    parts = [estimate_memory(trainer, share) for share in shares]
    several = trainer.num_micro_batches(trainer.task.batches[0]) > num_processes
    # the process itself holds what it held before another part was tried
    parts = [replace(memory, accumulates=several, process=parts[0].process) for memory in parts]
    peak_from, memory = max(zip(shares, parts, strict=True), key=lambda part: part[1].peak(trainer.micro_batch_size))
    room = room_bytes(trainer.device)
    limit, batch_size = int(ROOM_SHARE * room), train.batch_size // num_processes
    largest = min(largest_fitting(memory, batch_size, limit) for memory in parts)
    paces: list[tuple[float, float]] = []
    validation_s = None
    if trainer.micro_batch_size <= largest:
        # here it makes the micro-batches of all
        paces = [(share, time_steps(trainer, share) / num_processes) for share in shares]
        validation_s = trainer.task.validation_s(device=trainer.device, micro_batch_size=trainer.micro_batch_size)
    step_s = _mean_s(paces, by_clock=train.budget_s is not None) if paces else None
    steps_per_epoch = trainer.task.batches.steps_per_epoch
    times = None if step_s is None or validation_s is None else (step_s, validation_s)
    steps, num_validations = _length(train, evaluation, steps_per_epoch, times)
    return Plan(
        num_parameters=sum(p.numel() for p in trainer.parameters),
        memory=memory,
        peak_from=peak_from,
        micro_batch_size=trainer.micro_batch_size,
        room_bytes=room,
        largest_fitting=largest,
        length_key=(trainer.task.length_limit(train) or ("train.seq_len",))[0],
        tokens_per_epoch=trainer.task.num_targets,
        unit=trainer.task.unit,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        checkpoint_bytes=checkpoint_bytes(trainer),
        num_checkpoints=_most_checkpoints(save, steps),
        paces=paces,
        step_s=step_s,
        validation_s=validation_s,
        num_validations=num_validations,
    )


def _mean_s(paces: Sequence[tuple[float, float]], *, by_clock: bool) -> float:
    """Seconds of a step on the average of the run, whose shares are shares of its time if it goes by the clock, and of
    its steps otherwise."""
    ends = [*(share for share, _ in paces[1:]), 1.0]
    parts = [(end - share, seconds) for (share, seconds), end in zip(paces, ends, strict=True)]
    if by_clock:
        return 1.0 / sum(part / max(seconds, 1e-9) for part, seconds in parts)
    return sum(part * seconds for part, seconds in parts)


def _length(
    train: TrainConfig, evaluation: EvalConfig, steps_per_epoch: int, times: tuple[float, float] | None
) -> tuple[int | None, int]:
    """Steps and validations of a run; times: seconds of a step and of a validation, by which a time budget goes."""
    steps, every = last_step(train, steps_per_epoch), evaluation.every_steps
    if train.budget_s is None:
        every = every or steps_between_evals(train, steps, steps_per_epoch)
        return steps, NUM_EVALS if steps is None else -(-steps // every)
    if times is None:
        return steps, NUM_EVALS
    step_s, validation_s = times
    left_s = Budget(train.budget_s, None, eval_s=validation_s).left_s(0.0)
    if every is None:
        num_early = min(NUM_EVALS - 1, int(EVAL_SHARE * train.budget_s / max(validation_s, 1e-6)))
        by_clock = max(1, int((left_s - num_early * validation_s) / step_s))
    else:
        by_clock = max(1, int(left_s / (step_s + validation_s / every)))
        num_early = by_clock // every
    return by_clock if steps is None else min(steps, by_clock), num_early + 1


def _most_checkpoints(save: SaveConfig, steps: int | None) -> int:
    """Checkpoints that lie on the disk at the same time: the newest, the best, one that is being written, and those of
    every ``keep_every``-th step, of which as many are saved as ``every_steps`` has in common with it."""
    most = save.keep + 2
    if save.keep_every is None or steps is None:
        return most
    every = save.keep_every if save.every_steps is None else math.lcm(save.keep_every, save.every_steps)
    return most + steps // every


def time_steps(trainer: Trainer, progress: float = 0.0) -> float:
    """Median seconds of a few training steps where this share of the run is done, after one that warms up."""
    trainer.state.horizon = Horizon(0.0, 0, progress)
    times: list[float] = []
    batches, begin = trainer.task.batches, time.monotonic()
    for number in range(MOST_STEPS + 1):
        start = time.monotonic()
        trainer.train_step(batches[number % batches.steps_per_epoch])
        trainer.device.synchronize()
        times.append(time.monotonic() - start)
        if number > 0 and time.monotonic() - begin > MOST_S:
            break
    return median(times[1:])


def _from(share: float) -> str:
    return f"from {100 * share:.0f} % of the run on"


def _bytes(number: float) -> str:
    if number <= 0:
        return "0 B"
    power = min(int(math.log(number, 1000)), 4)
    return f"{number / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
