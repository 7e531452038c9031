"""What ``pretrain`` and ``finetune`` share: from a model and prepared data to a finished run and its result table."""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from lmkit.averaging import average_begins, build_average
from lmkit.commands.forgetting import Forgetting
from lmkit.commands.new_data import DATA_ORDER, DataOrder, data_of, follow, order_behind, remember
from lmkit.commands.place import Place
from lmkit.commands.resuming import (
    LENGTH,
    check_known,
    check_new,
    check_origin,
    check_resumable,
    say_environment,
    show_changes,
)
from lmkit.config.adapter import TuneConfig
from lmkit.config.commands import FinetuneConfig, PretrainConfig
from lmkit.config.machine import Switch
from lmkit.config.model import ModelConfig
from lmkit.config.optimization import SgdConfig
from lmkit.config.plain import kind_of, with_defaults
from lmkit.config.training import Average, NonFinite
from lmkit.console import format_count, format_duration, plural
from lmkit.data.batches import ORDER
from lmkit.device import Device, attention_of_any_shape
from lmkit.distributed import SINGLE, World
from lmkit.errors import CheckpointError, ConfigError, DivergedError, StoppedError
from lmkit.evaluation.plan import Segments, unbroken
from lmkit.evaluation.scoring import perplexity
from lmkit.judging import judged
from lmkit.loggers import attach_logger
from lmkit.models.base import LanguageModel
from lmkit.models.recurrent import has_recurrent_layers
from lmkit.optim import build_optimizer
from lmkit.plots import plot_run
from lmkit.session import Session
from lmkit.sharding import shard
from lmkit.snapshots import restore_trainer, state_in
from lmkit.store.checkpoint import VALID_LOSS, Snapshot, list_checkpoints, load_latest
from lmkit.store.checkpoint_writer import CheckpointWriter
from lmkit.store.found import RUN_INFO, read_result
from lmkit.store.listing import refuse_links
from lmkit.store.runs import Run, SharedRun
from lmkit.tasks import Task, Validation
from lmkit.tasks.language import LanguageModelling
from lmkit.timing import Timing
from lmkit.train import Trainer, TrainState, pays_to_read_late
from lmkit.tuning import lr_factors, unfreezing

WHAT_BEGINS = {
    Average.swa: "train.swa_start decides",
    Average.nt_asgd: "eval.every_steps and train.asgd_patience decide",
}
"""Averages that begin on the way, and by what."""


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
    place: Place
    forgetting: Forgetting | None = None
    """What finetuning does to the perplexity on the text that the base run learnt; None: it is not measured."""

    @property
    def digests(self) -> dict[str, str]:
        """Of what must not change while the run goes on."""
        return {"data": self.task.data_digest, "order": ORDER, "tokenizer": self.task.tokenizer.digest}

    @property
    def base(self) -> tuple[str, str] | None:
        """Path and SHA-256 of the checkpoint that it starts from, if it starts from one."""
        path, sha256 = (self.stored_config.get(key) for key in ("base", "base_sha256"))
        return None if path is None else (str(path), str(sha256))

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, tied ones counted once; n-grams of a model that counts."""
        if isinstance(self.model, LanguageModel):
            return self.model.num_parameters()
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


@contextlib.contextmanager
def open_run(cfg: PretrainConfig | FinetuneConfig, dataset: str, model: str, place: Place) -> Iterator[Run]:
    """The run directory of a command; the first process makes and locks it, and the others are told where it is.

    Raises StoppedError at the end if a signal came while that was written.
    """
    made: list[Run] = []

    def make() -> str:
        options: dict[str, Any] = {"resume": cfg.resume, "warn": place.console.warn, "lock": cfg.run.lock}
        made.append(Run.create(cfg.run.dir, root=cfg.run.root, dataset=dataset, model=model, **options))
        return str(made[0].path)

    path = Path(place.world.tell(make))
    with made[0] if made else SharedRun(path) as run:
        yield run
    place.stop.heed()


def execute(job: Job) -> dict[str, Any]:
    """Train (or count), evaluate on valid, save, write result.json, and show the result."""
    place = job.place
    if place.world.size > 1 and job.model_config.trains_by_counting:
        kind = kind_of(job.cfg.parallel)
        raise ConfigError(f"parallel={kind}: a model that counts is made by one process", "leave parallel out")
    refuse_links(job.run.path)
    job.run.place = {
        "device": f"{place.device.torch_device.type} {place.device.precision.name}",
        "processes": str(place.world.size),
    }
    new_data = job.cfg.run.allow_data_change
    if place.world.is_first and not (job.run.path / RUN_INFO).is_file():
        for path in list_checkpoints(job.run.path):
            with contextlib.suppress(CheckpointError):  # damaged; load_latest says so
                # before it is written that the run was of this data
                check_origin(job.run, job.digests, path, place.console, new_data=new_data)
                remember(job.run.former_data, data_of(path, job.digests), job.digests["data"])
    job.run.begin(
        seed=job.cfg.seed,
        command=command_line(place.world),
        digests=job.digests,
        base=job.base,
        show=functools.partial(show_changes, place.console),
        new_data=new_data,
    )
    found = load_latest(job.run.path, place.console.warn, shared=place.world.local_size > 1)
    _check_shared(job, -1 if found is None else found[1].step)
    before, former = "", list[str]()
    order: DataOrder | None = None
    if found is None:
        check_new(job.run)
        job.run.take_data([])
    else:
        before = data_of(found[0], job.digests)
        former = json.loads(place.world.tell(lambda: json.dumps(job.run.former_data)))
        # what was allowed before a kill, and is in no checkpoint yet, stays allowed
        check_origin(job.run, job.digests, found[0], place.console, new_data=new_data or before in former)
        check_known(*found)
        order = order_behind(found[1], job.digests, before)
    if order is not None:
        job.stored_config = {**job.stored_config, DATA_ORDER: asdict(order)}
    changes = [] if found is None else check_resumable(with_defaults(found[1].config), job.stored_config, place.console)
    if changes:
        job.run.journal("changed", {"keys": changes})
    result = read_result(job.run.path)
    longer = any(change.startswith(LENGTH) for change in changes)
    # a result may be of an end that the run had before it was given more steps
    ended = result is not None and found is not None and result.get("step", found[1].step) == found[1].step
    if result is not None and found is not None and ended and not longer:
        place.console.say(f"{job.run.path} is finished at step {found[1].step}: nothing to do")
        return result
    if changes:
        place.console.say(f"going on with other values than before: {', '.join(changes)}")
    if found is not None:
        follow(job, order, found[1], before, former)
    if job.model_config.trains_by_counting:
        return _count(job)
    if found is not None:
        say_environment(job.run, found[0], place.console)
    return _train(job, found[1] if found is not None else None, longer=longer)


def _check_shared(job: Job, step: int) -> None:
    """Raise CheckpointError unless all processes have found the checkpoint of the same step (-1: none)."""
    world = job.place.world
    (first,), _ = world.agree([float(step)])
    _, (other,) = world.agree([], [step != first])
    if other:
        raise CheckpointError(
            f"not all processes find the checkpoint of step {first:.0f} in {job.run.path}",
            "put run.dir on a file system that all machines share",
        )


def command_line(world: World) -> list[str]:
    """The words that started the job, for people."""
    return [*world.launcher, *sys.argv[1:]]


def build_trainer(
    cfg: PretrainConfig | FinetuneConfig,
    task: Task,
    model: nn.Module,
    device: Device,
    snapshot: Snapshot | None,
    world: World = SINGLE,
) -> Trainer:
    """The trainer of a configuration, at its first step or where ``snapshot`` was taken, whose tensors are let go."""
    train = cfg.train
    if snapshot is None:
        task.begin()
        world.copy_first(model.state_dict().values())
    if world.shards and world.size > 1:
        shard(model, device.torch_device)
    model = model.to(device.torch_device)
    if cfg.device.compile is not Switch.on and has_recurrent_layers(model):
        device = replace(device, compile=False)
    tune = cfg.tune if isinstance(cfg, FinetuneConfig) else TuneConfig()
    factors = lr_factors(model, tune) | task.lr_factors()
    fused = device.fused and not (world.shards and isinstance(cfg.optimizer, SgdConfig))  # torch cannot, for pieces
    optimizer = build_optimizer(cfg.optimizer, model, fused=fused, lr_factors=factors)
    trainer = Trainer(
        task=task,
        model=model,
        optimizer=optimizer,
        optimizer_config=cfg.optimizer,
        schedule=cfg.schedule,
        device=device,
        seed=cfg.seed,
        micro_batch_size=train.micro_batch_size or train.batch_size,
        state=TrainState() if snapshot is None else state_in(snapshot),
        average=build_average(train, model, optimizer),
        average_begins=lambda state: average_begins(train, state.horizon.progress(state.step), state.losses_by_data()),
        max_skips=train.max_skips if train.nonfinite is NonFinite.skip else 0,
        spike_nats=train.spike_nats,
        frozen_until=unfreezing(model, tune),
        world=world,
        reads_late=pays_to_read_late(device),
    )
    if snapshot is not None:
        restore_trainer(trainer, snapshot.model, snapshot.optimizer)
        snapshot.model.clear()  # all of it is copied, and would take as much memory again to the end of the run
        snapshot.optimizer.clear()
    return trainer


def _train(job: Job, snapshot: Snapshot | None, *, longer: bool) -> dict[str, Any]:
    cfg, place, forgetting = job.cfg, job.place, job.forgetting
    if forgetting is not None:
        forgetting.measure_before(job.task)
    trainer = build_trainer(cfg, job.task, job.model, place.device, snapshot, place.world)
    job.run.cut_metrics(trainer.state.step, validated=trainer.state.valid_steps[-1:] == [trainer.state.step])
    if place.world.is_first:
        attach_logger(cfg.logger, job.run, job.stored_config, place.console.warn)
    if snapshot is not None:
        place.console.say(f"resuming {job.run.path} after step {snapshot.step}")
    reserve_s = 0.0 if forgetting is None else forgetting.seconds
    timing = Timing(trainer, cfg.train, place.started, longer=longer, reserve_s=reserve_s)
    session = Session(
        run=job.run,
        trainer=trainer,
        timing=timing,
        stored_config=job.stored_config,
        train=cfg.train,
        log=cfg.log,
        eval=cfg.eval,
        save=cfg.save,
        console=place.console,
        stop=place.stop,
        command=command_line(place.world),
    )
    _say_plan(job, timing)
    with attention_of_any_shape() if job.task.shapes_vary else contextlib.nullcontext():
        validation = session.execute()
    place.stop.otherwise = (f"after the last step, which is saved in {job.run.path}", "go on with resume=true")
    state = trainer.state
    average = cfg.train.average
    if average in WHAT_BEGINS and state.averaged_since is None:
        place.console.warn(
            f"train.average={average.name} never began in {state.step} steps and {len(state.valid_losses)} validations:"
            f" the weights are those of the last step ({WHAT_BEGINS[average]} when it begins)"
        )
    try:
        place.stop.heed()
        if place.world.is_first:
            plot_run(job.run.path, place.console.warn, job.task.unit)
        with judged(trainer):
            if forgetting is not None:
                validation = forgetting.added_to(validation)
    except (KeyboardInterrupt, StoppedError):
        job.run.journal("stopped", {"signal": place.stop.requested, "step": state.step})
        raise
    losses = state.losses_by_data()[-1] or [validation.loss]  # it is of these data, whatever step they begin with
    if (best := min(losses)) < losses[-1]:
        (name, value), at = job.task.shown_valid(best), state.valid_steps[state.valid_losses.index(best)]
        validation = replace(validation, rows=[*validation.rows, (f"best {name}", f"{value} at step {at}")])
    numbers = {
        "step": state.step,
        "epochs": state.step / timing.steps_per_epoch,
        f"trained_{job.task.unit}s": state.num_targets,
        "elapsed_s": state.elapsed_s,
        "best_valid_loss": best,
    }
    return _finish(job, validation, numbers)


def _say_plan(job: Job, timing: Timing) -> None:
    steps = plural(timing.max_steps, "step") if timing.max_steps is not None else f"{job.cfg.train.budget}"
    job.place.console.say(
        f"model: {format_count(job.num_parameters)} parameters; train: {format_count(job.task.num_targets)}"
        f" {job.task.unit}s, {plural(timing.steps_per_epoch, 'step')} an epoch; {steps}; run: {job.run.path}"
    )


def _count(job: Job) -> dict[str, Any]:
    """Estimate an n-gram model, save it as the checkpoint of step 1, and score valid."""
    task, place = cast(LanguageModelling, job.task), job.place
    tokenizer, splits = task.tokenizer, task.prepared.splits
    if (logger := kind_of(job.cfg.logger)) != "none":
        place.console.warn(f"logger={logger} gets nothing: a model that counts makes no steps to log")
    place.console.say(f"counting {format_count(splits['train'].num_tokens)} tokens")
    from lmkit.models.ngram import KneserNey

    model = cast(KneserNey, job.model)
    model.fit(splits["train"].tokens, eos_id=tokenizer.eos_id)
    model.to(place.device.torch_device)
    tokens = splits["valid"].tokens
    windows = unbroken(Segments.whole(len(tokens), tokenizer.eos_id))
    tally = perplexity(model, tokens, windows, seq_len=1024, batch_size=1, device=place.device)
    loss = tally.nats / tally.num_tokens
    if not loss < float("inf"):
        raise DivergedError("the n-gram model gives a valid token no probability")
    with CheckpointWriter(job.run, tokenizer, keep=job.cfg.save.keep, warn=place.console.warn) as writer:
        state = {"step": 1, VALID_LOSS: loss}
        writer.submit(Snapshot(1, dict(model.state_dict()), {}, state, job.stored_config))
    numbers = {"step": 1, "epochs": 1.0, "trained_tokens": splits["train"].num_tokens, "best_valid_loss": loss}
    return _finish(job, task.validation_of(tally), numbers)


def _finish(job: Job, validation: Validation, numbers: dict[str, Any]) -> dict[str, Any]:
    """Write result.json and show the table."""
    place = job.place
    result = {
        "command": job.stored_config["command"],
        "dataset": job.task.data_name,
        "num_parameters": job.num_parameters,
        **numbers,
        **validation.result,
    }
    # one of the next two without the other would be no end, and all that is left takes a moment
    place.stop.deferring = True
    job.run.journal("finished", {"step": numbers["step"]})
    job.run.write_result(result)
    place.stop.otherwise = (f"when {job.run.path} was finished", "what was to follow comes with resume=true")
    counted = job.model_config.trains_by_counting
    length = "counted" if counted else f"{plural(numbers['step'], 'step')}, {numbers['epochs']:.2f} epochs"
    whole = all(p.requires_grad for p in job.model.parameters())
    unit = "n-grams" if counted else "parameters" if whole else "trained parameters"
    rows = [
        ("dataset", job.task.data_name),
        ("model", f"{job.stored_config['model']['kind']}, {format_count(job.num_parameters)} {unit}"),
        ("trained", f"{length}, {format_count(numbers[f'trained_{job.task.unit}s'])} {job.task.unit}s"),
        *validation.rows,
        ("run", str(job.run.path)),
    ]
    if "elapsed_s" in numbers:
        scored = "" if job.forgetting is None else ", the scoring before training included"
        rows.insert(3, ("time", f"{format_duration(numbers['elapsed_s'])}{scored}"))
    place.console.table("Result", rows)
    place.console.say(f"next: {job.task.advice(shlex.quote(str(job.run.path)))}")
    return result
