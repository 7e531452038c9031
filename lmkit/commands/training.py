"""What ``pretrain`` and ``finetune`` share: from a model and prepared data to a finished run and its result table."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from lmkit.averaging import WeightAverage
from lmkit.config.commands import FinetuneConfig, PretrainConfig
from lmkit.config.model import ModelConfig, TransformerConfig
from lmkit.config.training import NonFinite
from lmkit.console import Console, format_count, format_duration
from lmkit.data.prepared import PreparedData
from lmkit.device import Device
from lmkit.errors import ConfigError, DataError, DivergedError
from lmkit.evaluation.plan import Segments, unbroken
from lmkit.evaluation.scoring import perplexity
from lmkit.models.base import LanguageModel
from lmkit.optim import build_optimizer
from lmkit.session import Session, state_of
from lmkit.signals import StopRequests
from lmkit.store.checkpoint import VALID_LOSS, Snapshot, load_latest
from lmkit.store.checkpoint_writer import CheckpointWriter
from lmkit.store.environment import environment
from lmkit.store.manifest import read_manifest
from lmkit.store.runs import Run, read_result
from lmkit.tasks import Task, Validation
from lmkit.tasks.language import LanguageModelling
from lmkit.train import Trainer, TrainState, can_read_late, restore_trainer

IMMUTABLE = ("model", "tokenizer", "seed", "optimizer.kind", "train.batch_size", "train.seq_len", "train.order")
"""Keys that decide what a run computes: a run cannot be resumed with another value. The rest may change."""
LENGTH = ("train.max_steps", "train.max_epochs", "train.budget", "train.patience")
"""Keys with another value of which a finished run goes on."""


@dataclass
class Job:
    """Everything a training command has put together before the first step."""

    cfg: PretrainConfig | FinetuneConfig
    run: Run
    task: Task
    model: nn.Module
    model_config: ModelConfig
    stored_config: dict[str, Any]
    """What goes into every checkpoint's config.json."""
    device: Device
    console: Console
    stop: StopRequests
    started: float
    """time.monotonic() at which the command began."""

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, tied ones counted once; n-grams of a model that counts."""
        if isinstance(self.model, LanguageModel):
            return self.model.num_parameters()
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def check_data(prepared: PreparedData, model: ModelConfig, seq_len: int) -> None:
    """Gate three: what only the data can tell. Raises ConfigError or DataError before the model is built."""
    if isinstance(model, TransformerConfig) and seq_len > model.context:
        raise ConfigError(
            f"train.seq_len={seq_len} is longer than model.context={model.context}", "lower it or raise model.context"
        )
    for name in ("train", "valid"):
        if name not in prepared.splits or prepared.splits[name].num_tokens == 0:
            raise DataError(f"the dataset has no {name} split", "raise dataset.valid_fraction, or add the files")


def execute(job: Job) -> dict[str, Any]:
    """Train (or count), evaluate on valid, save, write result.json, and show the result."""
    job.run.begin(
        seed=job.cfg.seed,
        command=command_line(),
        digests={"data": job.task.data_digest, "tokenizer": job.task.tokenizer.digest},
    )
    found = load_latest(job.run.path, job.console.warn)
    changes = check_resumable(found[1].config, job.stored_config) if found is not None else []
    if changes:
        job.run.journal("changed", {"keys": changes})
    before = read_result(job.run.path)
    if before is not None and found is not None and not [c for c in changes if c.startswith(LENGTH)]:
        job.console.say(f"{job.run.path} is finished at step {found[1].step}: nothing to do")
        return before
    if job.model_config.trains_by_counting:
        return _count(job)
    if found is not None:
        _say_environment(job, found[0])
    return _train(job, found[1] if found is not None else None)


def command_line() -> list[str]:
    """The words that started this process, for people."""
    return ["lmkit", *sys.argv[1:]]


def build_trainer(
    cfg: PretrainConfig | FinetuneConfig,
    task: Task,
    model: nn.Module,
    device: Device,
    snapshot: Snapshot | None,
) -> Trainer:
    """The trainer of a configuration, at its first step or where a checkpoint of it was taken."""
    train = cfg.train
    if snapshot is None:
        task.begin()
    model = model.to(device.torch_device)
    optimizer = build_optimizer(cfg.optimizer, model, fused=device.fused)
    trainer = Trainer(
        task=task,
        model=model,
        optimizer=optimizer,
        optimizer_config=cfg.optimizer,
        schedule=cfg.schedule,
        device=device,
        seed=cfg.seed,
        micro_batch_size=train.micro_batch_size or train.batch_size,
        state=TrainState() if snapshot is None else TrainState.from_json(state_of(snapshot)),
        average=None if train.ema_decay is None else WeightAverage(model, train.ema_decay),
        max_skips=train.max_skips if train.nonfinite is NonFinite.skip else 0,
        spike_nats=train.spike_nats,
        reads_late=can_read_late(optimizer, device),
    )
    if snapshot is not None:
        restore_trainer(trainer, snapshot.model, snapshot.optimizer)
    return trainer


def _train(job: Job, snapshot: Snapshot | None) -> dict[str, Any]:
    cfg = job.cfg
    trainer = build_trainer(cfg, job.task, job.model, job.device, snapshot)
    job.run.cut_metrics(0 if snapshot is None else snapshot.step)
    if snapshot is not None:
        job.console.say(f"resuming {job.run.path} after step {snapshot.step}")
    session = Session(
        run=job.run,
        trainer=trainer,
        stored_config=job.stored_config,
        train=cfg.train,
        log=cfg.log,
        eval=cfg.eval,
        save=cfg.save,
        console=job.console,
        stop=job.stop,
        command=command_line(),
        started=job.started,
    )
    _say_plan(job, session)
    validation = session.execute()
    session.plot()
    state = trainer.state
    numbers = {
        "step": state.step,
        "epochs": state.step / session.batches.steps_per_epoch,
        f"trained_{job.task.unit}s": state.num_targets,
        "elapsed_s": state.elapsed_s,
        "best_valid_loss": min(state.valid_losses),
    }
    return _finish(job, validation, numbers)


def _say_plan(job: Job, session: Session) -> None:
    steps = f"{session.max_steps} steps" if session.max_steps is not None else f"{job.cfg.train.budget}"
    job.console.say(
        f"model: {format_count(job.num_parameters)} parameters; train: {format_count(job.task.num_targets)}"
        f" {job.task.unit}s, {session.batches.steps_per_epoch} steps an epoch; {steps}; run: {job.run.path}"
    )


def _say_environment(job: Job, checkpoint: Path) -> None:
    """Say and note it if the last bits of the results may differ because the software or the machine did change."""
    before, now = read_manifest(checkpoint).environment, environment()
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        job.run.journal("environment", {"changed": changed})
        job.console.say(f"the order is the same, but not promised bit for bit: {', '.join(changed)}")


def check_resumable(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Differences between a stored and a new configuration that are allowed, as text.

    Raises ConfigError listing old and new value of every key that must not change.
    """
    before, after = dict(_flat(old)), dict(_flat(new))
    changed = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    fatal = [key for key in changed if any(key == k or key.startswith(f"{k}.") for k in IMMUTABLE)]
    if fatal:
        pairs = ", ".join(f"{key}: {before.get(key)} -> {after.get(key)}" for key in fatal)
        raise ConfigError(f"the run cannot be resumed with other values ({pairs})", "start a new run, or use finetune")
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in changed]


def _flat(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _count(job: Job) -> dict[str, Any]:
    """Estimate an n-gram model, save it as the checkpoint of step 1, and score valid."""
    task = cast(LanguageModelling, job.task)
    tokenizer, splits = task.tokenizer, task.prepared.splits
    job.console.say(f"counting {format_count(splits['train'].num_tokens)} tokens")
    from lmkit.models.ngram import KneserNey

    model = cast(KneserNey, job.model)
    model.fit(splits["train"].tokens, eos_id=tokenizer.eos_id)
    tokens = splits["valid"].tokens
    windows = unbroken(Segments.whole(len(tokens), tokenizer.eos_id))
    tally = perplexity(model, tokens, windows, seq_len=1024, batch_size=1, device=job.device)
    loss = tally.nats / tally.num_tokens
    if not loss < float("inf"):
        raise DivergedError("the n-gram model gives a valid token no probability")
    with CheckpointWriter(job.run, tokenizer, keep=job.cfg.save.keep, warn=job.console.warn) as writer:
        state = {"step": 1, VALID_LOSS: loss}
        writer.submit(Snapshot(1, dict(model.state_dict()), {}, state, job.stored_config))
    numbers = {"step": 1, "epochs": 1.0, "trained_tokens": splits["train"].num_tokens, "best_valid_loss": loss}
    return _finish(job, task.validation_of(tally), numbers)


def _finish(job: Job, validation: Validation, numbers: dict[str, Any]) -> dict[str, Any]:
    """Write result.json and show the table."""
    result = {
        "command": job.stored_config["command"],
        "dataset": job.task.data_name,
        "num_parameters": job.num_parameters,
        **numbers,
        **validation.result,
    }
    job.run.journal("finished", {"step": numbers["step"]})
    job.run.write_result(result)
    counted = job.model_config.trains_by_counting
    length = "counted" if counted else f"{numbers['step']} steps, {numbers['epochs']:.2f} epochs"
    unit = "n-grams" if counted else "parameters"
    rows = [
        ("dataset", job.task.data_name),
        ("model", f"{job.stored_config['model']['kind']}, {format_count(job.num_parameters)} {unit}"),
        ("trained", f"{length}, {format_count(numbers[f'trained_{job.task.unit}s'])} {job.task.unit}s"),
        *validation.rows,
        ("run", str(job.run.path)),
    ]
    if "elapsed_s" in numbers:
        rows.insert(3, ("time", format_duration(numbers["elapsed_s"])))
    job.console.table("Result", rows)
    job.console.say(f"next: lmkit eval-ppl run={job.run.path}   lmkit generate run={job.run.path} --prompt TEXT")
    return result
