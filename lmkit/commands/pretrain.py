"""lmkit pretrain: train a model from scratch on a corpus, by gradient or by counting; prepares what is missing."""

from __future__ import annotations

import time
from typing import Any

from lmkit.commands.training import Job, check_data, execute
from lmkit.config.commands import PretrainConfig
from lmkit.config.plain import kind_of, to_plain
from lmkit.config.training import OnUsr1
from lmkit.console import Console
from lmkit.data.prepared import PreparedData, prepare
from lmkit.device import resolve_device
from lmkit.models.base import LanguageModel
from lmkit.signals import StopRequests, find_deadline
from lmkit.store.runs import Run
from lmkit.tasks import Task
from lmkit.tasks.language import LanguageModelling


def run(cfg: PretrainConfig) -> dict[str, Any]:
    """Train, and return what was written to the run's result.json."""
    started = time.monotonic()
    deadline = find_deadline(cfg.train.time_limit_s, started)
    with StopRequests(usr1_saves=cfg.train.on_usr1 is OnUsr1.save, deadline=deadline) as stop:
        return _run(cfg, stop, started)


def _run(cfg: PretrainConfig, stop: StopRequests, started: float) -> dict[str, Any]:
    console = Console()
    device = resolve_device(cfg.device)
    console.say(f"device: {device.description}")
    prepared = prepare(cfg.dataset, cfg.tokenizer, console)
    check_data(prepared, cfg.model, cfg.train.seq_len)
    vocab_size = prepared.tokenizer.vocab_size
    with Run.create(
        cfg.run.dir,
        root=cfg.run.root,
        dataset=prepared.name,
        model=kind_of(cfg.model),
        resume=cfg.resume,
        warn=console.warn,
    ) as this_run:
        model = cfg.model.build(vocab_size, seed=cfg.seed)
        stored = {"command": "pretrain", "vocab_size": vocab_size, **to_plain(cfg)}
        task = build_task(cfg, model, prepared)
        job = Job(cfg, this_run, task, model, cfg.model, stored, device, console, stop, started)
        return execute(job)


def build_task(cfg: PretrainConfig, model: LanguageModel, prepared: PreparedData) -> Task:
    """What the run learns."""
    return LanguageModelling(
        model,
        prepared,
        cfg.train,
        cfg.softmax,
        seed=cfg.seed,
        carries_state=cfg.model.carries_state,
        init=cfg.init,
    )
