"""Stop on request: the first signal lets the step finish and the run save, the second one ends it now."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopRequests:
    """Context in which SIGINT, SIGTERM and (where they exist) SIGUSR1 and SIGBREAK are noted in ``requested``.

    A second signal raises KeyboardInterrupt at once. Outside the main thread nothing is changed, since only it may
    set handlers.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK")

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for name in self.NAMES:
                number = getattr(signal, name, None)
                if number is not None:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
