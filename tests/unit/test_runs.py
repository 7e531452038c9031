"""Run directories: named, locked, resumed, logged and found again."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from storing import save_checkpoint

from lmkit.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LmkitError,
    ResourceError,
    RunLockedError,
    StoppedError,
)
from lmkit.store import lock, records, runs, storage
from lmkit.store.browse import newest_finished_run, read_journal
from lmkit.store.checkpoint import Snapshot
from lmkit.store.found import FoundRun, open_run, read_info, read_metrics, read_result
from lmkit.store.runs import Run


def create(root: Path, directory: str | Path | None = None, *, resume: bool = False, warn: Any = pytest.fail) -> Run:
    return Run.create(directory, root=root, dataset="ptb", model="lstm", resume=resume, warn=warn)


def begin(run: Run, **changes: Any) -> None:
    run.begin(**({"seed": 1, "command": ["pretrain"], "digests": {"data": "d1"}} | changes))


def save(run: Run, step: int = 1) -> Path:
    return save_checkpoint(run, Snapshot(step, {"w": torch.ones(2)}, {}, {}, {}), keep=9)


def test_runs_started_in_the_same_second_get_different_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Frozen(runs.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return runs.datetime(2026, 1, 2, 3, 4, 5, tzinfo=tz)

    monkeypatch.setattr(runs, "datetime", Frozen)
    names = []
    for _ in range(3):
        with create(tmp_path / "runs") as run:
            names.append(run.path.name)
    assert names == ["20260102-030405-ptb-lstm", "20260102-030405-ptb-lstm-2", "20260102-030405-ptb-lstm-3"]


def test_names_from_data_cannot_leave_the_root(tmp_path: Path) -> None:
    with Run.create(None, root=tmp_path, dataset="../../x\n;rm", model="", resume=False, warn=pytest.fail) as run:
        assert run.path.parent == tmp_path
        assert run.path.name.endswith("-x_rm-x")


def test_a_directory_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x", encoding="utf-8")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="not empty" if not resume else "not a run directory"):
            create(tmp_path, tmp_path, resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_not_a_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="is a file"):
        create(tmp_path, tmp_path / "file")


def test_an_existing_run_needs_resume(tmp_path: Path) -> None:
    with create(tmp_path, tmp_path / "run") as run:
        begin(run)
        first = run.run_id
    with pytest.raises(ConfigError, match="resume=true"):
        create(tmp_path, tmp_path / "run")
    with create(tmp_path, tmp_path / "run", resume=True) as run:
        begin(run)
        assert run.run_id == first


def test_resume_starts_a_run_where_there_is_nothing_yet(tmp_path: Path) -> None:
    with create(tmp_path, tmp_path / "new" / "run", resume=True) as run:
        begin(run)
        assert (run.path / "run.json").exists()


def test_resume_needs_to_know_which_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.dir=DIR"):
        create(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 2}, "this changed: seed: 1 -> 2;"),
        ({"digests": {"data": "d2"}}, "this changed: data: d1 -> d2;"),
        ({"digests": {}}, "this changed: data: d1 -> null;"),
    ],
)
def test_resuming_with_other_data_or_seed_is_refused_with_both_values(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with create(tmp_path, tmp_path / "run") as run:
        begin(run)
    with create(tmp_path, tmp_path / "run", resume=True) as run:
        begin(run, command=["pretrain", "train.max_steps=9"])
        with pytest.raises(ConfigError, match=said):
            begin(run, **changes)


def test_a_second_user_of_the_run_is_refused_with_the_holder(tmp_path: Path) -> None:
    with create(tmp_path, tmp_path / "run"):
        for resume in (False, True):
            with pytest.raises(RunLockedError, match=f"process {os.getpid()} on .*, started 20"):
                create(tmp_path, tmp_path / "run", resume=resume)
    create(tmp_path, tmp_path / "run", resume=True).close()


def test_a_run_begins_although_somebody_looks_at_its_lock_just_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "LOOK_S", 60.0)
    create(tmp_path, tmp_path / "run").close()
    looking = lock.acquire(tmp_path / "run")
    after_a_moment = threading.Timer(0.1, looking.release)
    after_a_moment.start()
    try:
        create(tmp_path, tmp_path / "run", resume=True).close()
    finally:
        after_a_moment.join()


@pytest.mark.skipif(sys.platform == "win32", reason="directories are not synced there")
def test_a_file_system_that_syncs_files_only_will_do_and_a_sync_that_fails_will_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(code: int) -> None:
        def sync(descriptor: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", sync)

    refused(errno.EINVAL)
    storage.sync_directory(tmp_path)
    refused(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        storage.sync_directory(tmp_path)


@pytest.mark.parametrize("given", [True, False])
def test_row_10_all_directories_that_a_run_makes_are_synced(
    given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    sync_directory = storage.sync_directory

    def noted(path: Path) -> None:
        synced.append(path)
        sync_directory(path)

    monkeypatch.setattr(storage, "sync_directory", noted)
    root = tmp_path / "a" / "b"
    create(root, root / "run" if given else None).close()
    for folder in (tmp_path, tmp_path / "a", root):
        assert folder in synced


HOLD = """
import sys
from lmkit.store.runs import Run
run = Run.create(sys.argv[1], root=".", dataset="d", model="m", resume=True, warn=print)
print("locked", flush=True)
sys.stdin.read()
"""


def test_the_lock_excludes_another_process_and_dies_with_it(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == b"locked"
        with pytest.raises(RunLockedError, match=f"process {holder.pid}"):
            create(tmp_path, tmp_path / "run", resume=True)
    finally:
        holder.kill()
        holder.communicate()
    create(tmp_path, tmp_path / "run", resume=True).close()


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights on Windows")
def test_a_lock_file_that_is_a_link_is_refused_and_its_target_untouched(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious", encoding="utf-8")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "LOCK").symlink_to(victim)
    with pytest.raises(ResourceError, match="LOCK is a symbolic link"):
        create(tmp_path, tmp_path / "run", resume=True)
    assert victim.read_text(encoding="utf-8") == "precious"


def test_a_directory_that_cannot_be_written_is_an_early_error_and_frees_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> int:
        raise OSError(30, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(storage, "create_file", fail)
        with pytest.raises(ResourceError, match=r"cannot write in .*run: Read-only file system"):
            create(tmp_path, tmp_path / "run")
    create(tmp_path, tmp_path / "run").close()


def test_what_a_killed_process_left_is_swept_at_the_next_start(tmp_path: Path) -> None:
    with create(tmp_path, tmp_path / "run") as run:
        begin(run)
        save(run)
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in (".tmp-step-000000000002-1-a", ".trash-step-000000000000-1-a"):
        (checkpoints / name / "tokenizer").mkdir(parents=True)
        (checkpoints / name / "tokenizer" / "tokenizer.json").write_text("{", encoding="utf-8")
    (tmp_path / "run" / ".tmp-result.json-1-a").write_text("{", encoding="utf-8")
    create(tmp_path, tmp_path / "run", resume=True).close()
    assert [p.name for p in checkpoints.iterdir()] == ["step-000000000001"]
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".tmp-")]


def test_metrics_keep_nan_and_infinity(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        run.log_metrics({"step": 1, "loss": math.nan, "ppl": math.inf, "low": -math.inf, "lr": 0.1})
        row = read_metrics(run.path)[0]
        raw = (run.path / "metrics.jsonl").read_text(encoding="utf-8")
    assert math.isnan(row["loss"])
    assert (row["ppl"], row["low"], row["lr"], row["step"]) == (math.inf, -math.inf, 0.1, 1)
    assert json.loads(raw, parse_constant=pytest.fail)["loss"] == "NaN"


def test_resuming_cuts_metrics_back_to_the_checkpoint_and_keeps_the_tail(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        for step in range(1, 8):
            run.log_metrics({"step": step, "loss": step / 10})
        with (run.path / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 8, "lo')
        run.cut_metrics(5)
        run.log_metrics({"step": 6, "loss": 0.66})
        assert [row["step"] for row in read_metrics(run.path)] == [1, 2, 3, 4, 5, 6]
        old = (run.path / "metrics.jsonl.old").read_text(encoding="utf-8").splitlines()
    assert [line[:10] for line in old] == ['{"step": 6', '{"step": 7', '{"step": 8']


def test_the_row_of_a_validation_that_the_checkpoint_does_not_know_of_is_cut(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        for step in (1, 2):
            run.log_metrics({"step": step, "loss": 0.5})
            run.log_metrics({"step": step, "valid_loss": 0.6})
        run.cut_metrics(2)
        assert len(read_metrics(run.path)) == 4
        run.cut_metrics(2, validated=False)
        assert read_metrics(run.path)[2:] == [{"step": 2, "loss": 0.5}]


def test_a_line_that_another_thread_writes_meanwhile_leaves_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = records.LineFile(tmp_path / "f", pytest.fail)
    write = os.write
    written: list[bytes] = []

    def write_after_another(descriptor: int, data: bytes) -> int:
        written.append(data)
        if len(written) == 1:
            file.append({"other": 1})
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", write_after_another)
    file.append({"own": 1})
    file.close()
    assert (tmp_path / "f").read_text() == '{"other": 1}\n{"own": 1}\n'


def test_a_torn_last_line_is_cut_even_if_no_step_is(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        run.log_metrics({"step": 1})
        with (run.path / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 2')
        run.cut_metrics(9)
        run.log_metrics({"step": 2})
        assert (run.path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def journal(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """The events of a run, each with what it says beside time and process."""
    rows = read_journal(run.path)
    return [(row.pop("event"), {key: row[key] for key in row if key not in ("time", "pid")}) for row in rows]


def test_an_error_that_ends_a_run_is_the_last_line_of_its_journal(tmp_path: Path) -> None:
    problem = DataError("valid.tokens is damaged\nin two lines", "prepare it again")
    with pytest.raises(DataError) as caught, create(tmp_path) as run:  # noqa: PT012
        begin(run)
        raise problem
    assert caught.value is problem
    message = "valid.tokens is damaged\nin two lines; prepare it again"
    assert journal(run)[1:] == [("error", {"code": 3, "message": message})]


@pytest.mark.parametrize("error", [None, StoppedError("stopped by SIGTERM"), KeyboardInterrupt(), ValueError("a bug")])
def test_stops_and_what_is_no_error_for_people_leave_no_error_in_the_journal(
    tmp_path: Path, error: BaseException | None
) -> None:
    with contextlib.suppress(StoppedError, KeyboardInterrupt, ValueError), create(tmp_path) as run:
        begin(run)
        if error is not None:
            raise error
    ended = ["interrupted"] if isinstance(error, KeyboardInterrupt) else []
    assert [event for event, _ in journal(run)] == ["start", *ended]


@pytest.mark.parametrize("why", ["disk full", "read only", "nobody reads the warning"])
def test_an_error_is_not_hidden_by_a_journal_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    warnings: list[str] = []

    def warn(text: str) -> None:
        warnings.append(text)
        if why.startswith("nobody"):
            raise BrokenPipeError

    def fail(*_: Any) -> int:
        number = errno.EROFS if why == "read only" else errno.ENOSPC
        raise OSError(number, os.strerror(number))

    with pytest.raises(ConfigError, match="wrong"), create(tmp_path, warn=warn) as run:  # noqa: PT012
        if why == "read only":
            monkeypatch.setattr(storage, "open_to_append", fail)
        else:
            monkeypatch.setattr(records.os, "write", fail)
        raise ConfigError("wrong")
    monkeypatch.undo()
    assert len(warnings) == 1
    create(tmp_path, run.path, resume=True).close()  # the lock is free


def test_a_full_disk_for_the_log_is_one_warning_and_later_lines_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    write = os.write
    with create(tmp_path, warn=warnings.append) as run:
        run.log_metrics({"step": 1})
        with monkeypatch.context() as patch:
            patch.setattr(records.os, "write", lambda fd, data: write(fd, data[:6]))
            run.log_metrics({"step": 2})
            run.log_metrics({"step": 3})
        run.log_metrics({"step": 4})
        assert [row["step"] for row in read_metrics(run.path)] == [1, 4]
    assert len(warnings) == 1
    assert "metrics.jsonl" in warnings[0]
    assert "disk is full" in warnings[0]


def test_a_line_that_a_full_disk_has_torn_does_not_swallow_the_first_one_of_the_next_session(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        begin(run)
    with (run.path / "journal.jsonl").open("ab") as file:
        file.write(b'{"event": "error", "mess')
    with create(tmp_path, run.path, resume=True) as run:
        begin(run)
    assert [row["event"] for row in records.read_rows(run.path / "journal.jsonl")] == ["start", "resume"]
    assert (run.path / "journal.jsonl").read_bytes().count(b"\n") == 3


def test_the_journal_is_on_the_disk_before_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def sync_file(descriptor: int) -> None:
        name = "journal" if os.path.samestat(os.fstat(descriptor), (run.path / "journal.jsonl").stat()) else "another"
        synced.append(name)
        raise OSError(5, "Input/output error")

    with create(tmp_path) as run:
        run.journal("finished")
        monkeypatch.setattr(storage, "sync_file", sync_file)
        with pytest.raises(ResourceError):
            run.write_result({})
    assert synced == ["journal", "another"]


def test_the_result_is_read_back_with_its_status(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        assert read_result(run.path) is None
        run.write_result({"word_ppl": 99.5, "nats": math.inf})
        result = read_result(run.path)
    assert result is not None
    assert (result["status"], result["word_ppl"], result["nats"]) == ("finished", 99.5, math.inf)


def test_a_value_that_utf8_lacks_is_written_and_read_back(tmp_path: Path) -> None:
    value = {"path": "é caf\udce9 \\udce9"}
    (tmp_path / "a.json").write_bytes(records.to_json(value))
    assert records.read_object(tmp_path / "a.json") == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [('{"a": 1, "a": 2}', r"is not valid JSON \(duplicate key\)"), ("[]", "must hold a JSON object, found list")],
)
def test_a_damaged_result_or_run_json_is_an_error_that_names_the_file_and_the_remedy(
    tmp_path: Path, text: str, problem: str
) -> None:
    for name, read in (("result.json", read_result), ("run.json", read_info)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match=rf"{name} {problem}; remove it: a run that goes on writes it anew$"):
            read(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("digests", "abc"), ("former_data", {"a": 1})])
def test_run_json_with_another_kind_of_value_is_an_error_that_names_file_and_key(
    tmp_path: Path, key: str, value: object
) -> None:
    with create(tmp_path, tmp_path / "run") as run:
        begin(run)
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), key: value}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"run\.json is damaged: {key} must be a JSON"):
        create(tmp_path, tmp_path / "run", resume=True)


def test_the_newest_finished_run_is_the_one_that_ended_last(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        with create(tmp_path, tmp_path / name) as run:
            begin(run)
            if name != "c":
                run.write_result({})
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    assert newest_finished_run(tmp_path) == tmp_path / "a"


def test_without_a_finished_run_the_error_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no finished run in .*missing; train one with lmkit pretrain"):
        newest_finished_run(tmp_path / "missing")
    with create(tmp_path, tmp_path / "r") as run:
        begin(run)
    with pytest.raises(CheckpointError, match=r"\(1 unfinished\)"):
        newest_finished_run(tmp_path)


def test_a_run_is_opened_by_its_path_or_that_of_its_checkpoint(tmp_path: Path) -> None:
    with create(tmp_path, tmp_path / "run") as run:
        begin(run)
        with pytest.raises(CheckpointError, match="no checkpoint yet"):
            open_run(run.path)
        checkpoint = save(run)
    assert open_run(run.path) == FoundRun(run.path)
    assert open_run(checkpoint) == FoundRun(run.path, checkpoint)


@pytest.mark.parametrize(
    ("name", "message"), [("missing", "does not exist"), ("file", "not a directory"), ("", "not a run")]
)
def test_opening_what_is_not_a_run_says_what_it_is(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        open_run(tmp_path / name)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_of_many_simultaneous_starts_exactly_one_runs(tmp_path: Path) -> None:
    go_read, go_write = os.pipe()
    children = []
    for _ in range(12):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(go_write)
                os.read(go_read, 1)  # returns for all at once, when the parent closes its end
                with create(tmp_path, tmp_path / "run", resume=True, warn=print):  # held: a run that is dropped unlocks
                    code = 0
                    signal.pause()
            except LmkitError as error:
                code = error.exit_code
            finally:
                os._exit(code)
        children.append(pid)
    os.close(go_read)
    os.close(go_write)
    codes = []
    for _ in range(11):
        _, status = os.wait()
        codes.append(os.waitstatus_to_exitcode(status))
    assert codes == [5] * 11
    ended = set()
    for pid in children:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            ended.add(pid)
    assert len(ended) == 11
