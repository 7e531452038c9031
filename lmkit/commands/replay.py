"""Replay one step of a run: from the newest checkpoint before it up to it, to see its loss and its batch row by row.

The run directory is only read. On the machine and versions of the run the numbers are those of the run, bit for bit; a
run of a card that is not here is replayed on the CPU, with other roundings and dropout. A run by the clock
(train.budget) is replayed with the progress of its checkpoint: its learning rate only comes close.
One process replays what several have trained: their sums are other roundings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmkit.commands import finetune, pretrain
from lmkit.commands.new_data import order_of
from lmkit.commands.resuming import check_known, config_of
from lmkit.commands.training import build_trainer
from lmkit.config.commands import FinetuneConfig, PretrainConfig
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import ModelConfig
from lmkit.config.plain import from_plain
from lmkit.config.training import RunConfig
from lmkit.console import Console, format_number, plural
from lmkit.data.batches import ORDER, Batches, TrainingBatch
from lmkit.device import Device, resolve_device
from lmkit.errors import CheckpointError, ConfigError, DataError
from lmkit.horizon import Horizon, last_step
from lmkit.store.browse import Status, read_journal, read_summary
from lmkit.store.checkpoint import Snapshot, list_checkpoints, load_checkpoint
from lmkit.store.found import CHECKPOINTS, read_info, read_metrics
from lmkit.store.incidents import BATCH_FILE
from lmkit.store.manifest import step_directory, step_of
from lmkit.store.migrations import NewerFormatError
from lmkit.store.records import read_object
from lmkit.tasks import Task
from lmkit.train import Trainer

NUM_SHOWN = 5
"""Rows that are printed, those with the highest loss first."""
TEXT_SHOWN = 70
"""Characters of each."""


@dataclass(frozen=True)
class _Start:
    """Where a replay begins."""

    config: dict[str, Any]
    """The stored configuration that was in force at the step."""
    snapshot: Snapshot | None
    """What it starts from; None: the beginning of the run."""
    name: str
    skipped_steps: list[int]
    """The batches that the run left out."""


def run(run_dir: str, step: int) -> dict[str, Any]:
    """Replay ``step`` of a run, show it on standard error and return it as JSON data: see ``replay``."""
    console = Console()
    result = replay(Path(run_dir), step, console)
    rows = result["rows"]
    if known := all("nats_per_token" in row for row in rows):
        rows = sorted(rows, key=lambda row: _nan_first(row["nats_per_token"]), reverse=True)
    shown = [
        (f"row {r['row']}" + (f": {r['nats_per_token']:.4f} nats" if known else ""), repr(r["text"][:TEXT_SHOWN]))
        for r in rows[:NUM_SHOWN]
    ]
    order = ", those with the highest loss first:" if known else ":"
    console.table(
        f"Step {step} of {run_dir}",
        [
            ("from", f"{result['from']}, {plural(result['replayed'], 'step')} replayed"),
            ("learning rate", f"{result['lr']:.4g}"),
            ("loss", f"{format_number(result['loss'])} {'nats per token' if known else 'per target'}"),
            ("gradient norm", format_number(result["grad_norm"])),
            ("targets", f"{result['num_targets']:,} in {plural(len(rows), 'row')}{order}"),
            *shown,
        ],
    )
    return result


def _nan_first(nats: float) -> tuple[bool, float]:
    """A key by which NaN is the highest loss."""
    return (True, 0.0) if math.isnan(nats) else (False, nats)


def replay(run_dir: Path, step: int, console: Console) -> dict[str, Any]:
    """Do ``step`` of a run again: its loss and gradient norm before the update, and each row of its batch.

    ``rows`` hold ``row``, ``text``, ``ids`` (the targets) and, where a row has a loss of its own (not in task=regress,
    task=prefer and objective=gan), ``nats_per_token`` under the exact softmax, with the step's own dropout. Raises
    ConfigError for a step that the run has no configuration for, or that lies behind its end, CheckpointError or
    DataError if what the run was trained on is not there any more.
    """
    if step < 1:
        raise ConfigError(f"step={step} must be >= 1")
    start = _find_start(run_dir, step, console)
    trainer = _prepare(run_dir, start, console)
    batches = trainer.task.batches
    console.say(f"replaying from {start.name}")
    before = trainer.state.step
    _advance(trainer, batches, run_dir, step, start.skipped_steps)
    batch = batches[step - 1]
    nats = _row_nats(trainer, batch)
    report = trainer.train_step(batch)
    rows = batch.rows(trainer.task.tokenizer.decode)
    return {
        "run": str(run_dir),
        "step": step,
        "from": start.name,
        "replayed": step - before,
        "lr": report.lr,
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "num_targets": report.num_targets,
        "rows": [{**row, "nats_per_token": nats[row["row"]] / len(row["ids"])} if nats else row for row in rows],
    }


def _find_start(run_dir: Path, step: int, console: Console) -> _Start:
    """The newest whole checkpoint before ``step``, and the configuration in force at ``step``."""
    record = read_object(run_dir / BATCH_FILE.format(step=step)) or {}
    known = read_summary(run_dir)
    last_events = [event.get("event") for event in read_journal(run_dir)[-1:]]
    # else it may have made more steps than it has logged
    has_ended = known.status in (Status.finished, Status.stopped) and last_events != ["interrupted"]
    if has_ended and not record and known.step is not None and step > known.step:
        raise ConfigError(
            f"the last step of {run_dir} is {known.step}: it has made no step {step}", f"name one up to {known.step}"
        )
    paths = list_checkpoints(run_dir)
    before = [p for p in paths if (step_of(p.name) or 0) < step]
    after = paths[len(before) :]
    snapshot = _first_whole(before[::-1], console, with_optimizer=True)
    next_one = _first_whole(after, console, with_optimizer=False)
    newest = _first_whole(after[::-1], console, with_optimizer=False) or snapshot
    configs = [record.get("config"), *(found.config for found in (next_one, snapshot) if found is not None)]
    config = next((c for c in configs if isinstance(c, dict)), None)
    if config is None:
        raise ConfigError(
            f"{run_dir} has no checkpoint and no record of step {step}", "name a run of lmkit pretrain or finetune"
        )
    name = step_directory(snapshot.step) if snapshot is not None else "the start of the run"
    return _Start(config, snapshot, name, newest.state.get("skipped_steps", []) if newest is not None else [])


def _first_whole(paths: list[Path], console: Console, *, with_optimizer: bool) -> Snapshot | None:
    """The content of the first checkpoint that is not damaged."""
    for path in paths:
        try:
            return load_checkpoint(path, with_optimizer=with_optimizer)
        except NewerFormatError:
            raise
        except CheckpointError as error:
            console.warn(f"skipped a damaged checkpoint, {error}")
    return None


def _prepare(run_dir: Path, start: _Start, console: Console) -> Trainer:
    """The trainer as it was at the start."""
    stored = start.config
    if start.snapshot is not None:
        check_known(run_dir / CHECKPOINTS / start.name, start.snapshot)
    try:
        cfg = config_of(stored)
        model_config = from_plain(ModelConfig, stored["model"], where="model")
    except ConfigError as error:
        raise CheckpointError(f"the configuration that {run_dir} has stored cannot be read: {error}") from None
    if model_config.trains_by_counting:
        raise ConfigError(f"{run_dir} was trained by counting", "it has no steps to replay")
    device = _device_of(cfg, console)
    task, model = _task_of(cfg, stored, model_config, device, console)
    info = read_info(run_dir) or {}
    digests, order = info.get("digests", {}), order_of(stored)
    former = [digests.get("data"), *info.get("former_data", [])[:1]]
    digests = digests | {"data": former[-1] if order is None else order.data}  # of the step, not of the run's end
    now = {"data": task.data_digest, "tokenizer": task.tokenizer.digest}
    changed = [key for key in now if digests.get(key) != now[key]]
    if digests.get("order", ORDER) != ORDER:
        raise DataError(f"{run_dir} was trained in another order of its data", "replay it with the lmkit of its time")
    if changed:
        raise DataError(f"{' and '.join(changed)} of {run_dir} changed since", "bring back what the run was trained on")
    if order is not None:
        task.batches = order.of(task.batches)
        if start.snapshot is not None:
            order.note_in(start.snapshot)
    trainer = build_trainer(cfg, task, model, device, start.snapshot)
    trainer.reads_late = False
    if cfg.train.budget_s is None:
        trainer.state.horizon = Horizon(1.0 / (last_step(cfg.train, task.batches.steps_per_epoch) or 1))
    return trainer


def _device_of(cfg: PretrainConfig | FinetuneConfig, console: Console) -> Device:
    """The run's device, or the CPU where there is no such one."""
    kind = cfg.device.type
    no_cuda = kind is DeviceType.cuda and not torch.cuda.is_available()
    if not no_cuda and not (kind is DeviceType.mps and not torch.backends.mps.is_available()):
        return resolve_device(cfg.device)
    console.warn(
        f"device.type={kind.name} is not available here: replaying on the CPU, with other roundings and dropout"
    )
    return resolve_device(DeviceConfig(type=DeviceType.cpu, threads=cfg.device.threads))


def _task_of(
    cfg: PretrainConfig | FinetuneConfig,
    stored: dict[str, Any],
    model_config: ModelConfig,
    device: Device,
    console: Console,
) -> tuple[Task, nn.Module]:
    """What the run learnt, and its model before the first step."""
    if isinstance(cfg, PretrainConfig):
        prepared, imported = pretrain.prepare_data(cfg, console)
        model = pretrain.build_model(replace(cfg, model=model_config), imported, prepared.tokenizer.vocab_size)
        return pretrain.build_task(cfg, model, prepared), model
    if stored["base"] is not None and cfg.init.weights is None:
        cfg = replace(cfg, run=RunConfig(path=stored["base"]))
    begin = finetune.set_up(cfg, device, console)
    return begin.task, begin.model


def _advance(trainer: Trainer, batches: Batches, run_dir: Path, step: int, skipped: list[int]) -> None:
    """Train up to the step before ``step``; validation losses, which some schedules look at, come from the metrics."""
    state = trainer.state
    validations = {row["step"]: row["valid_loss"] for row in read_metrics(run_dir) if "valid_loss" in row}
    while True:
        if state.step in validations and state.step not in state.valid_steps:
            state.valid_steps.append(state.step)
            state.valid_losses.append(validations[state.step])
        if state.step == step - 1:
            return
        if state.step + 1 in skipped:
            trainer.pass_over()
        else:
            trainer.train_step(batches[state.step])


@torch.no_grad()
def _row_nats(trainer: Trainer, batch: TrainingBatch) -> list[float]:
    """Summed loss of each row under the exact softmax with the next step's dropout; empty: the task has none."""
    trainer.model.train()
    nats: list[float] = []
    for micro in range(trainer.num_micro_batches(batch)):
        part, state = trainer.micro_batch(batch, micro)
        with trainer.device.autocast():
            nats += trainer.task.row_losses(trainer.forward, part, state) or []
    return nats
