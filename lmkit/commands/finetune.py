"""lmkit finetune: continue from the weights of a run on other data, with the run's tokenizer, as a new run."""

from __future__ import annotations

import time
from typing import Any

from lmkit.commands.training import Job, check_data, execute
from lmkit.config.commands import FinetuneConfig
from lmkit.config.plain import kind_of, to_plain
from lmkit.config.training import OnUsr1
from lmkit.console import Console
from lmkit.data.prepared import prepare
from lmkit.device import resolve_device
from lmkit.errors import ConfigError
from lmkit.loading import load_run
from lmkit.signals import StopRequests, find_deadline
from lmkit.store.runs import Run


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
    base = load_run(cfg.run, device=device, console=console)
    if base.model_config.trains_by_counting:
        raise ConfigError(f"run={base.path} is an n-gram model, which cannot be finetuned", "name a neural run")
    prepared = prepare(cfg.dataset, base.tokenizer, console)
    check_data(prepared, base.model_config, cfg.train.seq_len)
    with Run.create(
        cfg.run.dir,
        root=cfg.run.root,
        dataset=prepared.name,
        model=kind_of(base.model_config),
        resume=cfg.resume,
        warn=console.warn,
    ) as this_run:
        stored = {
            "command": "finetune",
            "vocab_size": base.tokenizer.vocab_size,
            **to_plain(cfg),
            "model": to_plain(base.model_config),
            "base": str(base.checkpoint),
        }
        job = Job(cfg, this_run, base.model, base.model_config, prepared, stored, device, console, stop, started)
        return execute(job)
