"""Stop on request: the first signal lets the step finish and the run save, the second one ends it now.

A wall-clock limit asks in the same way. Which signal asks for what: SIGINT, SIGTERM and SIGBREAK stop; SIGUSR1 (the
warning of a batch system) stops or saves, as configured; SIGUSR2 and SIGHUP (the terminal is gone) save and go on.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from lmkit.errors import LmkitError, StoppedError

STOPPING = ("SIGINT", "SIGTERM", "SIGBREAK")
SAVING = ("SIGUSR2", "SIGHUP")
SLURM_END = "SLURM_JOB_END_TIME"
MARGIN_S = 60.0
"""Stop this long before a wall-clock limit, or a tenth of the limit if that is less."""


@dataclass(frozen=True)
class Deadline:
    """A time at which the process has to be gone."""

    name: str
    at_s: float
    """On the clock of time.monotonic()."""
    margin_s: float


def find_deadline(limit_s: float | None, started_s: float) -> Deadline | None:
    """The earlier of ``limit_s`` seconds after ``started_s`` (time.monotonic()) and the SLURM job's end, if any."""
    found = []
    if limit_s is not None:
        found.append(Deadline("train.time_limit", started_s + limit_s, min(MARGIN_S, limit_s / 10)))
    try:
        left_s = float(os.environ.get(SLURM_END, "")) - time.time()
    except ValueError:
        pass
    else:
        found.append(Deadline(SLURM_END, time.monotonic() + left_s, min(MARGIN_S, max(left_s, 0.0) / 10)))
    return min(found, key=lambda deadline: deadline.at_s - deadline.margin_s, default=None)


class StopRequests:
    """Context in which signals are noted instead of ending the process.

    Before ``deferring`` is set there is nothing to save, so the first signal that stops ends the block at once with
    StoppedError. After that the owner of the loop looks at ``requested`` and ``take_save_request``; a second signal
    raises KeyboardInterrupt, and a third one, sent while that waits for a save, ends the process on the spot. Outside
    the main thread signals are left alone, since only it may set handlers. A SIGHUP that was ignored (nohup) stays so.
    """

    def __init__(self, *, usr1_saves: bool = False, deadline: Deadline | None = None) -> None:
        self.deferring = False
        """Whether the owner of the loop looks at the requests."""
        self.otherwise = ("before the first step", "start it again, with resume=true if run.dir was given")
        """When, and what to do, where a signal stops the command while nobody looks."""
        self.notice_s = 0.0
        """How long stopping may take (seconds); the deadline is advanced by it."""
        self._deadline = deadline
        self._saving = (*SAVING, "SIGUSR1") if usr1_saves else SAVING
        self._stopping = STOPPING if usr1_saves else (*STOPPING, "SIGUSR1")
        self._stop_signals: list[str] = []
        self._save_signal: str | None = None
        self._before: dict[int, Any] = {}

    @property
    def signalled(self) -> str | None:
        """The name of the first signal that asked to stop."""
        return self._stop_signals[0] if self._stop_signals else None

    @property
    def requested(self) -> str | None:
        """What asks to stop: the name of a signal or of a limit."""
        if self.signalled is not None:
            return self.signalled
        limit = self._deadline
        if limit is not None and time.monotonic() + limit.margin_s + self.notice_s >= limit.at_s:
            return limit.name
        return None

    def take_save_request(self) -> str | None:
        """The signal that asked to save since the last call, if one did."""
        name, self._save_signal = self._save_signal, None
        return name

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for name in (*self._stopping, *self._saving):
                number = getattr(signal, name, None)
                if number is not None and not (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name in self._saving:
            self._save_signal = name
            return
        self._stop_signals.append(name)
        if len(self._stop_signals) > 2:
            os._exit(128 + number)
        if len(self._stop_signals) == 2 or not self.deferring:
            raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt and len(self._stop_signals) == 1 and not self.deferring:
            raise self._stopped() from None
        if isinstance(error, LmkitError):
            error.stopping = bool(self._stop_signals)

    def heed(self) -> None:
        """From here on nobody looks: a signal that stops ends the block at once. Raises StoppedError for one that was
        noted before."""
        self.deferring = False
        if self._stop_signals:
            raise self._stopped()

    def _stopped(self) -> StoppedError:
        when, remedy = self.otherwise
        return StoppedError(f"stopped by {self._stop_signals[0]} {when}", remedy)
