"""The machine fails: disks that fill up or are read-only, memory, descriptors, clocks, locales, no network.

Numbers in names (row_28 ...) are the rows of the project's fault table.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from children import (
    CLONE_NEWNET,
    CLONE_NEWNS,
    copy,
    environment,
    limit,
    limit_memory,
    namespace,
    read_only,
    small_disk,
)
from harness import Lmkit, Start, digests, names

from lmkit.requirements import check_installed
from lmkit.store import checkpoint_writer, runs, saving, staging, storage
from lmkit.store.browse import read_journal
from lmkit.store.checkpoint import list_checkpoints
from lmkit.store.found import read_metrics, read_result
from lmkit.train import Trainer

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


# Disks


def test_row_28_a_disk_that_fills_up_between_two_saves_keeps_the_older_checkpoints(
    small: list[str], ended: Lmkit, tmp_path: Path
) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    done = ended(
        *small,
        f"run.dir={disk}/run",
        "save.keep=9",
        setup=[namespace(), small_disk(disk, "size=1250k")],
        after=[copy(disk, kept)],
    )
    assert done.code == 6, done.err
    assert "cannot save checkpoint" in done.error
    assert "free some disk space" in done.error
    assert names(kept / "run") == ["step-000000000004", "step-000000000008"]
    assert [p.name for p in (kept / "run" / "checkpoints").iterdir() if p.name.startswith(".")] == []


def test_row_29_a_full_disk_for_the_log_does_not_stop_the_training(
    small: list[str], lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    opened = storage.open_to_append
    monkeypatch.setattr(
        storage,
        "open_to_append",
        lambda path: os.open("/dev/full", os.O_WRONLY) if path.name == runs.METRICS else opened(path),
    )
    done = lmkit(*small, f"run.dir={tmp_path}/run")
    assert done.code == 0, done.err
    assert done.err.count("metrics.jsonl: No space left on device") == 1
    assert read_result(tmp_path / "run") is not None
    assert names(tmp_path / "run")[-1] == "step-000000000012"


@pytest.mark.parametrize("kind", ["bytes", "inodes"])
def test_row_30_a_limit_on_file_sizes_or_inodes_is_named(
    small: list[str], ended: Lmkit, tmp_path: Path, kind: str
) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    setup = (
        [limit("RLIMIT_FSIZE", 20_000)] if kind == "bytes" else [namespace(), small_disk(disk, "size=9m,nr_inodes=17")]
    )
    done = ended(*small, f"run.dir={disk}/run", setup=setup, after=[copy(disk, kept)])
    assert done.code == 6, done.err
    assert ("ulimit -f" if kind == "bytes" else "No space left on device") in done.error
    assert str(disk) in done.error
    names(kept / "run")
    assert not [p.name for p in (kept / "run" / "checkpoints").iterdir() if p.name.startswith(".tmp-")]


def test_row_31_a_disk_that_fills_up_in_preparation_leaves_nothing_that_counts(
    ended: Lmkit, lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    (tmp_path / "big.txt").write_text("one line of the text\n" * 100_000, encoding="utf-8")
    words = ["prepare", "dataset=text", f"dataset.path={tmp_path / 'big.txt'}", "tokenizer=byte"]
    done = ended(
        *words,
        setup=[namespace(), small_disk(disk, "size=1m"), environment(LMKIT_CACHE=str(disk))],
        after=[copy(disk, kept)],
    )
    assert done.code == 6, done.err
    assert f"cannot write prepared data to {disk}" in done.error
    assert "LMKIT_CACHE" in done.error
    assert list((kept / "prepared").iterdir()) == []
    monkeypatch.setenv("LMKIT_CACHE", str(kept))
    assert lmkit(*words).code == 0


@pytest.mark.parametrize("what", ["read-only", "a file", "below a file"])
def test_row_32_a_run_directory_that_cannot_be_made_is_refused_before_the_first_step(
    small: list[str], ended: Lmkit, tmp_path: Path, what: str
) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "file").write_text("mine", encoding="utf-8")
    run_dir = {"read-only": folder / "run", "a file": folder / "file", "below a file": folder / "file" / "run"}[what]
    setup = [namespace(), read_only(folder)] if what == "read-only" else []
    done = ended(*small, f"run.dir={run_dir}", setup=setup)
    assert done.code == (2 if what == "a file" else 6), done.err
    assert str(run_dir) in done.error
    assert "step 1" not in done.err
    assert [path.name for path in folder.iterdir()] == ["file"]


class SlowDisk:
    """A disk on which each write takes 50 ms, and no save ends before training has come to wait for it.

    So a save is in flight whenever the next one is due, however fast the machine is.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.writes: list[int] = []
        """Writes of each save."""
        self.in_flight = self.most_in_flight = 0
        self.left_behind: list[str] = []
        """Folders of other saves that a save has found."""
        self.copied_meanwhile = 0
        """Copies that were made while a save was in flight."""
        awaited = threading.Semaphore(0)
        write_all, writer = storage.write_all, checkpoint_writer.CheckpointWriter
        save, wait, copied = writer._save, writer.wait, staging.Stage.copy

        def slow_write(descriptor: int, data: bytes | memoryview) -> None:
            if self.in_flight:
                time.sleep(0.05)
                self.writes[-1] += 1
            write_all(descriptor, data)

        def counted(own: Any, staged: Any) -> None:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self.writes.append(0)
            self.left_behind += [path.name for path in own._folder.iterdir() if path.name.startswith(".")]
            assert awaited.acquire(timeout=600)
            try:
                save(own, staged)
            finally:
                self.in_flight -= 1

        def telling(own: Any) -> None:
            if own._in_flight is not None:
                awaited.release()
            wait(own)

        def copy_of(own: Any, snapshot: Any) -> Any:
            self.copied_meanwhile += self.in_flight > 0
            return copied(own, snapshot)

        patch.setattr(storage, "write_all", slow_write)
        patch.setattr(writer, "_save", counted)
        patch.setattr(writer, "wait", telling)
        patch.setattr(staging.Stage, "copy", copy_of)


def save_events(run_dir: Path) -> list[dict[str, Any]]:
    """The journal's events of saves, in order."""
    return [row for row in read_journal(run_dir) if row["event"] == "save"]


def test_row_38_on_a_slow_disk_one_save_is_in_flight_and_the_next_one_waits_for_it_or_is_left_out(
    small: list[str], lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*small, "optimizer=sgd", "optimizer.lr=0.1"]  # no moments: few writes
    assert lmkit(*words, f"run.dir={tmp_path}/usual").code == 0
    usual = digests(tmp_path / "usual")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "STALL_S", 0.05)
        disk = SlowDisk(patch)
        waiting = lmkit(*words, f"run.dir={tmp_path}/waiting", "save.every_steps=3", "save.keep=9")
    assert waiting.code == 0, waiting.err
    assert (disk.most_in_flight, disk.copied_meanwhile, disk.left_behind) == (1, 0, [])
    events = save_events(tmp_path / "waiting")
    assert [event["step"] for event in events] == [3, 6, 9, 12]
    for before, event in zip(disk.writes, events[1:], strict=False):
        assert before > 1
        assert event["waited_s"] >= 0.049 * before  # all of the save before, which began when it was waited for
    assert events[0]["waited_s"] == 0.0
    assert waiting.err.count("training waited") == 1
    assert digests(tmp_path / "waiting") == usual

    with monkeypatch.context() as patch:
        patch.setattr(saving, "CHEAP_S", -1.0)
        patch.setattr(saving, "MAX_SHARE", 0.0)  # the first save, whose cost nobody knows, and the last
        disk = SlowDisk(patch)
        leaving_out = lmkit(*words, f"run.dir={tmp_path}/leaving-out", "eval.every_steps=2", "save.keep=9")
    assert leaving_out.code == 0, leaving_out.err
    assert (disk.most_in_flight, disk.copied_meanwhile, disk.left_behind) == (1, 0, [])
    steps = [event["step"] for event in save_events(tmp_path / "leaving-out")]
    assert (steps[0], steps[-1]) == (2, 12)
    assert len(steps) <= 3  # beside them the best one, of 6 that were due
    assert digests(tmp_path / "leaving-out") == usual


# Memory, descriptors


def test_row_33_no_memory_is_one_line_and_the_last_checkpoint_stays(
    small: list[str], trained: Path, ended: Lmkit, tmp_path: Path
) -> None:
    done = ended(*small, f"run.dir={tmp_path}/run", "model.d_embed=6000", setup=[limit_memory(500 << 20)])
    assert done.code == 6, done.err
    assert done.error.startswith("out of memory; lower train.batch_size")
    assert names(tmp_path / "run") == []
    before = digests(trained)
    done = ended(
        *small, f"run.dir={trained}", "resume=true", "train.max_steps=9999999", "train.micro_batch_size=4",
        setup=[limit_memory(1 << 20)],
    )  # fmt: skip
    assert done.code == 6, done.err
    assert "out of memory" in done.error or "no memory" in done.error or "Cannot allocate memory" in done.error
    names(trained)
    assert digests(trained)["step"] >= before["step"]


def test_row_35_no_memory_on_the_device_names_what_to_lower_and_loses_nothing(
    small: list[str], trained: Path, lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = Trainer.train_step

    def fail(self: Trainer, batch: Any) -> Any:
        if self.state.step == 9:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return train_step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", fail)
        done = lmkit(*small, f"run.dir={tmp_path}/run")
    assert done.code == 6, done.err
    assert "train.batch_size" in done.error
    assert "train.seq_len" in done.error
    assert names(tmp_path / "run")[-1] >= "step-000000000008"
    assert lmkit(*small, f"run.dir={tmp_path}/run", "resume=true").code == 0
    assert digests(tmp_path / "run") == digests(trained)


@needs_proc
def test_row_36_too_few_descriptors_are_one_line(small: list[str], ended: Lmkit, tmp_path: Path) -> None:
    codes = []
    for number in (8, 10, 12, 14, 64):
        done = ended(*small, f"run.dir={tmp_path}/run{number}", setup=[limit("RLIMIT_NOFILE", number)])
        codes.append(done.code)
        assert done.code in (0, 6), done.err
        if done.code == 6:
            assert "Too many open files" in done.error
            assert "raise the limit of open files (ulimit -n)" in done.error
        if (tmp_path / f"run{number}").exists():
            names(tmp_path / f"run{number}")
    assert (codes[0], codes[-1]) == (6, 0), codes


def starve(step: int) -> None:
    """From the save of a step on, each finds the limit of descriptors reached; what is open already stays open."""
    import resource

    save = checkpoint_writer.CheckpointWriter._save

    def starved(self: Any, staged: Any) -> None:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        if staged.step >= step:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
        try:
            save(self, staged)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)

    checkpoint_writer.CheckpointWriter._save = starved  # type: ignore[method-assign]


@needs_proc
def test_row_36_a_last_save_without_descriptors_is_one_line_and_the_run_goes_on_from_the_one_before(
    small: list[str], trained: Path, ended: Lmkit, lmkit: Lmkit, tmp_path: Path
) -> None:
    done = ended(*small, f"run.dir={tmp_path}/run", setup=[partial(starve, 12)])  # while it is made nothing else runs
    assert done.code == 6, done.err
    assert done.error.startswith("the last save failed (newest whole checkpoint: step-000000000008): cannot save")
    assert "Too many open files; raise the limit of open files (ulimit -n), then continue with resume" in done.error
    assert names(tmp_path / "run") == ["step-000000000004", "step-000000000008"]
    again = lmkit(*small, f"run.dir={tmp_path}/run", "resume=true")
    assert again.code == 0, again.err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith(".")] == []
    assert digests(tmp_path / "run") == digests(trained)


@pytest.mark.slow
@needs_proc
def test_row_37_memory_threads_and_descriptors_do_not_grow_with_the_steps(
    small: list[str], lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    process, seen = psutil.Process(), {}
    train_step = Trainer.train_step

    def watched(self: Trainer, batch: Any) -> Any:
        if self.state.step % 100 == 0:
            seen[self.state.step] = (process.memory_info().rss, process.num_fds())
        return train_step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", watched)
    words = ["train.max_steps=701", "eval.every_steps=35", "save.every_steps=14"]
    assert lmkit(*small, f"run.dir={tmp_path}/run", *words).code == 0
    grown_mb = (seen[700][0] - seen[200][0]) / 2**20
    assert grown_mb < 5, seen  # less than 1 MB in 100 steps
    assert abs(seen[700][1] - seen[200][1]) <= 2, seen  # a save in flight has files open


def test_row_39_shared_memory_is_not_needed_and_a_killed_run_leaves_none(
    small: list[str], trained: Path, start: Start, ended: Lmkit, tmp_path: Path
) -> None:
    child = start(*small, f"run.dir={tmp_path}/run", "train.max_steps=5000")
    while "step 4 " not in child.text:
        assert child.process.is_alive(), child.text
        time.sleep(0.02)
    if Path("/proc/self/maps").exists():
        assert "/dev/shm" not in Path(f"/proc/{child.pid}/maps").read_text(encoding="utf-8", errors="replace")
    child.process.kill()
    child.wait()
    if Path("/dev/shm").is_dir():
        assert not [name for name in os.listdir("/dev/shm") if str(child.pid) in name]
    done = ended(*small, f"run.dir={tmp_path}/other", setup=[namespace(), small_disk(Path("/dev/shm"), "size=4k")])
    assert done.code == 0, done.err
    assert digests(tmp_path / "other") == digests(trained)


# Killed at any time


def soak(num_kills: int, small: list[str], start: Start, tmp_path: Path) -> None:
    """Kill runs again and again until each has come to its end, and compare them with one that was left alone.

    A short one, for every day; test_soak.py goes on for longer and with more kinds of runs.
    """
    words = [
        *small, "train.max_steps=60", "eval.every_steps=10", "save.every_steps=5", "train.micro_batch_size=2",
        "model.dropout_embed=0.2",
    ]  # fmt: skip
    alone = start(*words, f"run.dir={tmp_path}/alone")
    began = time.monotonic()
    assert alone.wait() == 0, alone.text
    whole_s = time.monotonic() - began
    draw = random.Random(34)
    killed = number = 0
    while killed < num_kills:
        number += 1
        run_dir, code = tmp_path / f"run{number}", -9
        while code == -9:
            child = start(*words, f"run.dir={run_dir}", "resume=true")
            if killed < num_kills:
                time.sleep(draw.uniform(0.0, whole_s))
                child.process.kill()
            code = child.wait()
            killed += code == -9
            if run_dir.exists():
                names(run_dir)
        assert code == 0, child.text
        assert digests(run_dir) == digests(tmp_path / "alone")
        steps = [row["step"] for row in read_metrics(run_dir) if "loss" in row]
        assert steps == list(range(1, 61))


def test_rows_34_77_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    small: list[str], start: Start, tmp_path: Path
) -> None:
    soak(3, small, start, tmp_path)


def die_at(step: int) -> None:
    """In a child: end at once, as by SIGKILL, when a step is done."""
    train_step = Trainer.train_step

    def deadly(self: Trainer, batch: Any) -> Any:
        if self.state.step == step:
            os._exit(9)
        return train_step(self, batch)

    Trainer.train_step = deadly  # type: ignore[method-assign]


@pytest.mark.parametrize("at", [3, 6])
def test_row_77_a_step_that_is_done_again_is_logged_once(
    small: list[str], trained: Path, ended: Lmkit, lmkit: Lmkit, tmp_path: Path, at: int
) -> None:
    """Killed at step 3 there is a log but no checkpoint yet, at step 6 there are steps behind the checkpoint."""
    assert ended(*small, f"run.dir={tmp_path}/run", setup=[partial(die_at, at)]).code == 9
    assert len(read_metrics(tmp_path / "run")) >= at
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "lo')  # torn
    assert lmkit(*small, f"run.dir={tmp_path}/run", "resume=true").code == 0
    steps = [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert steps == list(range(1, 13))
    assert digests(tmp_path / "run") == digests(trained)
    assert b'"lo' in (tmp_path / "run" / "metrics.jsonl.old").read_bytes()


# Homes, networks, clocks, locales


@pytest.mark.parametrize("what", ["no home", "read-only home", "read-only cache", "no TMPDIR"])
def test_row_120_the_environment_of_a_bare_machine(
    small: list[str], trained: Path, ended: Lmkit, tmp_path: Path, what: str
) -> None:
    home, cache = tmp_path / "home", tmp_path / "cache"
    home.mkdir()
    cache.mkdir()
    setup = {
        "no home": [environment(HOME=None, XDG_CACHE_HOME=None)],
        "read-only home": [environment(HOME=str(home)), namespace(), read_only(home)],
        "read-only cache": [environment(LMKIT_CACHE=str(cache)), namespace(), read_only(cache)],
        "no TMPDIR": [environment(TMPDIR=str(tmp_path / "missing"))],
    }[what]
    done = ended(*small, f"run.dir={tmp_path}/run", setup=setup)
    if what == "read-only cache":
        assert done.code == 6, done.err
        assert f"cannot write prepared data to {cache}" in done.error
        assert "LMKIT_CACHE" in done.error
    else:
        assert done.code == 0, done.err
        assert digests(tmp_path / "run") == digests(trained)
    assert list(home.iterdir()) == []


def test_row_120_a_read_only_cache_gives_what_it_holds_though_the_dates_of_the_files_have_changed(
    ended: Lmkit, tmp_path: Path
) -> None:
    cache, text = tmp_path / "cache", tmp_path / "text.txt"
    text.write_text("one line of the text\n" * 100, encoding="utf-8")
    words = ["prepare", "dataset=text", f"dataset.path={text}", "tokenizer=char"]
    mine = environment(LMKIT_CACHE=str(cache))
    os.utime(text, (1, 1))
    assert ended(*words, setup=[mine]).code == 0
    os.utime(text, (2, 2))
    done = ended(*words, setup=[mine, namespace(), read_only(cache)])
    assert done.code == 0, done.err
    text.write_text("another line of text\n" * 100, encoding="utf-8")
    done = ended(*words, setup=[mine, namespace(), read_only(cache)])
    assert done.code == 6, done.err
    assert f"cannot write prepared data to {cache}" in done.error


@pytest.mark.parametrize("mask", [0o077, 0o000])
def test_row_120_files_follow_the_umask(small: list[str], start: Start, tmp_path: Path, mask: int) -> None:
    child = start(*small, f"run.dir={tmp_path}/run", setup=[partial(os.umask, mask)])
    assert child.wait() == 0, child.text
    for path in (tmp_path / "run").rglob("*"):
        mode = path.stat().st_mode & 0o777
        assert mode == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_row_121_every_command_works_without_a_network(small: list[str], ended: Lmkit, tmp_path: Path) -> None:
    alone = [namespace(CLONE_NEWNET | CLONE_NEWNS), environment(HF_HUB_OFFLINE=None)]
    run_dir = tmp_path / "run"
    device = ["device=cpu", "device.threads=1"]
    commands = [
        ["prepare", *small[1:4]],
        [*small, f"run.dir={run_dir}"],
        ["finetune", *small[1:3], f"run={run_dir}", f"run.dir={tmp_path}/tuned", "train.max_steps=2", *device],
        ["eval-ppl", f"run={run_dir}", *device],
        ["generate", f"run={run_dir}", "-n", "3", *device],
    ]
    for words in commands:
        done = ended(*words, setup=alone)
        assert done.code == 0, done.err


@pytest.mark.slow
def test_row_122_an_ascii_terminal_and_locale_do_not_reach_files_or_stop_the_output(
    trained: Path, tmp_path: Path
) -> None:
    text = tmp_path / "über.txt"
    text.write_text("Grüße aus Köln\n" * 40, encoding="utf-8")
    bare = {
        **os.environ, "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii", "LMKIT_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    script = (
        "import sys; from lmkit import cli\n"
        "sys.exit(cli.main(['prepare', 'dataset=text', 'dataset.path=' + sys.argv[1], 'tokenizer=word'])"
        " or cli.main(['generate', 'run=' + sys.argv[2], '--prompt', 'K\\u00f6ln', '-n', '2', 'device=cpu']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(text), str(trained)], env=bare, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Köln".encode() in done.stdout
    assert b"Traceback" not in done.stderr
    (tokenizer,) = (tmp_path / "cache" / "prepared").glob("*/tokenizer/tokenizer.json")
    assert "Grüße" in tokenizer.read_text(encoding="utf-8")


def test_row_124_libraries_that_are_missing_or_too_old_are_named_before_anything_is_done(
    small: list[str], lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = metadata.version

    def others(name: str) -> str:
        if name == "safetensors":
            raise metadata.PackageNotFoundError(name)
        return "2.1.0+cpu" if name == "torch" else version(name)

    monkeypatch.setattr(metadata, "version", others)
    check_installed.cache_clear()
    done = lmkit(*small, f"run.dir={tmp_path}/run")
    assert done.code == 2, done.err
    assert "torch 2.1.0+cpu is installed, lmkit needs >=2.9" in done.error
    assert "safetensors is not installed, lmkit needs >=0.5" in done.error
    assert done.error.endswith("; pip install 'safetensors<1,>=0.5' 'torch<3,>=2.9'")
    assert not (tmp_path / "run").exists()


def test_row_125_a_clock_that_goes_backwards_changes_no_result_and_no_duration(
    small: list[str], trained: Path, lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [2e9]

    def backwards() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    monkeypatch.setattr(time, "time_ns", lambda: int(backwards() * 1e9))
    done = lmkit(*small, f"run.dir={tmp_path}/run")
    assert done.code == 0, done.err
    assert digests(tmp_path / "run") == digests(trained)
    result = read_result(tmp_path / "run")
    assert result is not None
    assert 0 < result["elapsed_s"] < 1800  # the other clock goes back an hour with each look
    assert all(0 < row["elapsed_s"] < 1800 and row.get("tokens_per_s", 1) > 0 for row in read_metrics(tmp_path / "run"))


SCRIPT_126 = """
import contextlib, io, sys
from lmkit import cli
assert False, "python -O is not on"
run, empty, small = sys.argv[1], sys.argv[2], sys.argv[3:]
print([cli.main(words) for words in (
    [*small, "run.dir=" + run + "/a", "optimizer.lr=-1", "train.batch_size=0"],
    [*small, "run.dir=" + run + "/b", "dataset.path=" + empty],
    ["generate", "run=" + run, "run.checkpoint=latest"],
    ["generate", "run=" + run, "sampling.temperature=nan"],
    [*small, "run.dir=" + run, "resume=true", "model.d_hidden=32"],
    [*small, "run.dir=" + run + "/e", "device=cuda"],
)])
"""


@pytest.mark.slow
def test_row_126_no_check_hangs_on_an_assert(trained: Path, small: list[str], tmp_path: Path) -> None:
    for path in list_checkpoints(trained):
        with (path / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x55")
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-O", "-c", SCRIPT_126, str(trained), str(tmp_path / "empty.txt"), *small],
        capture_output=True, text=True, check=False,
        env={**os.environ, "LMKIT_CACHE": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.stdout == "[2, 3, 4, 2, 4, 6]\n", done.stderr
    assert done.stderr.count("error: ") == 6
    assert "Traceback" not in done.stderr


# Ends of a run


@pytest.mark.parametrize("ending", ["normal", "exception"])
def test_row_16_a_run_waits_for_its_last_save_at_its_end_and_at_an_exception(
    small: list[str], lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    rename, train_step = storage.rename, Trainer.train_step

    def slow(source: Path, target: Path) -> None:
        time.sleep(0.3)
        rename(source, target)

    def fail(self: Trainer, batch: Any) -> Any:
        if ending == "exception" and self.state.step == 5:
            raise MemoryError
        return train_step(self, batch)

    monkeypatch.setattr(storage, "rename", slow)
    monkeypatch.setattr(Trainer, "train_step", fail)
    done = lmkit(*small, f"run.dir={tmp_path}/run")
    assert done.code == (0 if ending == "normal" else 6), done.err
    kept = names(tmp_path / "run")[-1]
    assert kept == "step-000000000012" if ending == "normal" else kept in ("step-000000000004", "step-000000000005")
    assert '"event": "verify"' in (tmp_path / "run" / "journal.jsonl").read_text(encoding="utf-8")


def test_row_15_training_goes_on_while_a_save_is_written_and_does_not_reach_its_bytes(
    small: list[str], lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all, train_step = storage.write_all, Trainer.train_step
    done_steps, steps_while_writing = [0], []

    def counted(self: Trainer, batch: Any) -> Any:
        report = train_step(self, batch)
        done_steps[0] = report.step
        return report

    def slow(descriptor: int, data: bytes | memoryview) -> None:
        before, until = done_steps[0], time.monotonic() + 5
        beside = threading.current_thread() is not threading.main_thread()
        while beside and sum(steps_while_writing) + done_steps[0] - before < 2 and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.02)
        steps_while_writing.append(done_steps[0] - before)
        write_all(descriptor, data)

    assert lmkit(*small, f"run.dir={tmp_path}/quiet", "save.keep=9").code == 0
    monkeypatch.setattr(storage, "write_all", slow)
    monkeypatch.setattr(Trainer, "train_step", counted)
    assert lmkit(*small, f"run.dir={tmp_path}/run", "save.keep=9").code == 0
    assert sum(steps_while_writing) >= 2
    for path in list_checkpoints(tmp_path / "quiet"):
        other = tmp_path / "run" / "checkpoints" / path.name
        for file in ("model.safetensors", "optim.safetensors"):
            assert (path / file).read_bytes() == (other / file).read_bytes()


def test_row_24_a_checkpoint_survives_copying_by_any_tool(
    small: list[str], trained: Path, lmkit: Lmkit, tmp_path: Path
) -> None:
    def as_a_stranger(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime, info.uid, info.gid = 1.0, 12345, 12345
        return info

    with tarfile.open(tmp_path / "run.tar", "w") as archive:
        archive.add(trained, "moved", filter=as_a_stranger)
    with tarfile.open(tmp_path / "run.tar") as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python before 3.11.4 has none
        archive.extractall(tmp_path / "there")
    moved = tmp_path / "there" / "moved"
    assert lmkit("generate", f"run={moved}", "-n", "2", "device=cpu", "device.threads=1").code == 0
    assert lmkit(*small, f"run.dir={moved}", "resume=true", "train.max_steps=14").code == 0
    plain = tmp_path / "plain"
    shutil.copytree(trained, plain, copy_function=shutil.copyfile)
    assert lmkit(*small, f"run.dir={plain}", "resume=true", "train.max_steps=14").code == 0
    assert digests(moved) == digests(plain)
