"""What a run writes down and tells people when something goes wrong in a step."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmkit.errors import ResourceError
from lmkit.store import storage
from lmkit.store.records import to_json

BATCH_FILE = "nonfinite-step-{step:06d}.json"


def resume_command(command: Sequence[str], run_dir: Path, *changes: str) -> str:
    """The command line that continues a run: the one that began it, with further ``key=value`` words."""
    added = [f"run.dir={run_dir}", "resume=true", *changes]
    if {"-m", "--multirun"} & set(command):
        return f"the job's command with {shlex.join(added)}"
    keys = {word.partition("=")[0] for word in added}
    return shlex.join([*(word for word in command if word.partition("=")[0] not in keys), *added])


def record_batch(run_dir: Path, record: Mapping[str, Any]) -> Path:
    """Write a batch that was not finite (``step``, numbers, rows of ids and text) into the run. Raises OSError."""
    path = run_dir / BATCH_FILE.format(step=record["step"])
    storage.replace_file(path, to_json(record))
    return path


def out_of_memory(
    error: BaseException,
    command: Sequence[str],
    run_dir: Path,
    *,
    where: str,
    shape: tuple[int, int, int],
    length: tuple[str, str] | None,
    saved: int,
) -> ResourceError:
    """The error for people: what did not fit, what would, and that the run is saved up to step ``saved``.

    ``shape``: sequences in a batch, in the part of one process, in a micro-batch. ``length``: the key that limits the
    tokens of a sequence, and what to tell of it; None: there are no tokens.
    """
    batch_size, share, micro = shape
    smaller = next((m for m in range(micro // 2, 0, -1) if share % m == 0), None)
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    size = f", which asked for {asked[1]}" if asked else ""
    remedy = "use a smaller model, or another device"
    if length is not None:
        remedy = f"use a smaller model or (in a new run) a lower {length[0]}, or another device"
    if smaller is not None:
        again = resume_command(command, run_dir, f"train.micro_batch_size={smaller}")
        remedy = f"the same updates need about half of the memory with: {again}"
    state = f"{run_dir} is saved up to step {saved}" if saved else "nothing was saved yet"
    sizes = f"train.batch_size={batch_size} in parts of {micro}{f' and {length[1]}' if length else ''}"
    return ResourceError(f"out of memory in {where} with {sizes}{size}; {state}", remedy)
