"""lmkit finetune: teach a run a task or more text, with the run's tokenizer, as a new run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from torch import nn

from lmkit.commands.training import Job, check_data, execute
from lmkit.config.commands import FinetuneConfig
from lmkit.config.model import ModelConfig
from lmkit.config.plain import kind_of, to_plain
from lmkit.config.tasks import LmTaskConfig
from lmkit.config.training import OnUsr1
from lmkit.console import Console
from lmkit.data.prepared import prepare
from lmkit.device import Device, resolve_device
from lmkit.errors import ConfigError
from lmkit.loading import LoadedRun, load_run
from lmkit.signals import StopRequests, find_deadline
from lmkit.store.runs import Run
from lmkit.tasks import Task
from lmkit.tasks.language import LanguageModelling


@dataclass(frozen=True)
class SetUp:
    """What finetuning begins with."""

    task: Task
    model: nn.Module
    model_config: ModelConfig
    base: LoadedRun


def run(cfg: FinetuneConfig) -> dict[str, Any]:
    """Train, and return what was written to the new run's result.json."""
    started = time.monotonic()
    deadline = find_deadline(cfg.train.time_limit_s, started)
    with StopRequests(usr1_saves=cfg.train.on_usr1 is OnUsr1.save, deadline=deadline) as stop:
        return _run(cfg, stop, started)


def _run(cfg: FinetuneConfig, stop: StopRequests, started: float) -> dict[str, Any]:
    console = Console()
    device = resolve_device(cfg.device)
    console.say(f"device: {device.description}")
    begin = set_up(cfg, device, console)
    with Run.create(
        cfg.run.dir,
        root=cfg.run.root,
        dataset=begin.task.data_name,
        model=kind_of(begin.model_config),
        resume=cfg.resume,
        warn=console.warn,
    ) as this_run:
        stored = {
            "command": "finetune",
            "vocab_size": begin.base.tokenizer.vocab_size,
            **to_plain(cfg),
            "model": to_plain(begin.model_config),
            "base": str(begin.base.checkpoint),
        }
        job = Job(cfg, this_run, begin.task, begin.model, begin.model_config, stored, device, console, stop, started)
        return execute(job)


def set_up(cfg: FinetuneConfig, device: Device, console: Console) -> SetUp:
    """Load the base run and the data, and build the task. Raises LmkitError where they do not fit together."""
    base = load_run(cfg.run, device=device, console=console)
    if base.model_config.trains_by_counting:
        raise ConfigError(f"run={base.path} is an n-gram model, which cannot be finetuned", "name a neural run")
    if isinstance(cfg.task, LmTaskConfig):
        return SetUp(_language(cfg, base, console), base.model, base.model_config, base)
    raise TypeError(f"no task for {type(cfg.task).__name__}")


def _language(cfg: FinetuneConfig, base: LoadedRun, console: Console) -> Task:
    prepared = prepare(cfg.dataset, base.tokenizer, console)
    check_data(prepared, base.model_config, cfg.train.seq_len)
    carries_state = base.model_config.carries_state
    return LanguageModelling(base.model, prepared, cfg.train, cfg.softmax, seed=cfg.seed, carries_state=carries_state)
