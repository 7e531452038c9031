"""lmkit runs verify: hash everything that runs left on disk again, and say what is damaged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lmkit.commands.output import write_text
from lmkit.commands.runs_text import columns, format_bytes
from lmkit.console import plural
from lmkit.errors import CheckpointError
from lmkit.store.audit import CheckpointAudit, LogAudit, RunAudit, audit_checkpoint, audit_run
from lmkit.store.browse import Status, named_run, status_of
from lmkit.store.manifest import MANIFEST

MOST_LINES = 5
"""Numbers of torn lines that are shown."""


def verify(words: Sequence[str]) -> None:
    """Check the runs (or checkpoints) that ``words`` name and print what was found.

    Raises CheckpointError at the end if a checkpoint is damaged, or if a run has none.
    """
    problems = []
    for word in words:
        path = Path(os.path.expanduser(word))
        if (path / MANIFEST).exists():
            checkpoint = audit_checkpoint(path)
            lines, problem = _checkpoint_lines([checkpoint], str(path.parent)), None
            if checkpoint.damage:
                problem = f"{path} is damaged"
        else:
            audit = audit_run(named_run(word))
            lines, problem = _run_lines(audit), _problem(audit)
        write_text("\n".join(lines) + "\n")
        problems += [] if problem is None else [problem]
    if problems:
        remedy = "a run goes on from its newest whole checkpoint; a damaged one can only come back from a copy"
        raise CheckpointError("; ".join(problems), remedy)


def _problem(audit: RunAudit) -> str | None:
    """What keeps the run from being whole, in one text."""
    if audit.is_whole:
        return None
    if not audit.checkpoints:
        return f"{audit.path} has no checkpoint"
    if audit.num_damaged:
        return f"{audit.path}: {audit.num_damaged} of {len(audit.checkpoints)} checkpoints damaged"
    return f"{audit.path}: {'; '.join([*audit.damage, *(f'{log.name}: {log.problem}' for log in audit.logs)])}"


def _run_lines(audit: RunAudit) -> list[str]:
    lines = _checkpoint_lines(audit.checkpoints, str(audit.path))
    lines += [f"  DAMAGED  {text}" for text in audit.damage]
    if audit.litter:
        running = status_of(audit.path) is Status.running
        why = "being written" if running else "left by a killed process, removed when the run goes on"
        lines += [f"  litter   {name} ({why})" for name in audit.litter]
    return lines + [f"  {_log_text(log)}" for log in audit.logs]


def _checkpoint_lines(checkpoints: Sequence[CheckpointAudit], title: str) -> list[str]:
    rows = []
    for audit in checkpoints:
        manifest = audit.manifest
        whole = "" if manifest is None else f"{len(manifest.files)} files, {format_bytes(manifest.total_bytes)}"
        rows += [["DAMAGED", audit.path.name, text] for text in audit.damage]
        rows += [] if audit.damage else [["whole", audit.path.name, whole]]
        rows += [["note", audit.path.name, f"{name} is not in the manifest: never read"] for name in audit.unlisted]
    return [title, *(columns(rows, indent=2) if rows else ["  no checkpoints"])]


def _log_text(log: LogAudit) -> str:
    if log.problem is not None:
        return f"{log.name} cannot be read: {log.problem}"
    text = f"{log.name}: {plural(log.num_rows, 'row')}"
    if not log.bad_lines:
        return text
    shown = ", ".join(map(str, log.bad_lines[:MOST_LINES]))
    more = ", ..." if len(log.bad_lines) > MOST_LINES else ""
    return f"{text}, {len(log.bad_lines)} torn (line {shown}{more})"
