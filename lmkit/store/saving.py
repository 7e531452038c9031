"""When a run saves where nobody says so, and what it does when it cannot: try once more, then go on or stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

from lmkit.config.training import OnSaveError, SaveConfig
from lmkit.errors import DivergedError, LmkitError, ResourceError
from lmkit.store.checkpoint import Snapshot, latest_checkpoint
from lmkit.store.checkpoint_writer import CheckpointWriter, SavableTokenizer
from lmkit.store.runs import Run

MAX_SHARE = 0.008
"""Of a run's time, what saves that are not cheap may take where ``save.every_steps`` does not say when to save. With
what is not reckoned, the caches that a save displaces and the copies that give way to newer ones, it is at most 1 %."""
CHEAP_S = 0.1
"""A save that takes no longer is made in any case: ten of them are 1 % of a run of 100 s."""


def may_save(cost_s: float, last_s: float, all_costs_s: float, elapsed_s: float) -> bool:
    """Whether another save keeps to MAX_SHARE of the time until now, and leaves room for one more, the run's last.

    cost_s, all_costs_s: what the save before and all of them took of training's time, seconds, 0 if there was none;
    last_s: what the run's last save will take.
    """
    return cost_s <= CHEAP_S or all_costs_s + cost_s + last_s <= MAX_SHARE * elapsed_s


class _Copy(NamedTuple):
    """A state that the writer has a copy of."""

    step: int
    best: bool
    """Whether it was the best so far."""


class Saves:
    """Saves a run's snapshots in the background under the policy ``save.on_error``.

    A save that fails (disk full, a writer that died, bytes that read back wrong) is tried once more at the next step:
    the best state itself, of others that of the next step. If that fails too, ``stop`` raises ResourceError, and
    ``continue`` warns and waits for the next save that is due. Older checkpoints are whole all the same. Weights that
    are not finite are a DivergedError in any case.
    ``shares_cores`` says that training runs on the cores that saving takes.
    """

    def __init__(
        self,
        run: Run,
        tokenizer: SavableTokenizer,
        config: SaveConfig,
        warn: Callable[[str], None],
        *,
        shares_cores: bool = True,
    ) -> None:
        self._writer = CheckpointWriter(run, tokenizer, keep=config.keep, keep_every=config.keep_every, warn=warn)
        self._run, self._warn = run, warn
        self._stops = config.on_error is OnSaveError.stop
        self._shares_cores = shares_cores
        self._start_s = time.monotonic()
        self.step: int | None = None
        """The step that was handed to the writer last."""
        self._in_flight: _Copy | None = None
        self._held: _Copy | None = None
        """What waits to be saved. Never beside one in flight."""
        self._failures = 0
        """Saves in a row that failed."""
        self._error: LmkitError | None = None
        """What went wrong with the last one."""
        self.retry_due = False
        """Whether a save has failed for the first time, so that it should be tried again now."""
        self.last_s = 0.0
        """How long the last save took, seconds, without retiring older ones."""
        self.last_cost_s = 0.0
        """What it took of training's time, seconds: the copy, and the processor if training needs that."""
        self._all_costs_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def poll(self) -> None:
        """Notice whether the save in flight has come to its end and how, without waiting; save what may be saved."""
        if self._in_flight is not None and not self._writer.busy:
            self.wait()
        elapsed_s = time.monotonic() - self._start_s
        # the run waits for its last save; beside a card that may be many times what the others cost, hours put off
        last_s = self.last_s if self._shares_cores else self.last_cost_s
        if self.retry_due or may_save(self.last_cost_s, last_s, self._all_costs_s, elapsed_s):
            self._release()

    def offer(self, snapshot: Snapshot, *, best: bool) -> None:
        """Save a snapshot as soon as ``may_save`` allows it (see ``poll``), or at the end; hold a copy until then.

        There is one copy at a time: the newest, but what is the ``best`` so far gives way to a better one only. A
        process that is killed loses it, and so does one that a second signal interrupts. Copies are not reckoned.
        """
        self.wait()
        if best or self._held is None or not self._held.best:
            self._hold(snapshot, best=best)
        self.poll()

    def save(self, snapshot: Snapshot, *, best: bool = False) -> None:
        """Begin to save a snapshot, unless it is that of the last save; waits for the save before.

        A best state that waits is written first, unless this one is better (``best``); any other that waits is dropped.
        """
        self.wait()
        if self._held is not None and self._held.best and not best:
            self.flush()
            self._failures = 0  # this one may fail once, too
        if snapshot.step == self.step and self._failures == 0:
            return
        self._hold(snapshot, best=best)
        self._release()

    def flush(self) -> None:
        """Save what was offered, if it is not saved yet, and wait; also for a save in flight."""
        self.wait()
        while self._held is not None:  # a second time if it is the best and could not be saved
            self._release()
            self.wait()

    def _hold(self, snapshot: Snapshot, *, best: bool) -> None:
        self._held, self.retry_due = None, False
        try:
            self._writer.hold(snapshot)
        except (ResourceError, MemoryError, RuntimeError) as error:
            self.step = snapshot.step
            self._note(error)
        else:
            self._held = _Copy(snapshot.step, best)

    def _release(self) -> None:
        if self._held is not None:
            self.step = self._held.step
            self._in_flight, self._held, self.retry_due = self._held, None, False
            self._writer.release()

    def finish(self, snapshot: Snapshot, *, best: bool = False) -> None:
        """Save a snapshot and wait for it. Raises ResourceError if it could not be saved."""
        self.save(snapshot, best=best)
        self.wait()
        if self.retry_due:
            self.save(snapshot, best=best)
            self.wait()
        if self._error is not None:
            whole = latest_checkpoint(self._run.path, self._warn)
            kept = "no checkpoint yet" if whole is None else f"newest whole checkpoint: {whole.name}"
            remedy = f"{self._error.remedy}, then continue with resume=true" if self._error.remedy else None
            raise ResourceError(f"the last save failed ({kept}): {self._error.problem}", remedy) from self._error

    def wait(self) -> None:
        """Wait for the save in flight and note how it ended."""
        try:
            self._writer.wait()
        except DivergedError:
            raise
        except Exception as error:
            self._note(error)
        else:
            if self._in_flight is not None:
                cost = self._writer.last_cost
                self.last_s = cost.copy_s + cost.wall_s
                self.last_cost_s = cost.copy_s + (cost.cpu_s if self._shares_cores else 0.0)
                self._all_costs_s += self.last_cost_s
                self._failures, self.retry_due, self._error = 0, False, None
        self._in_flight = None

    def _note(self, cause: Exception) -> None:
        """Count a failed save. Raises ResourceError if that is to end the run."""
        what = f"saving step {self.step} failed: {type(cause).__name__}: {cause}"
        error = cause if isinstance(cause, LmkitError) else ResourceError(what)
        self._error = error
        failed, self._in_flight = self._in_flight, None
        self._failures += 1
        self._run.journal("save failed", {"step": self.step, "error": str(error)})
        if self._failures == 1:
            self.retry_due = True
            if failed is not None and failed.best:
                self._held = failed  # the writer has its copy still
            self._warn(f"{error} (trying once more)")
            return
        self.retry_due = False
        if self._stops:
            raise ResourceError(error.problem, error.remedy) from cause
        self._warn(f"{error} (training goes on; the next save is tried when it is due)")


class NoSaves(Saves):
    """What the other processes of a job have, whose first one saves for all."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.retry_due, self.last_s = False, 0.0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def poll(self) -> None:
        return

    def offer(self, snapshot: Snapshot, *, best: bool) -> None:
        return

    def save(self, snapshot: Snapshot, *, best: bool = False) -> None:
        self.step = snapshot.step

    def flush(self) -> None:
        return

    def finish(self, snapshot: Snapshot, *, best: bool = False) -> None:
        self.step = snapshot.step
