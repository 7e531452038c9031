"""Words that the fault tests share: how a command ended, forged checkpoints, what a run holds, and how to die in it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from children import Child

from lmkit.store import manifest, storage
from lmkit.store.checkpoint import latest_checkpoint, list_checkpoints

PRIMITIVES = (
    "make_directory",
    "create_file",
    "write_all",
    "sync_file",
    "sync_directory",
    "rename",
    "replace",
    "remove_file",
    "remove_directory",
)
"""The functions of ``storage`` that all others there are made of."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what went wrong; nothing may follow it and no traceback may stand before it."""
        lines = self.err.splitlines()
        assert lines, f"no message, exit code {self.code}"
        assert lines[-1].startswith("error: "), self.err
        assert sum(line.startswith("error: ") for line in lines) == 1, self.err
        assert "Traceback" not in self.err
        assert "a bug in lmkit" not in lines[-1]
        return lines[-1].removeprefix("error: ")


Lmkit = Callable[..., Outcome]
Start = Callable[..., Child]


def names(run_dir: Path) -> list[str]:
    """The checkpoints of a run, all of which must be whole."""
    for path in list_checkpoints(run_dir):
        manifest.verify_checkpoint(path)
    return [path.name for path in list_checkpoints(run_dir)]


def digests(run_dir: Path) -> dict[str, str]:
    """Step and SHA-256 of the tensor files of the newest checkpoint of a run, which must be whole."""
    newest = latest_checkpoint(run_dir, pytest.fail)
    assert newest is not None
    files = manifest.read_manifest(newest).files
    return {"step": newest.name} | {file.path: file.sha256 for file in files if file.path.endswith(".safetensors")}


def forge(checkpoint: Path, name: str, data: bytes) -> None:
    """Replace or add a file of a checkpoint as an attacker would: the manifest agrees with it."""
    (checkpoint / name).write_bytes(data)
    path = checkpoint / manifest.MANIFEST
    listed = json.loads(path.read_bytes())
    if name not in [entry["path"] for entry in listed["files"]]:
        listed["files"].append({"path": name})
    for entry in listed["files"]:
        if entry["path"] == name:
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if name == manifest.CONFIG:
        listed["digests"]["config"] = hashlib.sha256(data).hexdigest()
    del listed["self"]
    listed["self"] = hashlib.sha256(manifest.canonical_json(listed)).hexdigest()
    path.write_bytes(manifest.canonical_json(listed))


def forge_config(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the configuration in a checkpoint."""
    config = json.loads((checkpoint / manifest.CONFIG).read_bytes())
    change(config)
    forge(checkpoint, manifest.CONFIG, manifest.canonical_json(config))


class FailPoint:
    """Counts the storage primitives that a piece of code uses, and at the chosen one does something else first."""

    def __init__(
        self, patch: pytest.MonkeyPatch, at: int | None, action: Callable[[str, tuple[Any, ...]], None]
    ) -> None:
        self.calls: list[str] = []
        for name in PRIMITIVES:
            patch.setattr(storage, name, self._wrap(name, getattr(storage, name), at, action))

    def _wrap(self, name: str, real: Any, at: int | None, action: Callable[[str, tuple[Any, ...]], None]) -> Any:
        def call(*args: Any) -> Any:
            if len(self.calls) == at:
                action(name, args)
            self.calls.append(name)
            return real(*args)

        return call


def kill(name: str, args: tuple[Any, ...]) -> None:
    """What a FailPoint does to die before the operation."""
    os.kill(os.getpid(), signal.SIGKILL)


def half_then_kill(name: str, args: tuple[Any, ...]) -> None:
    """The same, but a write is half done."""
    if name == "write_all":
        data = memoryview(args[1]).cast("B")
        os.write(args[0], data[: len(data) // 2])
    kill(name, args)


def in_child(work: Callable[[], None]) -> int:
    """Exit code of ``work`` in a forked process (negative: killed by that signal)."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
