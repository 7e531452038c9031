"""Where a training command runs, and what it refuses before any work because of that, or of its data."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lmkit.averaging import check_schedule_free
from lmkit.config.commands import FinetuneConfig, PretrainConfig
from lmkit.config.model import ModelConfig, TransformerConfig
from lmkit.config.optimization import ScheduleFreeConfig
from lmkit.config.parallel import FsdpConfig
from lmkit.config.training import OnUsr1, TrainConfig, check_length
from lmkit.console import Console
from lmkit.data.prepared import PreparedData
from lmkit.device import Device, resolve_device
from lmkit.distributed import World, find_world
from lmkit.errors import ConfigError, DataError
from lmkit.loggers import require_logger
from lmkit.signals import StopRequests, find_deadline


@dataclass(frozen=True)
class Place:
    """Where and when a training command runs, in one of the processes that train together."""

    world: World
    device: Device
    console: Console
    stop: StopRequests
    started: float
    """time.monotonic() at which the command began."""


@contextlib.contextmanager
def here(cfg: PretrainConfig | FinetuneConfig) -> Iterator[Place]:
    """What a training command begins with; within it signals and time limits only ask to stop."""
    started = time.monotonic()
    deadline = find_deadline(cfg.train.time_limit_s, started)
    world = find_world(cfg.parallel)
    device = resolve_device(cfg.device, world)
    require_logger(cfg.logger)
    check_schedule_free(cfg.optimizer, cfg.schedule, cfg.train)
    check_sharding(cfg)
    with (
        StopRequests(usr1_saves=cfg.train.on_usr1 is OnUsr1.save, deadline=deadline) as stop,
        world.joined(device.torch_device, cfg.parallel),
    ):
        console = Console(silent=not world.is_first)
        console.say(f"device: {device.description}{world.description}")
        yield Place(world, device, console, stop, started)


def check_sharding(cfg: PretrainConfig | FinetuneConfig) -> None:
    """Raise ConfigError for what parallel=fsdp cannot train; called before any work."""
    if not isinstance(cfg.parallel, FsdpConfig):
        return
    remedy = "use parallel=ddp"
    if isinstance(cfg, PretrainConfig) and cfg.objective.name != "lm":
        raise ConfigError(f"objective={cfg.objective.name} does not go with parallel=fsdp", remedy)
    if isinstance(cfg.optimizer, ScheduleFreeConfig):
        raise ConfigError("optimizer=schedule_free does not go with parallel=fsdp", remedy)


def check_data(prepared: PreparedData, model: ModelConfig, seq_len: int) -> None:
    """Gate three: what only the data can tell. Raises ConfigError or DataError before the model is built."""
    check_length(seq_len, model.context if isinstance(model, TransformerConfig) else None)
    for name in ("train", "valid"):
        if name not in prepared.splits or prepared.splits[name].num_tokens == 0:
            raise DataError(f"the dataset has no {name} split", "raise dataset.valid_fraction, or add the files")


def deal(train: TrainConfig, world: World) -> TrainConfig:
    """The training loop with micro-batches that can be dealt to the processes.

    Raises ConfigError if they would not all get the same number.
    """
    if world.size == 1:
        return train
    share, rest = divmod(train.batch_size, world.size)
    if rest:
        raise ConfigError(
            f"train.batch_size={train.batch_size} cannot be dealt to {world.size} processes",
            f"make it a multiple of {world.size}",
        )
    micro = share if train.micro_batch_size is None else train.micro_batch_size
    if share % micro:
        raise ConfigError(
            f"train.micro_batch_size={micro} makes {train.batch_size // micro} micro-batches of a step, which cannot"
            f" be dealt to {world.size} processes",
            f"use train.micro_batch_size={math.gcd(share, micro)}",
        )
    return replace(train, micro_batch_size=micro)
