"""What every test finds: one thread, signals as a terminal leaves them, saves whenever they are due, and no plots.

Tiny tensors gain nothing from more threads, and threads of several test processes take each other's cores. Under nohup
or in the background SIGHUP and SIGINT come ignored.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # read when torch is imported, which is later

settings.register_profile("lmkit", deadline=None)  # no test judges by the clock; a busy machine stalls
settings.load_profile("lmkit")

signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    """What has been imported and collected stays to the end: looking through it for garbage takes 2 % of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _cheap_saves() -> Iterator[None]:
    """Every evaluation is followed by a save, however long that takes on a busy machine."""
    from lmkit.store import saving

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "CHEAP_S", 1e9)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_plots() -> Iterator[None]:
    """The plot at the end of a run takes longer than the runs here; the tests of plots draw."""
    from lmkit.commands import training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "plot_run", lambda *_: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is written into the user's cache, and nothing there is found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
