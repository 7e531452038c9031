"""Checkpoints under kills, damage and full disks: the old one or the new one, whole, or a clear refusal.

Numbers in names (row_19 ...) are the rows of the project's fault table.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import io
import json
import math
import os
import random
import shutil
import signal
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import FailPoint, Lmkit, Start, digests, forge, half_then_kill, in_child, kill
from snapshots import assert_is_snapshot, save, snapshot
from storing import ByteTokenizer, open_run, save_checkpoint

from lmkit import pages, tokenizers
from lmkit.config.training import ExistingRunConfig
from lmkit.console import Console
from lmkit.errors import CheckpointError, ResourceError
from lmkit.loading import read_run
from lmkit.store import checkpoint_writer, manifest, reading, staging, storage
from lmkit.store.checkpoint import (
    Snapshot,
    best_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_latest,
)
from lmkit.store.checkpoint_writer import CheckpointWriter
from lmkit.store.found import open_run as found_open_run
from lmkit.store.manifest import verify_checkpoint
from lmkit.store.runs import Run

needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
FILES = [
    "MANIFEST.json", "model.safetensors", "optim.safetensors", "state.json", "config.json", "tokenizer/tokenizer.json",
]  # fmt: skip
NO_FIT = "does not fit the tensor table of its manifest"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 1 and 2, to be copied and damaged."""
    path = tmp_path_factory.mktemp("faults") / "run"
    with open_run(path) as made:
        made.begin(seed=1, command=["pretrain"], digests={})
        save(made, 1, 4.0)
        save(made, 2, 3.0)
    return path


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    """A fresh copy of ``whole``; tests damage its step 2."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step-000000000002"


# Killed during the protocol


def primitives_of_third_save(run_dir: Path) -> list[str]:
    with pytest.MonkeyPatch.context() as patch, open_run(run_dir, resume=True) as run:
        point = FailPoint(patch, None, kill)
        save(run, 3, 5.0, keep=1)
    return point.calls


@needs_fork
@pytest.mark.parametrize("action", [kill, half_then_kill])
def test_rows_1_to_10_killed_at_every_storage_operation_the_old_or_the_new_checkpoint_is_there(
    whole: Path, tmp_path: Path, action: Callable[[str, tuple[Any, ...]], None]
) -> None:
    calls = primitives_of_third_save(Path(shutil.copytree(whole, tmp_path / "count")))
    assert {"write_all", "sync_file", "sync_directory", "rename", "remove_file"} <= set(calls)
    commit = calls.index("rename")
    for at in range(len(calls)):
        if action is half_then_kill and calls[at] != "write_all":
            continue
        run_dir = Path(shutil.copytree(whole, tmp_path / f"run{at}"))

        def work(at: int = at, run_dir: Path = run_dir) -> None:
            run = open_run(run_dir, resume=True, warn=print)
            with pytest.MonkeyPatch.context() as patch:
                FailPoint(patch, at, action)
                save(run, 3, 5.0, keep=1)

        assert in_child(work) == -signal.SIGKILL
        path = latest_checkpoint(run_dir, pytest.fail)
        assert path is not None
        assert path.name == ("step-000000000002" if at <= commit else "step-000000000003")
        for checkpoint in list_checkpoints(run_dir):
            assert_is_snapshot(checkpoint)
        best = best_checkpoint(run_dir, pytest.fail)
        assert best is not None
        assert best.name == "step-000000000002"  # retention never touches the best one
        with open_run(run_dir, resume=True) as run:  # the lock is free and the remains are swept
            save(run, 3, 5.0, keep=1)
        assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step-000000000002", "step-000000000003"]
        shutil.rmtree(run_dir)


def save_killed(run_dir: Path, at: int, loss: float | None) -> bool:
    """Save step 2 in a child, killed at the storage operation of this number; False: there are not so many."""

    def work() -> None:
        run = open_run(run_dir, resume=True, warn=print)
        with pytest.MonkeyPatch.context() as patch:
            FailPoint(patch, at, kill)
            save(run, 2, loss)

    code = in_child(work)
    assert code in (0, -signal.SIGKILL)
    return code != 0


@needs_fork
def test_row_9_killed_while_replacing_a_damaged_checkpoint_of_the_same_step(whole: Path, tmp_path: Path) -> None:
    warnings: list[str] = []
    killed, at = True, 0
    while killed:
        run_dir = Path(shutil.copytree(whole, tmp_path / f"run{at}"))
        (newest(run_dir) / "state.json").write_text("{}", encoding="utf-8")
        killed = save_killed(run_dir, at, 3.0)
        path = latest_checkpoint(run_dir, warnings.append)
        assert path is not None
        assert_is_snapshot(path)
        shutil.rmtree(run_dir)
        at += 1
    assert at > 21
    assert path.name == "step-000000000002"


@needs_fork
def test_row_9_killed_while_the_only_checkpoint_is_replaced_one_of_the_two_is_there_after_the_next_start(
    tmp_path: Path,
) -> None:
    with open_run(tmp_path / "only") as made:
        made.begin(seed=1, command=["pretrain"], digests={})
        save(made, 2)  # a stop before the evaluation was done; afterwards the same step is saved with its loss
    losses = set()
    killed, at = True, 0
    while killed:
        run_dir = Path(shutil.copytree(tmp_path / "only", tmp_path / f"run{at}"))
        killed = save_killed(run_dir, at, 3.0)
        with open_run(run_dir, resume=True) as run:
            path = latest_checkpoint(run_dir, pytest.fail)
            assert path is not None
            assert_is_snapshot(path)
            losses.add(load_checkpoint(path, with_optimizer=False).state["valid_nats_per_token"])
            assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step-000000000002"]
        shutil.rmtree(run_dir)
        at += 1
    assert at > 21
    assert losses == {None, 3.0}


# Storage errors


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("primitive", ["make_directory", "create_file", "write_all", "sync_file", "rename"])
def test_rows_13_28_30_36_a_save_that_fails_names_the_path_and_leaves_the_older_one_and_no_litter(
    run: Run, monkeypatch: pytest.MonkeyPatch, primitive: str, code: int
) -> None:
    save(run, 1)

    def fail(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(storage, primitive, fail)
        with pytest.raises(
            ResourceError, match=r"cannot save checkpoint .*step-000000000002 \(.* MB needed, .* MB free"
        ):
            save(run, 2)
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step-000000000001"]
    assert save(run, 2).name == "step-000000000002"


def test_row_28_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CheckpointWriter(run, ByteTokenizer(), keep=1, warn=print) as writer:
        monkeypatch.setattr(storage, "free_bytes", lambda path: 1_000_000)
        monkeypatch.setattr(storage, "make_directory", lambda path: pytest.fail("started to write"))
        writer.submit(snapshot(1))
        with pytest.raises(
            ResourceError, match=r"not enough free disk space; free some disk space, or lower save\.keep"
        ) as refused:
            writer.wait()
        assert "(1.1 MB needed, 1.0 MB free)" in str(refused.value)


def test_rows_12_14_an_io_error_is_retried_once_in_a_new_directory_and_then_raised_at_the_next_call(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[str] = []
    failures: list[bool] = []
    real_make, real_sync = storage.make_directory, storage.sync_file

    def make(path: Path) -> None:
        if path.name.startswith(".tmp-step"):
            attempts.append(path.name)
        real_make(path)

    def sync(descriptor: int) -> None:
        if failures and failures.pop(0):
            raise OSError(errno.EIO, "Input/output error")
        real_sync(descriptor)

    monkeypatch.setattr(storage, "make_directory", make)
    with CheckpointWriter(run, ByteTokenizer(), keep=2, warn=pytest.fail) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(storage, "sync_file", sync)
            failures[:] = [True]
            writer.submit(snapshot(1))
            writer.wait()
            assert len(set(attempts)) == 2
            failures[:] = [True, True]
            writer.submit(snapshot(2))
            with pytest.raises(ResourceError, match="Input/output error"):
                writer.submit(snapshot(3))
        writer.submit(snapshot(4))
    assert [p.name for p in list_checkpoints(run.path)] == ["step-000000000001", "step-000000000004"]


def test_a_save_that_does_not_read_back_is_an_error_and_retires_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, 1, keep=1)
    rename = storage.rename

    def rename_and_damage(source: Path, target: Path) -> None:
        rename(source, target)
        (target / "model.safetensors").write_bytes(bytes((target / "model.safetensors").stat().st_size))

    with monkeypatch.context() as patch:
        patch.setattr(storage, "rename", rename_and_damage)
        with pytest.raises(CheckpointError, match=r"step-000000000002.model\.safetensors is damaged"):
            save(run, 2, keep=1)
    warnings: list[str] = []
    path = latest_checkpoint(run.path, warnings.append)
    assert path is not None
    assert path.name == "step-000000000001"
    assert len(warnings) == 1


def test_row_33_no_memory_for_the_copy_is_a_clear_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with CheckpointWriter(run, ByteTokenizer(), keep=1, warn=print) as writer, monkeypatch.context() as patch:
        patch.setattr(staging.torch, "empty", fail)
        with pytest.raises(ResourceError, match=r"no memory \(0\.0 MB\) to copy weight"):
            writer.submit(snapshot(1))


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
def test_row_36_two_hundred_saves_leak_no_descriptors_and_no_threads_even_if_some_fail(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync_file, syncs = storage.sync_file, 0

    def fail_some(descriptor: int) -> None:
        """Each 37th time there are no descriptors left: in turn in each of a save's files."""
        nonlocal syncs
        syncs += 1
        if syncs % 37 == 0:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        sync_file(descriptor)

    def opened() -> tuple[list[str], int]:
        return sorted(os.listdir("/proc/self/fd")), threading.active_count()

    monkeypatch.setattr(storage, "sync_file", fail_some)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # what a disk takes to sync is not what is counted here
    failed = 0
    gc.collect()  # what other tests have left open is closed now and not in between
    before = opened()
    with CheckpointWriter(run, ByteTokenizer(), keep=2, warn=pytest.fail) as writer:
        writer.submit(snapshot(1))
        writer.wait()
        within = opened()
        for step in range(2, 202):
            writer.submit(snapshot(step))
            try:
                writer.wait()
            except ResourceError as error:
                failed += "raise the limit of open files (ulimit -n)" in str(error)
            assert opened() == within, step
    assert opened() == before
    assert failed > 20
    assert len(list_checkpoints(run.path)) == 2


# Damage at rest


def assert_refused(run_dir: Path, message: str) -> None:
    """Step 2 is refused with ``message``, and resuming falls back to step 1 and says so."""
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(newest(run_dir), with_optimizer=True)
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(newest(run_dir))
    warnings: list[str] = []
    found = load_latest(run_dir, warnings.append)
    assert found is not None
    assert found[1].step == 1
    assert len(warnings) == 1
    assert "step-000000000002" in warnings[0]


@pytest.mark.parametrize("file", FILES)
def test_row_19_every_flipped_bit_is_detected_and_the_file_named(damaged: Path, file: str) -> None:
    path = newest(damaged) / file
    good = path.read_bytes()
    rng = random.Random(file)
    for _ in range(35):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=path.name.replace(".", r"\.")):
            load_checkpoint(newest(damaged), with_optimizer=True)
        with pytest.raises(CheckpointError, match=path.name.replace(".", r"\.")):
            verify_checkpoint(newest(damaged))
    assert_refused(damaged, path.name)


@pytest.mark.skipif(sys.platform != "linux", reason="O_DIRECT is Linux's")
def test_row_19_a_flipped_bit_is_detected_by_whoever_reads_past_the_cache(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 4096)
    made = snapshot(1)
    made.optimizer["weight/momentum"] = torch.arange(20_000, dtype=torch.float32)
    path = save_checkpoint(run, made, keep=1)
    file = path / "optim.safetensors"
    for offset in range(1000, file.stat().st_size, 7001):
        with file.open("r+b") as opened:
            byte = os.pread(opened.fileno(), 1, offset)[0]
            for value in (byte ^ 16, byte):
                os.pwrite(opened.fileno(), bytes([value]), offset)
                os.fsync(opened.fileno())
                storage.drop_cache(opened)
                if value == byte:
                    loaded = load_checkpoint(path, with_optimizer=True)
                    assert torch.equal(loaded.optimizer["weight/momentum"], made.optimizer["weight/momentum"])
                    verify_checkpoint(path, from_disk=True)
                    continue
                with pytest.raises(CheckpointError, match=r"optim\.safetensors is damaged"):
                    load_checkpoint(path, with_optimizer=True)
                with pytest.raises(CheckpointError, match=r"optim\.safetensors is damaged"):
                    verify_checkpoint(path, from_disk=True)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "change",
    [lambda b: b[:-1], lambda b: b + b"\n", lambda b: b"", lambda b: bytes(len(b)), lambda b: b[: len(b) // 2]],
    ids=["shorter", "longer", "empty", "zeros", "half"],
)
def test_row_20_truncated_extended_and_zeroed_files_are_detected(
    damaged: Path, file: str, change: Callable[[bytes], bytes]
) -> None:
    path = newest(damaged) / file
    path.write_bytes(change(path.read_bytes()))
    assert_refused(damaged, path.name)


@pytest.mark.parametrize("file", FILES)
def test_row_21_a_missing_file_is_detected(damaged: Path, file: str) -> None:
    (newest(damaged) / file).unlink()
    assert_refused(damaged, f"{Path(file).name} is missing")


def test_row_21_a_renamed_checkpoint_an_empty_one_and_a_lone_manifest_are_detected(damaged: Path) -> None:
    folder = damaged / "checkpoints"
    newest(damaged).rename(folder / "step-000000000007")
    (folder / "step-000000000008").mkdir()
    (folder / "step-000000000009").mkdir()
    shutil.copy(folder / "step-000000000007" / "MANIFEST.json", folder / "step-000000000009")
    warnings: list[str] = []
    path = latest_checkpoint(damaged, warnings.append)
    assert path is not None
    assert path.name == "step-000000000001"
    assert len(warnings) == 3


def test_row_21_an_extra_file_is_never_read(damaged: Path) -> None:
    (newest(damaged) / "model-2.safetensors").write_bytes(b"not ours")
    (newest(damaged) / "tokenizer" / ".DS_Store").write_bytes(b"not ours")
    assert load_checkpoint(newest(damaged), with_optimizer=True).step == 2


def reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest as an attacker would: with a right digest of itself."""
    data = json.loads(path.read_bytes())
    change(data)
    data.pop("self", None)
    data["self"] = hashlib.sha256(manifest.canonical_json(data)).hexdigest()
    path.write_bytes(manifest.canonical_json(data))


BAD_PATHS = [
    "../state.json", "/etc/passwd", "tokenizer/../../x", "tokenizer\\x", "C:x", "a/b", "MANIFEST.json", ".hidden",
    "tokenizer/", "", "x" * 300, "state.json\x00", "tokenizer/a\n", "model.pt", "STATE.JSON",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_PATHS)
def test_rows_22_81_paths_that_are_not_a_checkpoints_own_are_refused_before_any_file_is_opened(
    damaged: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    reseal(
        newest(damaged) / "MANIFEST.json",
        lambda data: data["files"].append({"path": name, "bytes": 1, "sha256": "0" * 64}),
    )
    opened: list[str] = []
    open_regular = storage.open_regular
    monkeypatch.setattr(storage, "open_regular", lambda path: opened.append(path.name) or open_regular(path))
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json is malformed"):
        load_checkpoint(newest(damaged), with_optimizer=True)
    assert opened == ["MANIFEST.json"]


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.pop(key)


def put(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(version=0), "unknown format version 0"),
        (put(version=True), "unknown format version True"),
        (put(version="1"), "unknown format version '1'"),
        (put(format="other"), "is not the manifest of an lmkit checkpoint"),
        (put(surprise=1), "does not match its own SHA-256"),
        (put(step=-1), "malformed"),
        (put(step=2.0), "malformed"),
        (put(step=10**30), "holds step"),
        (put(files={}), "malformed"),
        (put(files=[]), "malformed"),
        (put(files=[1]), "malformed"),
        (put(files=7), "malformed"),
        (put(tensors=[]), "malformed"),
        (put(tensors={}), "malformed"),
        (put(tensors={"model.safetensors": [], "optim.safetensors": {}}), "malformed"),
        (put(aliases={"other.safetensors": {"a": "b"}}), "malformed"),
        (put(aliases={"model.safetensors": {"a": "not there"}}), "malformed"),
        (put(digests={"config": 1}), "malformed"),
        (drop("environment"), "malformed"),
        (drop("files"), "malformed"),
        (lambda data: data["files"][0].update(extra=1), "does not match its own SHA-256"),
        (lambda data: data["files"].append(data["files"][0]), "listed twice"),
        (lambda data: data["files"].pop(2), "not listed: state.json"),
        (lambda data: data["files"][0].update(sha256="x"), "malformed"),
        (lambda data: data["files"][0].update(bytes=True), "malformed"),
    ],
)
def test_rows_22_68_75_76_a_manifest_that_this_version_would_not_write_is_refused(
    damaged: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    reseal(newest(damaged) / "MANIFEST.json", change)
    assert_refused(damaged, message)


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b"null", b'"lmkit-checkpoint"', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 100_000,
        b'{"format": "lmkit-checkpoint", "format": "lmkit-checkpoint"}', b'{"step": NaN}', b'{"step": -Infinity}',
        b"\x00" * 1000, b"\x80\x04\x95canary.",
    ],
    ids=range(13),
)  # fmt: skip
def test_row_22_a_manifest_that_is_not_strict_json_is_refused(damaged: Path, raw: bytes) -> None:
    (newest(damaged) / "MANIFEST.json").write_bytes(raw)
    assert_refused(damaged, r"MANIFEST\.json")


def test_row_22_a_huge_manifest_is_refused_unread(damaged: Path) -> None:
    with (newest(damaged) / "MANIFEST.json").open("r+b") as file:
        file.truncate(10 << 30)  # sparse
    assert_refused(damaged, "larger than")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"weight": "F32[20,20]", "bias": "F32[21]"}, NO_FIT),
        ({"weight": "F32[400]", "bias": "F32[20]"}, NO_FIT),
        ({"weight": "I32[20,20]", "bias": "F32[20]"}, NO_FIT),
        ({"weight": "F32[20,20]", "bias": "F32[20]", "empty": "F32[0]"}, NO_FIT),
        ({"weight": "F32[999999999999,999999999999]", "bias": "F32[20]"}, "tensor 'weight' is too large"),
        ({"weight": "F32[20,-20]", "bias": "F32[20]"}, "unknown type"),
        ({"weight": "C64[20,20]", "bias": "F32[20]"}, "unknown type"),
        ({"__metadata__": "F32[20,20]", "bias": "F32[20]"}, "name '__metadata__' is not allowed"),
        ({"we\x00ight": "F32[20,20]", "bias": "F32[20]"}, "is not allowed"),
        ({"w" * 100_000: "F32[20,20]", "bias": "F32[20]"}, "w' is not allowed"),
        ({f"t{i}": "F32[1]" for i in range(100_000)}, "more than"),
    ],
    ids=range(11),
)
def test_row_85_a_tensor_table_that_does_not_fit_the_file_is_refused_before_allocation(
    damaged: Path, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, str], said: str
) -> None:
    reseal(newest(damaged) / "MANIFEST.json", lambda data: data["tensors"].update({"model.safetensors": tensors}))
    monkeypatch.setattr(torch, "empty", lambda *args, **options: pytest.fail("allocated"))
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(newest(damaged), with_optimizer=False)


def test_row_26_weights_that_are_not_finite_are_refused_unless_allowed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = snapshot(1)
    bad.model["bias"][3] = float("nan")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "first_nonfinite", lambda tensors: None)
        path = save_checkpoint(run, bad, keep=1)
    with pytest.raises(CheckpointError, match="bias holds NaN or infinity"):
        load_checkpoint(path, with_optimizer=False)
    assert load_checkpoint(path, with_optimizer=False, allow_nonfinite=True).model["bias"][3].isnan()


DEVICE = ["device=cpu", "device.threads=1"]
QUICK = ["checks=false", "baselines=false", "bootstrap=0", *DEVICE]


def poison(checkpoint: Path, value: float, row: int = 97) -> None:
    """Put a value into a row of the embeddings (by default that of the letter a), as a crafted checkpoint would."""
    data = bytearray((checkpoint / "model.safetensors").read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:end])["embedding.weight"]
    assert entry["dtype"] == "F32"
    place = end + entry["data_offsets"][0] + 4 * row * entry["shape"][1]
    data[place : place + 4] = struct.pack("<f", value)
    forge(checkpoint, "model.safetensors", bytes(data))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_row_26_no_command_uses_weights_that_are_not_finite_unless_told_to(
    trained: Path, small: list[str], lmkit: Lmkit, tmp_path: Path, value: float
) -> None:
    for path in list_checkpoints(trained):
        poison(path, value)
    newest = list_checkpoints(trained)[-1]
    look = [["eval-ppl", *QUICK], ["generate", "-n", "3", *DEVICE]]
    named = [[f"run={trained}"], [f"run={trained}", "run.checkpoint=latest"], [f"run={newest}"]]
    for command in [*look, ["finetune", *small[1:3], *DEVICE]]:
        for words in named:
            done = lmkit(*command, *words)
            assert done.code == 4, done.err
            assert "model.safetensors: embedding.weight holds NaN or infinity; use an earlier checkpoint" in done.error
            assert "run.allow_nonfinite=true" in done.error
            assert done.out == ""
    for command, codes in zip(look, [{7}, {7} if math.isnan(value) else {0, 7}], strict=True):
        done = lmkit(*command, *named[2], "run.allow_nonfinite=true")
        assert done.code in codes, done.err  # the letter a is in the text that is scored, and need not be drawn
        assert done.code == 0 or "not finite" in done.error


def test_row_26_what_is_computed_without_the_weights_that_are_not_finite_can_be_seen(
    small: list[str], lmkit: Lmkit, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert lmkit(*small, "model.tie_embeddings=false", f"run.dir={run_dir}").code == 0
    newest = list_checkpoints(run_dir)[-1]
    commands = [
        ["eval-ppl", f"run={newest}", f"output={tmp_path}/numbers.json", *QUICK],
        ["generate", f"run={newest}", "-n", "5", "--prompt", "the", "sampling.temperature=0", *DEVICE],
    ]

    def looked(*more: str) -> tuple[float, str]:
        done = [lmkit(*command, *more) for command in commands]
        assert [one.code for one in done] == [0, 0], [one.err for one in done]
        return json.loads((tmp_path / "numbers.json").read_bytes())["nats"], done[1].out

    before = looked()
    poison(newest, math.nan, row=255)  # of a byte that is in no UTF-8 text
    assert [lmkit(*command).code for command in commands] == [4, 4]
    assert looked("run.allow_nonfinite=true") == before


def test_row_26_resuming_takes_an_earlier_checkpoint_or_none_and_cannot_be_told_otherwise(
    trained: Path, small: list[str], lmkit: Lmkit
) -> None:
    usual, resume = digests(trained), [*small, f"run.dir={trained}", "resume=true"]
    (trained / "result.json").unlink()
    newest = list_checkpoints(trained)[-1]
    poison(newest, math.nan)
    done = lmkit(*resume, "run.allow_nonfinite=true")
    assert done.code == 2, done.err
    done = lmkit(*resume)
    assert done.code == 0, done.err
    assert f"{newest.name}: {newest}/model.safetensors: embedding.weight holds NaN or infinity" in done.err
    assert "using step-000000000008" in done.err
    assert digests(trained) == usual

    (trained / "result.json").unlink()
    for path in list_checkpoints(trained):
        poison(path, math.inf)
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("checkpoints/**/*")}
    done = lmkit(*resume)
    assert done.code == 4, done.err
    assert done.error.startswith(f"every checkpoint of {trained} is damaged")
    assert done.error.count("embedding.weight holds NaN or infinity") == len(list_checkpoints(trained)) > 1
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("checkpoints/**/*")} == before


def test_row_23_if_all_are_damaged_each_is_listed_and_nothing_starts_from_scratch(damaged: Path) -> None:
    for path in list_checkpoints(damaged):
        (path / "state.json").unlink()
    for find in (latest_checkpoint, best_checkpoint, load_latest):
        with pytest.raises(CheckpointError, match=r"step-000000000002: .* is missing.*step-000000000001: ") as caught:
            find(damaged, pytest.fail)
        assert caught.value.exit_code == 4


def test_row_25_neither_times_nor_the_clock_decide_which_checkpoint_is_newest(damaged: Path) -> None:
    os.utime(newest(damaged), (0, 0))
    path = latest_checkpoint(damaged, pytest.fail)
    assert path is not None
    assert path.name == "step-000000000002"


def test_row_27_a_read_error_falls_back(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_regular = storage.open_regular

    def fail(path: Path) -> Any:
        if path == newest(damaged) / "model.safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return open_regular(path)

    monkeypatch.setattr(storage, "open_regular", fail)
    assert_refused(damaged, r"cannot read .*model\.safetensors: Input/output error")


@pytest.mark.skipif(sys.platform != "linux", reason="O_DIRECT is Linux's")
def test_no_memory_for_a_checkpoint_does_not_make_it_a_damaged_one(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(reading, "PIECE_BYTES", 512)
    monkeypatch.setattr(reading, "_is_cached", lambda *args: False)
    monkeypatch.setattr(reading, "_open_direct", lambda file: os.fdopen(os.dup(file.fileno()), "rb", 0))
    assert load_latest(damaged, pytest.fail) is not None
    monkeypatch.setattr(pages.mmap, "mmap", refuse)
    with pytest.raises(MemoryError, match=r"the system gives no .* MB of memory"):
        load_latest(damaged, pytest.fail)


def test_a_damaged_best_checkpoint_gives_the_next_best_and_says_so(damaged: Path) -> None:
    warnings: list[str] = []
    (newest(damaged) / "model.safetensors").write_bytes(b"")
    path = best_checkpoint(damaged, warnings.append)
    assert path is not None
    assert path.name == "step-000000000001"
    assert len(warnings) == 1


def test_damaged_checkpoints_do_not_count_for_retention_and_stay(damaged: Path) -> None:
    (newest(damaged) / "model.safetensors").write_bytes(b"")
    warnings: list[str] = []
    with (
        open_run(damaged, resume=True) as run,
        CheckpointWriter(run, ByteTokenizer(), keep=2, warn=warnings.append) as writer,
    ):
        for step in (3, 4, 5):
            writer.submit(snapshot(step))
    names = [int(p.name[5:]) for p in list_checkpoints(damaged)]
    assert names == [1, 2, 4, 5]  # 1: the best of the whole ones, 2: damaged
    assert len(warnings) == 1


def put_in_place(path: Path, kind: str, aside: Path) -> Path:
    """Move a file aside, and put a link to it, a pipe or a folder where it was; returns where it is."""
    good = path.rename(aside)
    if kind == "link":
        path.symlink_to(good)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    return good


@needs_fork
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_row_91_links_pipes_and_folders_in_place_of_files_are_refused(damaged: Path, file: str, kind: str) -> None:
    path = newest(damaged) / file
    put_in_place(path, kind, damaged / "elsewhere")
    assert_refused(damaged, path.name)


@needs_fork
def test_row_91_a_linked_tokenizer_folder_is_refused(damaged: Path) -> None:
    folder = (newest(damaged) / "tokenizer").rename(damaged / "elsewhere")
    (newest(damaged) / "tokenizer").symlink_to(folder)
    assert_refused(damaged, "symbolic link")


@needs_fork
@pytest.mark.parametrize("name", ["metrics.jsonl", "journal.jsonl"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_row_91_links_pipes_and_folders_in_place_of_logs_are_not_read_and_hang_nothing(
    trained: Path, small: list[str], lmkit: Lmkit, name: str, kind: str
) -> None:
    path = trained / name
    good = put_in_place(path, kind, trained / "elsewhere")
    before = good.read_bytes()
    codes = {"metrics.jsonl": (0, 4, 6), "journal.jsonl": (0, 0, 0)}[name]
    resume = [*small, f"run.dir={trained}", "resume=true", "train.max_steps=14"]
    for words, code in zip((["runs", "ls", trained], ["runs", "show", trained], resume), codes, strict=True):
        done = lmkit(*words)
        assert done.code == code, done.err
        assert code == 0 or str(path) in done.error
    assert name != "journal.jsonl" or f"cannot write {path}" in done.err
    assert good.read_bytes() == before


def test_row_44_a_checkpoint_that_is_retired_while_it_is_read_is_a_clear_error(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_manifest = manifest.read_manifest

    def retire_then_return(path: Path) -> Any:
        found = read_manifest(path)
        storage.discard(path)
        return found

    monkeypatch.setattr("lmkit.store.checkpoint.read_manifest", retire_then_return)
    with pytest.raises(CheckpointError, match="missing; it may have been retired"):
        load_checkpoint(newest(damaged), with_optimizer=True)
    assert [p.name for p in (damaged / "checkpoints").iterdir()] == ["step-000000000001"]


def test_row_44_if_all_that_were_listed_are_retired_meanwhile_that_is_no_damage(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def retired(path: Path) -> Any:
        storage.discard(path)
        return verify_checkpoint(path)

    monkeypatch.setattr("lmkit.store.checkpoint.verify_checkpoint", retired)
    with pytest.raises(CheckpointError, match="was retired by its run while it was read; try again"):
        latest_checkpoint(damaged, pytest.fail)


def test_row_44_a_run_is_opened_though_all_that_were_listed_are_retired_meanwhile(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = Path.glob

    def stale(folder: Path, pattern: str) -> Iterator[Path]:
        found = list(listed(folder, pattern))
        for path in found:
            path.rename(path.with_name(path.name.replace("000", "001", 1)))  # other ones have come instead
        return iter(found)

    monkeypatch.setattr(Path, "glob", stale)
    assert found_open_run(damaged).path == damaged


@pytest.mark.parametrize("which", ["best", "latest", "step-000000000008"])
@pytest.mark.parametrize("command", [["generate", "-n", "5", *DEVICE], ["eval-ppl", *QUICK]], ids=["generate", "eval"])
def test_row_44_at_whichever_file_a_checkpoint_is_retired_its_reader_has_all_of_it_or_says_so(
    trained: Path, lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], which: str
) -> None:
    folder, spare = trained / "checkpoints", tmp_path / "spare"
    shutil.copytree(folder, spare)
    words = [*command, f"run={trained}"]

    def untimed(out: str) -> str:
        return "".join(line for line in out.splitlines() if "tokens/s" not in line)

    whole = {untimed(lmkit(*words, f"run.checkpoint={path.name}").out) for path in list_checkpoints(trained)}
    assert "" not in whole
    opened: list[Path] = []
    retire_at: int | None = None

    def retiring(real: Callable[[Path], Any]) -> Callable[[Path], Any]:
        """``real``, before which the checkpoint is retired that it would read a file of."""

        def call(path: Path) -> Any:
            if path.is_relative_to(folder):
                opened.append(path)
                if len(opened) - 1 == retire_at:
                    storage.discard(folder / path.relative_to(folder).parts[0])
            return real(path)

        return call

    monkeypatch.setattr(storage, "open_regular", retiring(storage.open_regular))
    monkeypatch.setattr(tokenizers, "read_bytes", retiring(tokenizers.read_bytes))
    assert lmkit(*words, f"run.checkpoint={which}").code == 0
    num_files, codes = len(opened), set()
    assert num_files >= len(FILES) - 1  # the optimizer's is not read
    for number in range(num_files):
        opened.clear()
        retire_at = number
        done = lmkit(*words, f"run.checkpoint={which}")
        codes.add(done.code)
        if done.code == 0:
            assert untimed(done.out) in whole, number
            assert "damaged" not in done.err
        else:
            assert done.code == 4, done.err
            assert "retired by its run" in done.error
            assert done.out == ""
        shutil.rmtree(folder)
        shutil.copytree(spare, folder)
    assert 4 in codes


def marked(step: int, config: dict[str, Any]) -> Snapshot:
    """A state every part of which tells its step."""
    weights = torch.full((200, 100), float(step))
    return Snapshot(
        step=step,
        model={"weight": weights, "bias": weights[0] + 1},
        optimizer={"weight/momentum": weights * 2},
        state={"valid_nats_per_token": 1 / step if step % 3 else 9.0, "tokens": step * 1000},
        config=config,
    )


def read_in_a_loop(run_dir: Path, num_reads: int, num_steps: int) -> None:
    """Read the newest, the best and the oldest checkpoint of a run in turn, as eval-ppl and generate do.

    At least so many times, and until so many steps were seen. Raises if one was neither whole nor known to be retired.
    """
    reads, seen = 0, set()
    while reads < num_reads or len(seen) < num_steps:
        which = ["latest", "best", list_checkpoints(run_dir)[0].name][reads % 3]
        reads += 1
        try:
            stored = read_run(ExistingRunConfig(path=str(run_dir), checkpoint=which), Console(io.StringIO()))
            again = load_checkpoint(stored.checkpoint, with_optimizer=True)
        except CheckpointError as error:
            # or it was gone from the list before its name could be looked up there
            if "retired by its run" not in str(error) and f"run.checkpoint={which!r} is not in" not in str(error):
                raise
            continue
        step = again.step
        if step <= 12:
            continue  # of the training before
        check_marked(stored.snapshot, step, stored.config)
        check_marked(again, step, stored.config)
        seen.add(step)


def check_marked(found: Snapshot, step: int, config: dict[str, Any]) -> None:
    """Raise ValueError unless everything that was read is what ``marked`` gives."""
    expected = marked(step, config)
    optimizer = expected.optimizer if found.optimizer else {}
    for ours, theirs in ((found.model, expected.model), (found.optimizer, optimizer)):
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
            raise ValueError(f"the tensors of step {step} are mixed")
    if (found.step, found.state, found.config) != (step, expected.state, config):
        raise ValueError(f"step {step} is mixed with {found.step}: {found.state}, {found.config}")


def test_row_44_readers_beside_a_run_that_retires_checkpoints_never_see_mixed_ones(trained: Path, start: Start) -> None:
    config = load_checkpoint(list_checkpoints(trained)[-1], with_optimizer=False).config
    tokenizer = tokenizers.load_tokenizer(list_checkpoints(trained)[-1] / "tokenizer")
    with (
        open_run(trained, resume=True) as run,
        CheckpointWriter(run, tokenizer, keep=2, warn=pytest.fail) as writer,
    ):
        readers = [start("--version", setup=[partial(read_in_a_loop, trained, 60, 8)]) for _ in range(2)]
        for step in range(13, 100_000):
            writer.submit(marked(step, config))
            if not any(reader.process.is_alive() for reader in readers):
                break
    assert [reader.wait() for reader in readers] == [0, 0], [reader.text for reader in readers]
    assert len(list_checkpoints(trained)) <= 4


def test_row_94_no_secret_of_the_environment_is_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "hunter2-secret")
    path = save(run, 1)
    files = [*path.rglob("*"), *run.path.iterdir()]
    assert not [p for p in files if p.is_file() and b"hunter2" in p.read_bytes()]
