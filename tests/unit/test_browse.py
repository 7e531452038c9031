"""What can be seen of runs from outside: where they are, what has become of them, and how far they came."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from storing import save_checkpoint

from lmkit.errors import CheckpointError, ConfigError, DivergedError
from lmkit.store import browse
from lmkit.store.browse import (
    Status,
    find_runs,
    is_locked,
    named_run,
    newest_finished_run,
    read_journal,
    read_summary,
    status_of,
)
from lmkit.store.checkpoint import Snapshot
from lmkit.store.found import read_info
from lmkit.store.lock import NoLocksError, acquire
from lmkit.store.runs import Run


def open_run(path: Path, *, resume: bool = False) -> Run:
    run = Run.create(path, root=path.parent, dataset="d", model="m", resume=resume, warn=pytest.fail)
    run.begin(seed=3, command=["lmkit", "pretrain", "model=tiny"], digests={})
    return run


def save(run: Run, step: int, tokenizer: str = "byte") -> None:
    config = {
        "dataset": {"kind": "benchmark", "name": "ptb"},
        "model": {"kind": "recurrent", "cell": "gru"},
        "tokenizer": {"kind": tokenizer},
    }
    save_checkpoint(run, Snapshot(step, {"weight": torch.ones(4, 5)}, {}, {}, config), keep=2)


def finish(run: Run, **result: Any) -> None:
    run.journal("finished", {"step": 1})
    run.write_result(result)


def test_a_run_is_running_exactly_while_its_lock_is_held(tmp_path: Path) -> None:
    with open_run(tmp_path / "a") as run:
        assert status_of(run.path) is Status.running
        assert is_locked(run.path)
    assert status_of(run.path) is Status.crashed
    assert not is_locked(run.path)


def test_two_who_look_at_once_do_not_take_each_other_for_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_run(tmp_path / "a").close()
    looking = acquire(tmp_path / "a")
    monkeypatch.setattr(time, "sleep", lambda seconds: looking.release())
    assert not is_locked(tmp_path / "a")


def test_asking_for_the_status_does_not_take_the_lock_away_nor_keep_it(tmp_path: Path) -> None:
    with open_run(tmp_path / "a") as run:
        status_of(run.path)
        assert is_locked(run.path)
    status_of(run.path)
    open_run(run.path, resume=True).close()


def test_finished_and_stopped_runs_are_told_from_those_that_just_ended(tmp_path: Path) -> None:
    with open_run(tmp_path / "finished") as run:
        finish(run)
    with open_run(tmp_path / "stopped") as run:
        run.journal("stopped", {"signal": "SIGTERM", "step": 1})
    for name in ("stopped before its first step", "stopped by a second signal"):
        with contextlib.suppress(KeyboardInterrupt), open_run(tmp_path / name) as run:
            if name.endswith("signal"):
                save(run, 1)
            raise KeyboardInterrupt
    with open_run(tmp_path / "diverged") as run:
        run.journal("nonfinite", {"step": 5, "policy": "stop"})
    with contextlib.suppress(DivergedError), open_run(tmp_path / "diverged after skips") as run:
        run.journal("nonfinite", {"step": 5, "policy": "skip"})
        raise DivergedError("more batches than train.max_skips were left out")
    with open_run(tmp_path / "crashed") as run:
        run.journal("nonfinite", {"step": 5, "policy": "skip"})
        save(run, 6)
    for path in tmp_path.iterdir():
        assert status_of(path).name == path.name.partition(" ")[0]


def test_a_finished_run_that_had_nothing_more_to_do_is_finished_and_one_that_broke_later_crashed(
    tmp_path: Path,
) -> None:
    with open_run(tmp_path / "a") as run:
        finish(run)
    open_run(run.path, resume=True).close()
    assert status_of(run.path) is Status.finished
    with open_run(run.path, resume=True) as run:
        save(run, 1)
    assert status_of(run.path) is Status.crashed
    with open_run(run.path, resume=True):
        assert status_of(run.path) is Status.running


def test_a_finished_run_stays_finished_after_an_attempt_that_was_refused(tmp_path: Path) -> None:
    with open_run(tmp_path / "a") as run:
        finish(run)
    open_run(run.path, resume=True).close()  # which had nothing to do
    with contextlib.suppress(ConfigError), open_run(run.path, resume=True):
        raise ConfigError("a key that must not change")
    assert read_journal(run.path)[-1]["event"] == "error"
    assert status_of(run.path) is Status.finished
    with contextlib.suppress(KeyboardInterrupt), open_run(run.path, resume=True):
        raise KeyboardInterrupt  # before anything was done
    assert status_of(run.path) is Status.finished


def test_a_run_that_went_on_after_its_end_is_not_finished_until_it_ends_again(tmp_path: Path) -> None:
    with open_run(tmp_path / "a") as run:
        finish(run, step=2)
    assert read_summary(run.path).end["step"] == 2
    with open_run(run.path, resume=True) as run:
        run.journal("data changed", {"from": {}, "to": {}, "first_step": 2, "order": 1})
        run.journal("changed", {"keys": ["train.max_steps: 2 -> 4"]})
        run.journal("environment", {"changed": {"torch": ["2.12.0", "2.13.0"]}})
    assert status_of(run.path) is Status.finished  # killed before it did anything
    with open_run(run.path, resume=True) as run:
        run.log_metrics({"step": 3, "loss": 2.0})
    assert status_of(run.path) is Status.crashed
    with open_run(run.path, resume=True) as run:
        run.journal("finished", {"step": 4})
        save(run, 4)
    assert (status_of(run.path), read_summary(run.path).end) == (Status.crashed, {})  # killed before its result
    with open_run(run.path, resume=True) as run:
        finish(run, step=4)
    assert read_summary(run.path).end["step"] == 4


def test_a_run_that_goes_on_after_its_end_is_not_the_newest_finished_one_until_it_ends_again(tmp_path: Path) -> None:
    for name in ("older", "newer"):
        with open_run(tmp_path / name) as run:
            save(run, 2)
            finish(run, step=2)
    older, newer = tmp_path / "older", tmp_path / "newer"
    assert newest_finished_run(tmp_path) == newer
    with open_run(newer, resume=True) as run:
        assert newest_finished_run(tmp_path) == older  # whatever it saves next takes the place of what it has
        save(run, 3)
    assert newest_finished_run(tmp_path) == older  # broken off
    with open_run(newer, resume=True) as run:
        save(run, 4)
        finish(run, step=4)
    assert newest_finished_run(tmp_path) == newer
    open_run(newer, resume=True).close()  # which had nothing to do
    assert newest_finished_run(tmp_path) == newer


def test_where_locks_cannot_be_asked_the_newest_finished_run_is_one_that_has_done_nothing_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(run_dir: Path) -> bool:
        raise NoLocksError(f"{run_dir} has no locks")

    for name in ("older", "newer"):
        with open_run(tmp_path / name) as run:
            finish(run, step=2)
    monkeypatch.setattr(browse, "is_locked", no_locks)
    with open_run(tmp_path / "newer", resume=True) as run:
        assert status_of(run.path) is Status.unknown
        assert newest_finished_run(tmp_path) == tmp_path / "newer"
        run.log_metrics({"step": 3, "loss": 2.0})
        assert newest_finished_run(tmp_path) == tmp_path / "older"


def test_no_lock_file_is_made_by_looking(tmp_path: Path) -> None:
    with open_run(tmp_path / "a") as run:
        pass
    (run.path / "LOCK").unlink()
    assert status_of(run.path) is Status.crashed
    assert not (run.path / "LOCK").exists()


def test_runs_are_found_in_folders_of_runs_and_not_inside_runs(tmp_path: Path) -> None:
    for name in ("b", "sweep/0", "sweep/1", ".hidden/x", "a/b/c/d/too-deep"):
        (tmp_path / name / "checkpoints" / "step-000000000001").mkdir(parents=True)
    found = [path.relative_to(tmp_path).as_posix() for path in find_runs(tmp_path)]
    assert found == ["b", "sweep/0", "sweep/1"]
    assert list(find_runs(tmp_path / "b")) == [tmp_path / "b"]
    with pytest.raises(CheckpointError, match="nowhere"):
        list(find_runs(tmp_path / "nowhere"))


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_looked_into_hides_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    for name in ("a", "others", "z"):
        with open_run(tmp_path / name) as run:
            finish(run)
    stat = os.stat

    def refused(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if not isinstance(path, int) and Path(path).parent == tmp_path / "others":
            raise OSError(code, os.strerror(code), str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", refused)
    assert [path.name for path in find_runs(tmp_path)] == ["a", "z"]
    assert newest_finished_run(tmp_path).name == "z"
    with pytest.raises(CheckpointError, match=r"cannot read .*run\.json"):
        read_info(tmp_path / "others")  # and not as if there were none


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_an_entry_that_cannot_be_looked_at_hides_no_run(tmp_path: Path) -> None:
    with open_run(tmp_path / "a") as run:
        finish(run)
    (tmp_path / "link").symlink_to(300 * "x")  # more than a name can have
    assert list(find_runs(tmp_path)) == [run.path]


def test_events_of_other_programs_in_a_journal_are_no_error(tmp_path: Path) -> None:
    with open_run(tmp_path / "a") as run:
        pass
    with (run.path / "journal.jsonl").open("a", encoding="utf-8") as journal:
        journal.write('{"event": {"name": "push"}}\n')
    assert status_of(run.path) is Status.crashed


def test_a_name_means_a_path_first_and_then_a_run_in_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/one", "runs/two", "two"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    assert named_run("one") == Path("runs/one")
    assert named_run("runs/one") == Path("runs/one")
    assert named_run("two") == Path("two")
    with pytest.raises(CheckpointError, match="did you mean two"):
        named_run("twoo")
    with pytest.raises(CheckpointError, match="runs is not a run directory"):
        named_run("runs")
    with pytest.raises(CheckpointError, match="no run ''"):
        named_run("")
    with pytest.raises(CheckpointError, match="there is no run 'x"):
        named_run(300 * "x")  # more than a name can have


def test_a_summary_counts_what_a_run_has_reached(tmp_path: Path) -> None:
    with open_run(tmp_path / "a") as run:
        save(run, 4)
        run.log_metrics({"step": 3, "loss": 2.0})
        run.log_metrics({"step": 4, "valid_loss": 2.5})
        run.log_metrics({"step": 5, "valid_loss": math.nan})
        run.log_metrics({"step": 6, "loss": 1.0})
    summary = read_summary(run.path)
    assert (summary.dataset, summary.model, summary.num_parameters) == ("ptb", "gru", 20)
    assert (summary.step, summary.seed, summary.command[-1]) == (6, 3, "model=tiny")
    assert summary.best_valid_loss == 2.5
    assert summary.token_ppl == pytest.approx(math.exp(2.5))
    assert summary.num_bytes == sum(p.stat().st_size for p in run.path.rglob("*") if p.is_file())
    assert summary.last_log is not None


def test_the_best_loss_of_a_run_whose_data_changed_is_one_of_the_present_data(tmp_path: Path) -> None:
    with open_run(tmp_path / "a") as run:
        for step, loss in ((1, 1.0), (2, 3.0), (3, 2.5)):
            run.log_metrics({"step": step, "valid_loss": loss})
        finish(run, step=1, best_valid_loss=1.0)
        assert read_summary(run.path).best_valid_loss == 1.0
        config = {"data_order": {"number": 1, "first_step": 1, "data": "new"}}
        save_checkpoint(run, Snapshot(3, {"weight": torch.ones(2)}, {}, {}, config), keep=2)
    assert read_summary(run.path).best_valid_loss == 2.5


def test_perplexity_per_word_is_known_for_words_and_after_a_whole_validation(tmp_path: Path) -> None:
    with open_run(tmp_path / "bytes") as run:
        save(run, 1)
        run.log_metrics({"step": 1, "valid_loss": 2.0})
        assert read_summary(run.path).word_ppl is None
        finish(run, num_tokens=300, num_words=100, best_valid_loss=2.0)
    assert read_summary(run.path).word_ppl == pytest.approx(math.exp(6.0))
    with open_run(tmp_path / "words") as run:
        save(run, 1, tokenizer="word")
        run.log_metrics({"step": 1, "valid_loss": 2.0})
    assert read_summary(run.path).word_ppl == pytest.approx(math.exp(2.0))


def test_an_empty_or_damaged_run_has_a_summary_with_less_in_it(tmp_path: Path) -> None:
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    summary = read_summary(tmp_path / "empty")
    assert (summary.step, summary.model, summary.last_log, summary.num_bytes) == (None, None, None, 0)
    with open_run(tmp_path / "damaged") as run:
        save(run, 4)
        finish(run)
    for path in run.path.rglob("*"):
        if path.is_file() and path.name != "LOCK":
            path.write_bytes(b'{"torn')
    summary = read_summary(run.path)
    assert (summary.step, summary.model, summary.command) == (None, None, [])
    (run.path / "run.json").write_text('{"command": 5, "seed": "x"}', encoding="utf-8")
    (run.path / "result.json").write_text('{"num_words": "x", "num_parameters": [], "dataset": {}}', encoding="utf-8")
    assert read_summary(run.path).command == []
