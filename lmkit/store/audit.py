"""Checking what a run left on disk: every file against its manifest, litter of killed processes, readable logs.

Nothing is changed and no tensor is loaded; a run that is training meanwhile is not disturbed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from lmkit.errors import CheckpointError
from lmkit.store import manifest as mf
from lmkit.store import storage
from lmkit.store.found import CHECKPOINTS, JOURNAL, METRICS, read_info, read_result
from lmkit.store.listing import list_checkpoints
from lmkit.store.manifest import Manifest, read_manifest, verify_entry
from lmkit.store.migrations import NewerFormatError
from lmkit.store.pins import read_pins


@dataclass(frozen=True)
class CheckpointAudit:
    """What a checkpoint turned out to be."""

    path: Path
    manifest: Manifest | None
    """None if it cannot be trusted."""
    damage: tuple[str, ...]
    """One text for each file that is not what the manifest says, beginning with its name."""
    unlisted: tuple[str, ...]
    """Files that the manifest does not name; nothing ever reads them."""


@dataclass(frozen=True)
class LogAudit:
    """How much of a file of JSON lines can be read."""

    name: str
    num_rows: int
    bad_lines: tuple[int, ...]
    """Numbers of the lines that are not JSON objects, from 1."""
    problem: str | None = None
    """Why the file cannot be read at all."""


@dataclass(frozen=True)
class RunAudit:
    """What a run directory turned out to hold."""

    path: Path
    checkpoints: tuple[CheckpointAudit, ...]
    litter: tuple[str, ...]
    """Left by killed processes (or just being written); removed when the run goes on."""
    logs: tuple[LogAudit, ...]
    damage: tuple[str, ...]
    """One text for each damaged file of the run itself."""

    @property
    def num_damaged(self) -> int:
        """Checkpoints that are not whole."""
        return sum(bool(checkpoint.damage) for checkpoint in self.checkpoints)

    @property
    def is_whole(self) -> bool:
        """Whether there is a checkpoint and everything is what it was when it was written."""
        unreadable = any(log.problem for log in self.logs)
        return bool(self.checkpoints) and not (self.num_damaged or self.damage or unreadable)


def audit_run(run_dir: Path) -> RunAudit:
    """Re-hash every checkpoint of a run and look at everything else in it. Raises CheckpointError if it is not there.

    A checkpoint that is retired by its run in the meantime is left out.
    """
    checkpoints = (audit_checkpoint(path) for path in list_checkpoints(run_dir))
    damage = []
    for read in (read_info, read_result, read_pins):
        try:
            read(run_dir)
        except CheckpointError as error:
            damage.append(_relative(error, run_dir))
    logs = (audit_log(run_dir / name) for name in (METRICS, JOURNAL))
    litter = [*storage.left_behind(run_dir), *storage.left_behind(run_dir / CHECKPOINTS)]
    return RunAudit(
        path=run_dir,
        checkpoints=tuple(audit for audit in checkpoints if audit.path.is_dir()),
        litter=tuple(entry.relative_to(run_dir).as_posix() for entry in litter),
        logs=tuple(log for log in logs if log is not None),
        damage=tuple(damage),
    )


def audit_checkpoint(path: Path, *, hashes: bool = True) -> CheckpointAudit:
    """Check the manifest and every file that it names; ``hashes=False`` looks at their presence and sizes only."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        text = _relative(error, path)
        newer = f"; {error.remedy}" if isinstance(error, NewerFormatError) else ""
        return CheckpointAudit(path, None, (text + newer,), ())
    damage = []
    for entry in manifest.files:
        try:
            if hashes:
                verify_entry(path, entry)
            else:
                mf.open_entry(path, entry).close()
        except CheckpointError as error:
            damage.append(_relative(error, path))
    known = {mf.MANIFEST, *(entry.path for entry in manifest.files)}
    return CheckpointAudit(path, manifest, tuple(damage), tuple(sorted(_files_in(path) - known)))


def audit_log(path: Path) -> LogAudit | None:
    """Which lines of a log are JSON objects; None if there is no log. A crash may leave one torn line each time."""
    try:
        with storage.open_regular(path) as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return None
    except OSError as error:
        return LogAudit(path.name, 0, (), error.strerror or str(error))
    bad = tuple(number for number, line in enumerate(lines, start=1) if line and not _is_object(line))
    return LogAudit(path.name, sum(map(bool, lines)) - len(bad), bad)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _relative(error: CheckpointError, folder: Path) -> str:
    """The problem, with the file named as seen from ``folder``."""
    return error.problem.replace(f"{folder}{os.sep}", "")


def _files_in(folder: Path) -> set[str]:
    """Everything in a checkpoint that is not a folder, with / between folder and name."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}
