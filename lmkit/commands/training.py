"""What ``pretrain`` and ``finetune`` share: from a model and prepared data to a finished run and its result table."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lmkit.averaging import WeightAverage
from lmkit.config.commands import FinetuneConfig, PretrainConfig
from lmkit.config.model import ModelConfig, TransformerConfig
from lmkit.config.training import NonFinite
from lmkit.console import Console, format_count, format_duration, format_number
from lmkit.data.prepared import PreparedData
from lmkit.device import Device
from lmkit.errors import ConfigError, DataError, DivergedError
from lmkit.evaluation.plan import Segments, unbroken
from lmkit.evaluation.scoring import Tally, perplexity, summarize
from lmkit.initialise import initialise_from_text, token_counts
from lmkit.models.base import LanguageModel
from lmkit.objectives import build_objective
from lmkit.optim import build_optimizer
from lmkit.session import Session, state_of
from lmkit.signals import StopRequests
from lmkit.store.checkpoint import VALID_LOSS, Snapshot, load_latest
from lmkit.store.checkpoint_writer import CheckpointWriter
from lmkit.store.environment import environment
from lmkit.store.manifest import read_manifest
from lmkit.store.runs import Run, read_result
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
    model: LanguageModel
    model_config: ModelConfig
    prepared: PreparedData
    stored_config: dict[str, Any]
    """What goes into every checkpoint's config.json."""
    device: Device
    console: Console
    stop: StopRequests
    started: float
    """time.monotonic() at which the command began."""


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
        digests={"data": job.prepared.key, "tokenizer": job.prepared.tokenizer.digest},
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
    model: LanguageModel,
    prepared: PreparedData,
    device: Device,
    snapshot: Snapshot | None,
) -> Trainer:
    """The trainer of a configuration, at its first step or where a checkpoint of it was taken."""
    train, tokens = cfg.train, prepared.splits["train"].tokens
    counts_V = token_counts(tokens, prepared.tokenizer.vocab_size)
    if snapshot is None and isinstance(cfg, PretrainConfig):
        initialise_from_text(model, cfg.init, tokens, counts_V, seed=cfg.seed)
    model = model.to(device.torch_device)
    optimizer = build_optimizer(cfg.optimizer, model, fused=device.fused)
    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        optimizer_config=cfg.optimizer,
        schedule=cfg.schedule,
        objective=build_objective(cfg.softmax, counts_V),
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
    trainer = build_trainer(cfg, job.model, job.prepared, job.device, snapshot)
    job.run.cut_metrics(0 if snapshot is None else snapshot.step)
    if snapshot is not None:
        job.console.say(f"resuming {job.run.path} after step {snapshot.step}")
    session = Session(
        run=job.run,
        trainer=trainer,
        prepared=job.prepared,
        stored_config=job.stored_config,
        train=cfg.train,
        log=cfg.log,
        eval=cfg.eval,
        save=cfg.save,
        carries_state=job.model_config.carries_state,
        console=job.console,
        stop=job.stop,
        command=command_line(),
        started=job.started,
    )
    _say_plan(job, session)
    tally = session.execute()
    session.plot()
    state = trainer.state
    numbers = {
        "step": state.step,
        "epochs": state.step / session.batches.steps_per_epoch,
        "trained_tokens": state.num_targets,
        "elapsed_s": state.elapsed_s,
        "best_valid_loss": min(state.valid_losses),
    }
    return _finish(job, tally, numbers)


def _say_plan(job: Job, session: Session) -> None:
    train = job.prepared.splits["train"]
    steps = f"{session.max_steps} steps" if session.max_steps is not None else f"{job.cfg.train.budget}"
    job.console.say(
        f"model: {format_count(job.model.num_parameters())} parameters; train: {format_count(train.num_tokens)} tokens,"
        f" {session.batches.steps_per_epoch} steps an epoch; {steps}; run: {job.run.path}"
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
    tokenizer, splits = job.prepared.tokenizer, job.prepared.splits
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
    return _finish(job, tally, numbers)


def _finish(job: Job, tally: Tally, numbers: dict[str, Any]) -> dict[str, Any]:
    """Write result.json and show the table."""
    valid = job.prepared.splits["valid"]
    scores = summarize(tally, valid)
    result = {
        "command": job.stored_config["command"],
        "dataset": job.prepared.name,
        "split": "valid",
        "num_parameters": job.model.num_parameters(),
        **numbers,
        **scores,
    }
    job.run.journal("finished", {"step": numbers["step"]})
    job.run.write_result(result)
    counted = job.model_config.trains_by_counting
    length = "counted" if counted else f"{numbers['step']} steps, {numbers['epochs']:.2f} epochs"
    unit = "n-grams" if counted else "parameters"
    rows = [
        ("dataset", job.prepared.name),
        ("model", f"{job.stored_config['model']['kind']}, {format_count(job.model.num_parameters())} {unit}"),
        ("trained", f"{length}, {format_count(numbers['trained_tokens'])} tokens"),
        ("valid perplexity per token", format_number(scores["token_ppl"])),
        ("valid perplexity per word", format_number(scores["word_ppl"])),
        ("valid bits per byte", f"{scores['bits_per_byte']:.4f}"),
        ("valid accuracy", f"{100 * scores['accuracy']:.2f} %"),
        ("run", str(job.run.path)),
    ]
    if "elapsed_s" in numbers:
        rows.insert(3, ("time", format_duration(numbers["elapsed_s"])))
    job.console.table("Result", rows)
    job.console.say(f"next: lmkit eval-ppl run={job.run.path}   lmkit generate run={job.run.path} --prompt TEXT")
    return result
