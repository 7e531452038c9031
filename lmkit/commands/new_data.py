"""A run that goes on with other data than it began with: which order they come in, and what is noted of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmkit.config.check import Problems
from lmkit.config.plain import from_plain
from lmkit.data.batches import Batches, Restarted
from lmkit.errors import ConfigError
from lmkit.store.checkpoint import Snapshot
from lmkit.store.manifest import read_manifest

if TYPE_CHECKING:
    from lmkit.commands.training import Job

DATA_ORDER = "data_order"
"""Where a stored configuration says which order of the data the run follows; not there before they change."""


@dataclass(frozen=True)
class DataOrder:
    """Which order a run follows since its data changed."""

    number: int
    """How often the order has begun anew (>= 1)."""
    first_step: int
    """Steps that were done before it (>= 0)."""
    data: str
    """Digest of the data."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.at_least(1, DATA_ORDER, self, "number")
            check.at_least(0, DATA_ORDER, self, "first_step")

    def of(self, batches: Batches) -> Batches:
        """The batches in this order."""
        return Restarted(batches, number=self.number, first_step=self.first_step)

    def note_in(self, snapshot: Snapshot) -> None:
        """Let a run that goes on behind a checkpoint in this order know since when its losses are of these data."""
        changes = snapshot.state.setdefault("data_changes", [])
        if self.first_step not in changes:
            changes.append(self.first_step)


def order_of(stored: Mapping[str, Any]) -> DataOrder | None:
    """The order that a stored configuration names; None: the one that the run began with. Raises ConfigError."""
    return from_plain(DataOrder, stored[DATA_ORDER], where=DATA_ORDER) if DATA_ORDER in stored else None


def order_behind(snapshot: Snapshot, digests: Mapping[str, str], before: str) -> DataOrder | None:
    """The order that a run follows behind a checkpoint that was trained on the data of the digest ``before``.

    It begins anew where the data of ``digests`` are others: with the first step behind the checkpoint, under the next
    number. Steps, schedule and optimizer go on; an epoch that was under way is left where it was. Where the length of
    the run is given in epochs, these are epochs of the present data, counted from the run's first step.
    """
    order = order_of(snapshot.config)
    if before == digests["data"]:
        return order
    return DataOrder(1 if order is None else order.number + 1, snapshot.step, digests["data"])


def data_of(path: Path, digests: Mapping[str, str]) -> str:
    """Digest of the data that a checkpoint was trained on; that of the present ones if it does not say."""
    return read_manifest(path).digests.get("data", digests["data"])


def follow(job: Job, order: DataOrder | None, snapshot: Snapshot, before: str, former: list[str]) -> None:
    """Let the run go on behind a checkpoint in an order of its data (None: the first), and say and note it if that
    begins there.

    ``before``: digest of the data of the checkpoint; ``former``: those of the run before the present ones. Raises
    ConfigError for what cannot go on with other data, ResourceError.
    """
    anew = order != order_of(snapshot.config)
    if anew and job.model_config.trains_by_counting:
        raise ConfigError(f"{job.run.path} was counted on other data", "start a new run")
    if anew and job.task.fitted():
        raise ConfigError(
            f"{job.run.path} has learnt {', '.join(job.task.fitted())} from other data, and its weights go by that",
            "start a new run, or finetune from this one",
        )
    if order is not None:
        job.task.batches = order.of(job.task.batches)
        order.note_in(snapshot)
        remember(former, before, order.data)
    job.run.take_data(former)
    if order is None or not anew:
        return
    job.run.journal("data changed", {"from": before, "to": order.data, "step": order.first_step, "order": order.number})
    job.place.console.warn(
        f"the data changed: behind step {order.first_step} they come in a new order (number {order.number}), from its"
        " beginning; losses before and after are of different texts"
    )
    # batches that were to be left out (train.nonfinite=rollback) were of the other data
    snapshot.state["skipped_steps"] = [s for s in snapshot.state.get("skipped_steps", []) if s <= snapshot.step]


def remember(former: list[str], before: str, now: str) -> None:
    """Add the digest of data that a run was trained on, unless they are the present ones."""
    if before not in (now, *former):
        former.append(before)
