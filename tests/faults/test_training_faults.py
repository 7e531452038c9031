"""Real signals to real runs: a run goes on or stops whole, and one that is resumed ends with the same bytes.

Numbers in names (row_49 ...) are the rows of the project's fault table.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import pytest
from children import Child
from harness import Lmkit, Start

from lmkit.store import storage
from lmkit.store.browse import Status, read_journal, status_of
from lmkit.store.checkpoint import latest_checkpoint, list_checkpoints
from lmkit.store.found import read_metrics
from lmkit.train import Trainer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

STEPS = 40


def digests(run_dir: Path) -> dict[str, str]:
    """What the newest checkpoint holds, as file -> SHA-256; every checkpoint must be whole."""
    harness.names(run_dir)
    return harness.digests(run_dir)


def journal(run_dir: Path, event: str) -> list[dict[str, Any]]:
    return [row for row in read_journal(run_dir) if row["event"] == event]


def slow_disk(seconds: float) -> None:
    """In a child: let each piece of a file take so long."""
    write_all = storage.write_all

    def slow(descriptor: int, data: bytes | memoryview) -> None:
        time.sleep(seconds)
        write_all(descriptor, data)

    storage.write_all = slow


def slow_steps(seconds: float = 0.02) -> None:
    """In a child: let each step take at least so long, so that there is time to send something."""
    train_step = Trainer.train_step

    def slow(self: Trainer, batch: Any) -> Any:
        time.sleep(seconds)
        return train_step(self, batch)

    Trainer.train_step = slow  # type: ignore[method-assign]


def deaf() -> None:
    """In a child: outlive a SIGTERM that comes when the run is over and the interpreter is about to end."""
    signal.signal(signal.SIGTERM, lambda *_: None)


def send(child: Child, number: int) -> None:
    """Send a signal, to nobody if the child has just ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, number)


def wait_until(reached: Callable[[], bool], child: Child) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        assert child.process.is_alive(), child.text
        assert time.monotonic() < deadline, child.text
        time.sleep(0.01)


def wait_for_step(run_dir: Path, step: int, child: Child) -> None:
    """Wait until the metrics have reached a step."""
    wait_until(lambda: any(row["step"] >= step for row in read_metrics(run_dir)), child)


@pytest.fixture(scope="module")
def words(small: list[str]) -> list[str]:
    """A run of a second or two, with dropout and accumulation."""
    return [
        *small,
        f"train.max_steps={STEPS}",
        "eval.every_steps=10",
        "save.every_steps=10",
        "train.micro_batch_size=2",
    ]


@pytest.fixture(scope="module")
def undisturbed(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the run that nothing happens to."""
    from lmkit import cli

    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert cli.main([*words, f"run.dir={run_dir}"]) == 0
    return digests(run_dir)


def check_resumed(words: list[str], run_dir: Path, start: Start, undisturbed: dict[str, str]) -> None:
    child = start(*words, f"run.dir={run_dir}", "resume=true")
    assert child.wait() == 0, child.text
    assert digests(run_dir) == undisturbed
    steps = [row["step"] for row in read_metrics(run_dir) if "loss" in row]
    assert steps == list(range(1, STEPS + 1))


# Signals that stop


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_row_49_50_51_a_signal_stops_the_run_with_75_and_the_command_it_prints_continues_it(
    name: str, words: list[str], start: Start, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    child = start(*words, f"run.dir={run_dir}", setup=[partial(slow_steps, 0.05)])
    wait_for_step(run_dir, 3, child)
    send(child, getattr(signal, name))
    assert child.wait() == 75, child.text
    (line,) = [line for line in child.text.splitlines() if line.startswith("error: ")]
    assert f"stopped by {name} after step" in line
    assert line.endswith(f"run.dir={run_dir} resume=true")
    (stopped,) = journal(run_dir, "stopped")
    newest = latest_checkpoint(run_dir, pytest.fail)
    assert newest is not None
    assert int(newest.name[-12:]) == stopped["step"]
    check_resumed(words, run_dir, start, undisturbed)


def stop_at_random(
    rounds: int, words: list[str], start: Start, undisturbed: dict[str, str], tmp_path: Path, seed: int
) -> None:
    """Stop runs that many times at random moments, sometimes twice in a row, and let the last one come to its end."""
    draw = random.Random(seed)
    number = 0
    for _ in range(rounds):
        run_dir = tmp_path / f"run{number}"
        child = start(*words, f"run.dir={run_dir}", "resume=true", setup=[deaf, slow_steps])
        time.sleep(draw.uniform(0.0, 1.5))
        began = time.monotonic()
        send(child, signal.SIGTERM)
        if draw.random() < 0.3:
            time.sleep(draw.uniform(0.0, 0.05))
            send(child, signal.SIGTERM)
        code = child.wait()
        assert time.monotonic() - began < 120
        early = "device:" not in child.text  # the handlers are not there yet: nothing has begun either
        assert code in (0, 75, 130) or (code == -signal.SIGTERM and early), f"{code}: {child.text}"
        if list_checkpoints(run_dir):
            digests(run_dir)
        if code == 0:
            assert digests(run_dir) == undisturbed
            number += 1
    check_resumed(words, tmp_path / f"run{number}", start, undisturbed)


def test_row_49_stops_at_random_moments_also_twice_lose_nothing(
    words: list[str], start: Start, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    stop_at_random(4, words, start, undisturbed, tmp_path, seed=49)


@pytest.mark.slow
def test_row_49_the_same_thirty_times(
    words: list[str], start: Start, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    stop_at_random(30, words, start, undisturbed, tmp_path, seed=50)


def test_row_53_a_stop_during_a_save_waits_for_it_and_no_step_is_saved_twice(
    words: list[str], start: Start, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    child = start(*words, f"run.dir={run_dir}", "save.every_steps=4", setup=[slow_steps, partial(slow_disk, 0.05)])
    folder = run_dir / "checkpoints"
    wait_until(lambda: folder.is_dir() and any(p.name.startswith(".tmp-step") for p in folder.iterdir()), child)
    send(child, signal.SIGTERM)
    assert child.wait() == 75, child.text
    steps = [row["step"] for row in journal(run_dir, "save")]
    assert steps == sorted(set(steps))
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".tmp")]
    check_resumed(words, run_dir, start, undisturbed)


def test_row_55_a_grace_that_is_shorter_than_a_save_keeps_what_was_saved_before(
    words: list[str], start: Start, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    child = start(*words, f"run.dir={run_dir}", "save.every_steps=4", setup=[slow_steps, partial(slow_disk, 0.1)])
    wait_until(lambda: bool(list_checkpoints(run_dir)), child)
    send(child, signal.SIGTERM)
    time.sleep(0.3)
    child.process.kill()
    assert child.wait() in (-signal.SIGKILL, 75)
    digests(run_dir)
    check_resumed(words, run_dir, start, undisturbed)


def test_row_50_a_second_signal_does_not_wait_for_the_step_and_loses_nothing(
    words: list[str], start: Start, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    child = start(*words, f"run.dir={run_dir}", "save.every_steps=4", setup=[slow_steps, partial(slow_disk, 0.05)])
    wait_until(lambda: bool(list_checkpoints(run_dir)), child)
    send(child, signal.SIGINT)
    time.sleep(0.05)
    send(child, signal.SIGINT)
    assert child.wait() in (130, 75), child.text
    digests(run_dir)
    check_resumed(words, run_dir, start, undisturbed)


# Signals that do not stop


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_row_51_52_a_signal_that_saves_changes_nothing_else(
    name: str, words: list[str], start: Start, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    child = start(
        *words,
        f"run.dir={run_dir}",
        "save.every_steps=1000",
        "train.on_usr1=save",
        "save.keep=9",
        setup=[partial(slow_steps, 0.05)],
    )
    wait_for_step(run_dir, 3, child)
    send(child, getattr(signal, name))
    assert child.wait() == 0, child.text
    (event,) = journal(run_dir, "signal")
    assert event["signal"] == name
    assert [row["step"] for row in journal(run_dir, "save")] == [event["step"], STEPS]
    assert digests(run_dir) == undisturbed


def on_terminal(name: str) -> None:
    """In a child: make a terminal the one that controls it and that it writes to."""
    import fcntl
    import termios

    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for number in (0, 1, 2):
        os.dup2(terminal, number)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux terminals")
def test_row_52_56_a_run_survives_its_terminal(
    words: list[str], start: Start, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    import pty

    ours, theirs = pty.openpty()
    run_dir = tmp_path / "run"
    child = start(
        *words, f"run.dir={run_dir}", setup=[partial(slow_steps, 0.05), partial(on_terminal, os.ttyname(theirs))]
    )
    os.close(theirs)
    wait_for_step(run_dir, 3, child)
    os.close(ours)
    assert child.wait() == 0
    assert [row["signal"] for row in journal(run_dir, "signal")] == ["SIGHUP"]
    assert digests(run_dir) == undisturbed


def without_reader() -> None:
    """In a child: write to pipes that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    for number in (1, 2):
        os.dup2(writing, number)


def test_row_56_a_reader_that_is_gone_does_not_stop_the_training(
    words: list[str], start: Start, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    child = start(*words, f"run.dir={tmp_path}/run", setup=[without_reader])
    assert child.wait() == 0
    assert digests(tmp_path / "run") == undisturbed


def test_row_57_a_run_that_is_suspended_keeps_its_lock_and_goes_on(
    words: list[str], start: Start, lmkit: Lmkit, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    child = start(*words, f"run.dir={run_dir}", setup=[partial(slow_steps, 0.05)])
    wait_for_step(run_dir, 3, child)
    send(child, signal.SIGSTOP)
    second = lmkit(*words, f"run.dir={run_dir}", "resume=true")
    assert second.code == 5, second.err
    assert f"process {child.pid}" in second.error
    time.sleep(0.5)
    send(child, signal.SIGCONT)
    assert child.wait() == 0, child.text
    assert digests(run_dir) == undisturbed


# Killed


@pytest.mark.parametrize("workers", [0, 3])
def test_row_73_workers_change_no_byte_over_a_kill(
    workers: int, words: list[str], start: Start, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    child = start(*words, f"run.dir={run_dir}", f"train.workers={workers}", "save.every_steps=3", setup=[slow_steps])
    wait_until(lambda: bool(list_checkpoints(run_dir)), child)
    child.process.kill()
    child.wait()
    child = start(*words, f"run.dir={run_dir}", f"train.workers={3 - workers}", "resume=true")
    assert child.wait() == 0, child.text
    assert digests(run_dir) == undisturbed


# Numbers


def test_row_58_a_run_that_diverges_is_one_line_and_7_and_keeps_its_last_checkpoint(
    words: list[str], lmkit: Lmkit, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    rate = ["optimizer=sgd", "schedule=constant", "optimizer.clip_norm=null"]
    assert lmkit(*words, f"run.dir={run_dir}", *rate, "optimizer.lr=0.01", "train.max_steps=20").code == 0
    before = digests(run_dir)
    done = lmkit(*words, f"run.dir={run_dir}", *rate, "optimizer.lr=1e38", "resume=true")
    assert done.code == 7, done.err
    assert "is not finite (loss" in done.error
    (file,) = run_dir.glob("nonfinite-step-*.json")
    assert file.name in done.error
    record = json.loads(file.read_text(encoding="utf-8"))
    assert all(row["text"] for row in record["rows"])
    after = digests(run_dir)
    assert after["step"] >= before["step"]
    (last,) = journal(run_dir, "error")
    assert (last["code"], last["message"]) == (7, done.error)
    assert status_of(run_dir) is Status.diverged


def test_row_63_another_process_folder_hash_seed_and_order_of_files_give_the_same_bytes(
    words: list[str], corpus: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    moved = tmp_path / "texts"
    moved.mkdir()
    for path in sorted(corpus.iterdir(), reverse=True):
        shutil.copy(path, moved)
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "LMKIT_CACHE": str(tmp_path / "cache")}
    line = [word.replace(f"dataset.path={corpus}", "dataset.path=texts") for word in words]
    done = subprocess.run(
        [sys.executable, "-m", "lmkit", *line, "run.dir=run"], cwd=tmp_path, env=environment, capture_output=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "run") == undisturbed
