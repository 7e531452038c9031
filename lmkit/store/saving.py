"""What a run does when a checkpoint cannot be saved: try once more, then go on or stop, and never end as if it had."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from lmkit.config.training import OnSaveError, SaveConfig
from lmkit.errors import DivergedError, LmkitError, ResourceError
from lmkit.store.checkpoint import Snapshot, latest_checkpoint
from lmkit.store.checkpoint_writer import CheckpointWriter, SavableTokenizer
from lmkit.store.runs import Run


class Saves:
    """Saves a run's snapshots in the background under the policy ``save.on_error``.

    A save that fails (disk full, a writer that died, bytes that read back wrong) is tried once more at the next step;
    if that fails too, ``stop`` raises ResourceError, and ``continue`` warns and waits for the next save that is due.
    Older checkpoints are whole all the same. Weights that are not finite are a DivergedError in any case.
    """

    def __init__(self, run: Run, tokenizer: SavableTokenizer, config: SaveConfig, warn: Callable[[str], None]) -> None:
        self._writer = CheckpointWriter(run, tokenizer, keep=config.keep, keep_every=config.keep_every, warn=warn)
        self._run, self._warn = run, warn
        self._stops = config.on_error is OnSaveError.stop
        self.step: int | None = None
        """The step that was handed to the writer last."""
        self._in_flight_since_s: float | None = None
        self._failures = 0
        """Saves in a row that failed."""
        self._error: LmkitError | None = None
        """What went wrong with the last one."""
        self.retry_due = False
        """Whether a save has failed for the first time, so that it should be tried again now."""
        self.last_s = 0.0
        """How long the last save took, seconds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def poll(self) -> None:
        """Notice whether the save in flight has come to its end and how, without waiting."""
        if self._in_flight_since_s is not None and not self._writer.busy:
            self.wait()

    def save(self, snapshot: Snapshot) -> None:
        """Begin to save a snapshot, unless it is that of the last save; waits for the save before."""
        self.wait()
        if snapshot.step == self.step and self._failures == 0:
            return
        self.retry_due = False
        self.step, self._in_flight_since_s = snapshot.step, time.monotonic()
        try:
            self._writer.submit(snapshot)
        except (ResourceError, MemoryError, RuntimeError) as error:
            self._note(error)

    def finish(self, snapshot: Snapshot) -> None:
        """Save a snapshot and wait for it. Raises ResourceError if it could not be saved."""
        self.save(snapshot)
        self.wait()
        if self.retry_due:
            self.save(snapshot)
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
            if self._in_flight_since_s is not None:
                self.last_s = time.monotonic() - self._in_flight_since_s
                self._failures, self.retry_due, self._error = 0, False, None
        self._in_flight_since_s = None

    def _note(self, cause: Exception) -> None:
        """Count a failed save. Raises ResourceError if that is to end the run."""
        what = f"saving step {self.step} failed: {type(cause).__name__}: {cause}"
        error = cause if isinstance(cause, LmkitError) else ResourceError(what)
        self._error = error
        self._in_flight_since_s = None
        self._failures += 1
        self._run.journal("save failed", {"step": self.step, "error": str(error)})
        if self._failures == 1:
            self.retry_due = True
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

    def save(self, snapshot: Snapshot) -> None:
        self.step = snapshot.step

    def finish(self, snapshot: Snapshot) -> None:
        self.step = snapshot.step

    def wait(self) -> None:
        return
