"""Several processes at one run directory or cache: one works, the others say so, and nothing is mixed.

Numbers in names (row_40 ...) are the rows of the project's fault table.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from children import Child, environment
from harness import Lmkit, Start, digests

from lmkit import plots
from lmkit.commands import training
from lmkit.store import storage
from lmkit.store.browse import read_journal
from lmkit.store.lock import acquire

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="locks by flock")


def slow_down(seconds: float) -> None:
    """Make every write of this child take so long."""
    write_all = storage.write_all

    def slow(descriptor: int, data: bytes | memoryview) -> None:
        time.sleep(seconds)
        write_all(descriptor, data)

    storage.write_all = slow


def wait_for(text: str, child: Child) -> None:
    until = time.monotonic() + 300
    while text not in child.text:
        assert child.process.is_alive(), child.text
        assert time.monotonic() < until, child.text
        time.sleep(0.01)


def test_row_40_a_second_trainer_on_a_run_is_refused_with_its_holder_and_the_first_is_not_disturbed(
    small: list[str], trained: Path, start: Start, lmkit: Lmkit, tmp_path: Path
) -> None:
    first = start(*small, f"run.dir={tmp_path}/run", setup=[partial(slow_down, 0.06)])
    wait_for("step 4 ", first)
    second = lmkit(*small, f"run.dir={tmp_path}/run", "resume=true")
    assert second.code == 5, second.err
    assert f"process {first.pid} on " in second.error
    assert "started 2" in second.error
    third = lmkit(*small, f"run.dir={tmp_path}/run")
    assert third.code in (2, 5), third.err  # that the directory is not empty is reason enough
    assert first.wait() == 0, first.text
    assert digests(tmp_path / "run") == digests(trained)


def test_row_41_the_lock_of_a_killed_holder_is_free_at_once(
    small: list[str], trained: Path, start: Start, lmkit: Lmkit, tmp_path: Path
) -> None:
    holder = start(*small, f"run.dir={tmp_path}/run", setup=[partial(slow_down, 0.2)])
    wait_for("step 4 ", holder)
    holder.send(signal.SIGKILL)
    assert holder.wait() == -signal.SIGKILL
    done = lmkit(*small, f"run.dir={tmp_path}/run", "resume=true")
    assert done.code == 0, done.err
    assert digests(tmp_path / "run") == digests(trained)


def test_row_42_of_several_starts_at_once_one_runs(
    small: list[str], trained: Path, start: Start, tmp_path: Path
) -> None:
    starts = [start(*small, f"run.dir={tmp_path}/run", setup=[partial(slow_down, 0.05)]) for _ in range(5)]
    codes = sorted(child.wait() for child in starts)
    assert codes.count(0) == 1, codes
    assert set(codes) <= {0, 2, 5}, codes  # locked, or not empty any more
    assert digests(tmp_path / "run") == digests(trained)


def test_row_43_runs_without_a_name_that_start_together_do_not_meet(
    small: list[str], trained: Path, start: Start, tmp_path: Path
) -> None:
    runs = [start(*small, f"run.root={tmp_path}/runs") for _ in range(3)]
    assert [child.wait() for child in runs] == [0, 0, 0], [child.text for child in runs]
    made = sorted((tmp_path / "runs").iterdir())
    assert len(made) == 3
    assert all(digests(path) == digests(trained) for path in made)


def test_row_45_preparations_of_the_same_and_of_other_data_share_a_cache(start: Start, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("a line of the text\n" * 60_000, encoding="utf-8")
    setup = [environment(LMKIT_CACHE=str(tmp_path / "cache"))]
    kinds = ["byte", "byte", "char", "byte"]
    children = [
        start("prepare", "dataset=text", f"dataset.path={text}", f"tokenizer={kind}", setup=setup) for kind in kinds
    ]
    assert [child.wait() for child in children] == [0, 0, 0, 0], [child.text for child in children]
    assert len(list((tmp_path / "cache" / "prepared").iterdir())) == 2


@posix_only
@pytest.mark.parametrize(
    "what",
    [
        "LOCK", "LOCK.info", "checkpoints", "run.json", "metrics.jsonl", "metrics.jsonl.old", "journal.jsonl",
        "loss.png",
    ],
)  # fmt: skip
def test_row_47_a_link_in_place_of_a_runs_file_leaves_its_target_alone(
    small: list[str], lmkit: Lmkit, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious\n", encoding="utf-8")
    with (trained / "metrics.jsonl").open("ab") as metrics:
        metrics.write(b'{"step": 99}\n')  # goes to metrics.jsonl.old
    path = trained / what
    if what == "checkpoints":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(victim)
    else:
        path.unlink(missing_ok=True)
        path.symlink_to(victim)
    if what == "loss.png":
        monkeypatch.setattr(training, "plot_run", plots.plot_run)
    done = lmkit(*small, f"run.dir={trained}", "resume=true", "train.max_steps=14")
    assert done.code in (0, 4, 6), done.err
    assert victim.read_text(encoding="utf-8") == "precious\n"
    if done.code:
        assert str(trained) in done.error
    if what.startswith("metrics"):
        assert f"cannot write {path}: is a symbolic link; remove the link" in done.error


@posix_only
@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EIO"])
def test_row_48_a_file_system_without_locks_is_refused_before_anything_is_written(
    small: list[str], lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    import fcntl

    number = getattr(errno, code)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    monkeypatch.setenv("LMKIT_CACHE", str(tmp_path / "cache"))
    done = lmkit(*small, f"run.dir={tmp_path}/run")
    assert done.code == 6, done.err
    assert str(tmp_path / "cache") in done.error
    assert ("without locks" in done.error) == (code != "EIO")
    assert not (tmp_path / "run").exists()


def lock_nothing_in(folder: Path, error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every attempt to lock a file in this folder fail."""
    import fcntl

    flock = fcntl.flock

    def fail(descriptor: int, operation: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(folder)):
            raise error
        flock(descriptor, operation)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("looks into /proc")
    monkeypatch.setattr(fcntl, "flock", fail)


def no_locks(code: str) -> OSError:
    number = getattr(errno, code)
    return OSError(number, os.strerror(number))


@posix_only
@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EIO"])
def test_row_48_a_run_directory_without_locks_is_refused(
    small: list[str], trained: Path, lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    lock_nothing_in(tmp_path, no_locks(code), monkeypatch)
    done = lmkit(*small, f"run.dir={tmp_path}/run")
    assert done.code == 6, done.err
    assert f"{tmp_path}/run" in done.error
    assert ("without locks" in done.error) == (code != "EIO")
    assert ("run.lock=off" in done.error) == (code != "EIO")
    assert not (tmp_path / "run" / "checkpoints").exists()


@posix_only
@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_row_48_with_the_lock_off_a_run_trains_and_goes_on_without_one_and_says_so(
    small: list[str], trained: Path, lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    lock_nothing_in(tmp_path, no_locks(code), monkeypatch)
    words = [*small, f"run.dir={tmp_path}/run", "run.lock=off"]
    for more in ([], ["resume=true"]):
        done = lmkit(*words, *more)
        assert done.code == 0, done.err
        warnings = [line for line in done.err.splitlines() if line.startswith("warning: ")]
        assert warnings == [
            f"warning: {tmp_path}/run is on a file system without locks: nothing keeps a second process out of the run"
        ]
    assert digests(tmp_path / "run") == digests(trained)
    events = [event["event"] for event in read_journal(tmp_path / "run")]
    assert (events[:2], events.count("no lock")) == (["no lock", "start"], 2)
    refused = lmkit(*small, f"run.dir={tmp_path}/run", "resume=true")  # only where it is asked for
    assert refused.code == 6, refused.err


@posix_only
def test_row_48_with_the_lock_off_it_is_taken_where_there_are_locks_and_other_errors_count(
    small: list[str], trained: Path, lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*small, f"run.dir={trained}", "resume=true", "run.lock=off"]
    holder = acquire(trained)
    done = lmkit(*words)
    assert done.code == 5, done.err
    holder.release()
    done = lmkit(*words)
    assert done.code == 0, done.err
    assert "warning" not in done.err
    lock_nothing_in(tmp_path, no_locks("EIO"), monkeypatch)
    done = lmkit(*words)
    assert done.code == 6, done.err
    assert "without locks" not in done.error
