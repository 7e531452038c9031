"""lmkit runs verify-resume: train a short copy twice, once killed in the middle and resumed, and compare every byte.

The copies are real: each is a ``lmkit pretrain`` or ``finetune`` in a process of its own, and the kill is the system's
(SIGKILL, or TerminateProcess on Windows), which no program can catch.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmkit.config.commands import FinetuneConfig, PretrainConfig
from lmkit.config.optimization import PlateauConfig
from lmkit.errors import CheckpointError, ConfigError, LmkitError, ResourceError, StoppedError
from lmkit.store.browse import read_journal
from lmkit.store.found import RESULT, read_metrics
from lmkit.store.listing import list_checkpoints
from lmkit.store.manifest import read_manifest, step_of

if TYPE_CHECKING:
    from lmkit.store.checkpoint import Snapshot

PROGRAM = (sys.executable, "-m", "lmkit")
POLL_S = 0.002
ATTEMPTS = 5
"""A copy that came to its end before the kill reached it is tried again, so many times in all."""
CLOCKS = ("elapsed_s", "eval_s")
"""Counters that measure time, which no run repeats."""


def fixed_values(steps: int) -> dict[str, str]:
    """Keys that the copy sets, whatever the user's words say: where it is, and when it ends and saves."""
    return {
        "run.dir": "null",
        "resume": "false",
        "run.allow_data_change": "false",
        "train.max_steps": str(steps),
        "train.max_epochs": "null",
        "train.budget": "null",
        "train.patience": "null",
        "train.time_limit": "null",
        "save.every_steps": str(save_interval(steps)),
        "save.keep": "2",
        "log.every_steps": "1",
    }


def save_interval(steps: int) -> int:
    """Steps between two checkpoints of the copy: four in all."""
    return max(1, steps // 4)


def kill_step(steps: int) -> int:
    """The copy is killed when it logs this step: its first checkpoint is whole then, and the second begun or whole."""
    return 2 * save_interval(steps) + 1


@dataclass(frozen=True)
class Kill:
    """A kill that came at a real moment."""

    step: int
    """The last step that was logged."""
    checkpoint: int
    """The step that can be resumed from."""


def run(cfg: PretrainConfig | FinetuneConfig, words: Sequence[str], steps: int) -> None:
    """Train, kill, resume and compare; print what was proven.

    ``words``: the command and its words, ``fixed_values`` among them; ``cfg`` is what they compose to. Raises
    CheckpointError naming the first difference, and what a copy ends with if it fails.
    """
    from lmkit.console import Console
    from lmkit.data.prepared import prepare

    console = Console()
    if isinstance(cfg, PretrainConfig):
        if cfg.model.trains_by_counting:
            raise ConfigError("a model that is counted has no steps to resume", "choose another model")
        prepare(cfg.dataset, cfg.tokenizer, console)
    if isinstance(cfg.schedule, PlateauConfig) and cfg.eval.every_steps is None:
        words = [*words, f"eval.every_steps={save_interval(steps)}"]  # the schedule follows the validation losses
    folder = Path(tempfile.mkdtemp(prefix="lmkit-verify-resume-"))
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        console.say(f"1/3 undisturbed: {steps} steps")
        whole = folder / "undisturbed"
        _train([*words, f"run.dir={whole}"], folder / "log")
        for attempt in range(ATTEMPTS):
            console.say(f"2/3 the same, to be killed once step {kill_step(steps)} is logged")
            killed = folder / f"killed-{attempt}"
            kill = _train_and_kill([*words, f"run.dir={killed}"], killed, steps, folder / "log")
            if kill is not None:
                break
        else:
            raise ConfigError(f"the copy ends before it can be killed, {ATTEMPTS} times", "raise --steps")
        console.say(f"3/3 resumed from the checkpoint of step {kill.checkpoint}")
        _train([*words, f"run.dir={killed}", "resume=true"], folder / "log")
        check_resumed(killed, kill)
        same = compare(final_snapshot(whole, steps), final_snapshot(killed, steps))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)
    way = f"killed (kill -9) after step {kill.step} and resumed from the checkpoint of step {kill.checkpoint}"
    print(f"identical: {same} are the same bytes after {steps} steps, undisturbed or {way}")


def _stop(*_: object) -> None:
    """End on SIGTERM as on any error: the copy is killed and the folder removed."""
    raise StoppedError("stopped by SIGTERM; nothing is kept of the copies", "start it again")


def _start(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """``lmkit`` in a process of its own that says what it has to say into ``log``."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [*PROGRAM, *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process, if it still runs, and wait for its end."""
    process.kill()
    process.wait()


def _train(words: Sequence[str], log: Path) -> None:
    """Run a copy to its end. Raises what it ended with."""
    process = _start(words, log)
    try:
        code = process.wait()
    finally:
        _end(process)
    if code != 0:
        raise _failure(code, log)


def _train_and_kill(words: Sequence[str], run_dir: Path, steps: int, log: Path) -> Kill | None:
    """Start a copy and kill it once it has logged ``kill_step``; None if it came to its end before that."""
    process = _start(words, log)
    try:
        while process.poll() is None and _last_step(run_dir) < kill_step(steps):
            time.sleep(POLL_S)
    finally:
        _end(process)
    last, saved = _last_step(run_dir), [step_of(path.name) or 0 for path in list_checkpoints(run_dir)]
    if last < kill_step(steps):
        raise _failure(process.returncode, log)
    if last >= steps or (run_dir / RESULT).exists() or not saved:
        return None
    return Kill(last, max(saved))


def _last_step(run_dir: Path) -> int:
    """The last step in the log of the copy, 0 before there is one."""
    rows = read_metrics(run_dir) if run_dir.is_dir() else []
    return int(rows[-1]["step"]) if rows else 0


def _failure(code: int, log: Path) -> LmkitError:
    """The error that a copy ended with, with its exit code."""
    if code < 0:
        return ResourceError(f"the copy was killed by signal {-code}", "it may have been out of memory")
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1].removeprefix("error: ") if lines else f"exit code {code}"
    kinds = {kind.exit_code: kind for kind in LmkitError.__subclasses__()}
    return kinds.get(code, LmkitError)(f"the copy failed: {last}")


def check_resumed(run_dir: Path, kill: Kill) -> None:
    """Raises CheckpointError if the run began anew instead: its end would be the same and prove nothing."""
    events = read_journal(run_dir)
    starts = [number for number, event in enumerate(events) if event.get("event") in ("start", "resume")]
    saved = [int(event["step"]) for event in events[starts[-1] if starts else 0 :] if event.get("event") == "save"]
    if not saved or min(saved) <= kill.checkpoint:
        raise CheckpointError(f"the resumed run did not go on from its checkpoint of step {kill.checkpoint}")


def final_snapshot(run_dir: Path, steps: int) -> Snapshot:
    """The checkpoint in which a copy ended, verified. Raises CheckpointError."""
    paths = list_checkpoints(run_dir)
    if not paths or read_manifest(paths[-1]).step != steps:
        found = f"it ends with step {read_manifest(paths[-1]).step}" if paths else "it has none"
        raise CheckpointError(f"{run_dir.name} has no checkpoint of step {steps}: {found}")
    from lmkit.store.checkpoint import load_checkpoint

    return load_checkpoint(paths[-1], with_optimizer=True)


def compare(whole: Snapshot, resumed: Snapshot) -> str:
    """What is the same in both, for people. Raises CheckpointError naming the first thing that differs."""
    for part in ("model", "optimizer"):
        _compare_tensors(part, getattr(whole, part), getattr(resumed, part))
    for key in sorted({*whole.state, *resumed.state} - {*CLOCKS}):
        left, right = whole.state.get(key), resumed.state.get(key)
        if left != right:
            raise _differs(f"state {key}", f"{left} and {right}")
    tensors = [*whole.model.values(), *whole.optimizer.values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return f"{len(whole.model)} weights, {len(whole.optimizer)} optimizer tensors ({size:,} bytes) and all counters"


def _compare_tensors(part: str, whole: Mapping[str, Any], resumed: Mapping[str, Any]) -> None:
    import torch

    for name in sorted({*whole, *resumed}):
        if name not in whole or name not in resumed:
            raise _differs(
                f"{part} {name}", f"it is missing in the {'resumed' if name in whole else 'undisturbed'} run"
            )
        left, right = whole[name], resumed[name]
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            shapes = [f"{tensor.dtype} {list(tensor.shape)}" for tensor in (left, right)]
            raise _differs(f"{part} {name}", " and ".join(shapes))
        if not torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (left, right))):
            distance = (left.double() - right.double()).abs()
            count = int((distance > 0).sum())
            what = f"{count:,} of {left.numel():,} numbers, by at most {float(distance.max()):.3g}"
            raise _differs(f"{part} {name}", what)


def _differs(what: str, how: str) -> CheckpointError:
    return CheckpointError(
        f"the resumed run differs from the undisturbed one: {what} ({how})",
        "something in it depends on more than seed and step: threads, device or a nondeterministic kernel",
    )
