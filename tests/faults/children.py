"""lmkit in a child process that may be limited, cut off or killed. The children are forked from a process that has
imported everything but run nothing, so that each starts in milliseconds."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

Setup = Callable[[], None]

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
NOT_HERE = 77
"""Exit code of a child that may not make a name space, or cannot be limited, on this system."""


class Child:
    """A running ``lmkit``; what it prints goes to a file. Without words it does what ``setup`` says, and ends."""

    def __init__(
        self, words: Sequence[str | Path], output: Path, setup: Sequence[Setup] = (), after: Sequence[Setup] = ()
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._output = output
        arguments = ([str(word) for word in words], output, list(setup), list(after))
        self.process = context.Process(target=_main, args=arguments)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def text(self) -> str:
        """What it has printed so far, on standard output and standard error."""
        return self._output.read_text(encoding="utf-8", errors="replace") if self._output.exists() else ""

    def send(self, number: int) -> None:
        """Send a signal, unless the child has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = 300) -> int:
        """Its exit code; negative: killed by that signal. Skips the test if this system cannot do what was asked."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            raise TimeoutError(f"still running after {seconds} s:\n{self.text}")
        if code == NOT_HERE:
            pytest.skip("needs name spaces or limits that this system does not give")
        return code


PRELOADED = [
    "pytest", "torch._dynamo", "hydra", "omegaconf", "lmkit.cli",
    *(f"lmkit.commands.{name}" for name in ("prepare", "pretrain", "finetune", "eval_ppl", "generate")),
]  # fmt: skip


def _main(words: list[str], output: Path, setup: list[Setup], after: list[Setup]) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for number in (1, 2):
        os.dup2(descriptor, number)
    from lmkit import cli
    from lmkit.commands import training
    from lmkit.store import saving

    training.plot_run = no_plot
    saving.CHEAP_S = 1e9  # as in tests/conftest.py, which does not reach this process
    for prepare in setup:
        prepare()
    code = cli.main(words) if words else 0
    for action in after:
        action()
    sys.exit(code)


def no_plot(*_: object, **__: object) -> None:
    """In place of the plot at the end of a run, which takes longer than the runs here."""


def environment(**values: str | None) -> Setup:
    """Set these variables in the child; None removes one."""
    return partial(_set_environment, values)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def copy(source: Path, target: Path) -> Setup:
    """Keep what is on a disk that only the child sees."""
    return partial(shutil.copytree, source, target, dirs_exist_ok=True)


def limit(name: str, value: int) -> Setup:
    """Lower a limit of ``resource`` by its name, e.g. RLIMIT_FSIZE."""
    return partial(_limit, name, value)


def limit_memory(more_bytes: int) -> Setup:
    """Let the child allocate so many bytes beyond what it has."""
    return partial(_limit_memory, more_bytes)


def _limit_memory(more_bytes: int) -> None:
    import psutil

    if sys.platform != "linux":
        os._exit(NOT_HERE)
    _limit("RLIMIT_AS", psutil.Process().memory_info().vms + more_bytes)


def _limit(name: str, value: int) -> None:
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing too much is an error and not the end
    number = getattr(resource, name)
    resource.setrlimit(number, (value, resource.getrlimit(number)[1]))


def namespace(kind: int = CLONE_NEWNS) -> Setup:
    """Name spaces of its own: what the child mounts nobody else sees. Exits with NOT_HERE where that is refused."""
    return partial(_namespace, kind)


def _namespace(kind: int) -> None:
    user, group = os.getuid(), os.getgid()
    if sys.platform != "linux" or _libc().unshare(kind | CLONE_NEWUSER) != 0:
        os._exit(NOT_HERE)
    try:
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1", encoding="ascii")
    except OSError:
        os._exit(NOT_HERE)
    if kind & CLONE_NEWNS:
        _mount("none", Path("/"), "none", MS_REC | MS_PRIVATE)


def small_disk(path: Path, options: str) -> Setup:
    """Mount an empty tmpfs with these options (size=2m, nr_inodes=20) on a folder."""
    return partial(_mount, "tmpfs", path, "tmpfs", 0, options)


def read_only(path: Path) -> Setup:
    """Make a folder read-only, for root too."""
    return partial(_read_only, path)


def _read_only(path: Path) -> None:
    _mount(str(path), path, "none", MS_BIND)
    _mount("none", path, "none", MS_BIND | MS_REMOUNT | MS_RDONLY)


def _mount(source: str, target: Path, kind: str, flags: int, options: str = "") -> None:
    arguments = [text.encode() for text in (source, str(target), kind, options)]
    if _libc().mount(*arguments[:3], flags, arguments[3]) != 0:
        os._exit(NOT_HERE)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
    return libc
