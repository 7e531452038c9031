"""lmkit runs on real run directories: what it prints, what it changes, and how it ends."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from storing import ByteTokenizer, open_run, save_checkpoint
from torch import Tensor

from lmkit import cli
from lmkit.commands import runs as runs_command
from lmkit.commands import runs_resume
from lmkit.config.runs import LEAST_STEPS
from lmkit.errors import CheckpointError
from lmkit.store import storage
from lmkit.store.browse import is_locked
from lmkit.store.checkpoint import Snapshot, list_checkpoints
from lmkit.store.checkpoint_writer import CheckpointWriter
from lmkit.store.lock import NoLocksError

CONFIG = {
    "command": "pretrain",
    "dataset": {"kind": "text", "path": "notes"},
    "model": {"kind": "recurrent", "cell": "lstm", "d_hidden": 32},
    "optimizer": {"kind": "adamw", "lr": 0.002},
    "run": {"dir": "x"},
    "seed": 1,
    "train": {"batch_size": 4, "budget": None},
}


def snapshot(step: int, config: dict[str, Any] = CONFIG, loss: float | None = None) -> Snapshot:
    weights = torch.arange(50.0) + step
    state = {"step": step, "elapsed_s": step * 0.1, "valid_nats_per_token": loss}
    return Snapshot(step, {"head.weight": weights}, {"optimizer/head.weight/exp_avg": weights * 0.5}, state, config)


def make_run(name: str, *, config: dict[str, Any] = CONFIG, finished: bool = True, seed: int = 1) -> Path:
    """A run in runs/ with the checkpoints of steps 10 and 20, the first the best."""
    path = Path("runs") / name
    with open_run(path) as run:
        run.begin(seed=seed, command=["lmkit", "pretrain", f"run.dir=runs/{name}"], digests={"data": "d" * 64})
        with CheckpointWriter(run, ByteTokenizer(), keep=2, warn=pytest.fail) as writer:
            for step, loss in ((10, 2.0), (20, 3.0)):
                run.log_metrics({"step": step, "loss": 2.5, "tokens_per_s": 1000.0})
                run.log_metrics({"step": step, "valid_loss": loss})
                writer.submit(snapshot(step, config, loss))
        if finished:
            run.journal("finished", {"step": 20})
            numbers = {"num_tokens": 200, "num_words": 100, "best_valid_loss": 2.0, "word_ppl": 403.4}
            run.write_result({"dataset": "text", "num_parameters": 50, **numbers})
    return path


Lmkit = Callable[..., int]


@pytest.fixture
def lmkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lmkit:
    monkeypatch.chdir(tmp_path)
    return lambda *words: cli.main(["runs", *words])


Output = pytest.CaptureFixture[str]


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


# ls


def test_ls_is_a_table_of_the_runs_the_newest_last(lmkit: Lmkit, capsys: Output) -> None:
    make_run("zebra")
    make_run("sweep/0", finished=False)
    assert lmkit("ls") == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == [
        "name",
        "dataset",
        "model",
        "step",
        "status",
        "best",
        "valid",
        "ppl",
        "last",
        "log",
        "size",
    ]
    assert re.fullmatch(
        r"zebra +text +lstm 50 +20 +finished +54\.60 per word +\d{4}-\d\d-\d\d \d\d:\d\d +\d.* kB", first
    )
    assert re.match(r"sweep/0 +text +lstm 50 +20 +crashed +7\.3891 per token ", second)


def test_ls_json_says_the_same_for_programs(lmkit: Lmkit, capsys: Output) -> None:
    make_run("a")
    make_run("b", finished=False)
    assert lmkit("ls", "runs", "--json") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["name"], first["status"], first["step"]) == ("a", "finished", 20)
    assert first["best_valid_ppl_per_word"] == pytest.approx(54.598, abs=0.001)
    assert second["best_valid_ppl_per_word"] is None
    assert second["best_valid_ppl_per_token"] == pytest.approx(7.389, abs=0.001)
    assert Path(first["path"]) == Path("runs/a").absolute()


def test_ls_shows_a_run_as_running_while_it_is_locked(lmkit: Lmkit, capsys: Output) -> None:
    path = make_run("a")
    with open_run(path, resume=True) as run:
        run.begin(seed=1, command=["lmkit"], digests={"data": "d" * 64})
        lmkit("ls")
        assert " running " in capsys.readouterr().out


def test_ls_without_runs_says_so_and_a_wrong_folder_is_an_error(lmkit: Lmkit, capsys: Output) -> None:
    assert lmkit("ls") == 0
    assert capsys.readouterr() == ("", "no runs in runs: lmkit pretrain makes one\n")
    assert lmkit("ls", "--json") == 0
    assert capsys.readouterr() == ("", "")
    assert lmkit("ls", "nowhere") == 4
    assert capsys.readouterr().err.startswith("error: cannot read nowhere: ")


# show and diff


def test_show_tells_what_a_run_is_and_which_checkpoints_it_has(lmkit: Lmkit, capsys: Output) -> None:
    path = make_run("a")
    assert lmkit("pin", "a", "step=20") == 0
    (path / "checkpoints" / "step-000000000010" / "config.json").unlink()
    capsys.readouterr()
    assert lmkit("show", "a") == 0
    shown = capsys.readouterr().out
    for part in (
        "finished at step 20",
        "lmkit pretrain run.dir=runs/a",
        "d" * 64,
        "recurrent: cell=lstm d_hidden=32",
        "adamw: lr=0.002",
        "word_ppl 403.4",
    ):
        assert part in shown, part
    assert re.search(r"^ +10 +- +2\.0000 +DAMAGED: config\.json is missing +best$", shown, re.MULTILINE)
    assert re.search(r"^ +20 +\d\.\d kB +3\.0000 +when saved +pinned$", shown, re.MULTILINE)


def test_show_works_for_a_run_that_has_nothing_yet_or_is_damaged(lmkit: Lmkit, capsys: Output) -> None:
    (Path("runs") / "empty" / "checkpoints").mkdir(parents=True)
    assert lmkit("show", "empty") == 0
    assert "none yet" in capsys.readouterr().out
    path = make_run("a")
    for file in path.rglob("*"):
        if file.is_file() and file.name != "LOCK":
            file.write_bytes(b'{"torn')
    assert lmkit("show", "a") == 0
    assert "DAMAGED" in capsys.readouterr().out


def test_diff_shows_what_differs_in_two_columns_and_nothing_else(lmkit: Lmkit, capsys: Output) -> None:
    make_run("a")
    other = {**CONFIG, "optimizer": {"kind": "sgd", "lr": 0.002, "momentum": 0.9}, "run": {"dir": "y"}, "seed": 2}
    make_run("b", config=other, seed=2)
    assert lmkit("diff", "a", "b") == 0
    shown = capsys.readouterr().out
    assert [re.split("  +", line) for line in shown.splitlines()] == [
        ["configuration", "runs/a", "runs/b"],
        ["optimizer.kind", "adamw", "sgd"],
        ["optimizer.momentum", "-", "0.9"],
        ["seed", "1", "2"],
        [""],
        ["numbers: the same"],
    ]
    assert lmkit("diff", "a", "a") == 0
    assert capsys.readouterr().out == "configuration: the same\n\nnumbers: the same\n"


# verify


def test_verify_is_content_with_whole_runs_and_with_litter(lmkit: Lmkit, capsys: Output) -> None:
    path = make_run("a")
    (path / "checkpoints" / ".tmp-step-000000000030-1-ab").mkdir()
    assert lmkit("verify", "a") == 0
    shown, err = capsys.readouterr()
    assert shown.count("  whole ") == 2
    assert ".tmp-step-000000000030-1-ab (left by a killed process" in shown
    assert "metrics.jsonl: 4 rows" in shown
    assert err == ""


def test_verify_names_each_damaged_file_of_each_run_and_ends_with_4(lmkit: Lmkit, capsys: Output) -> None:
    a, b, _ = make_run("a"), make_run("b"), make_run("c")
    damage(a / "checkpoints" / "step-000000000010" / "model.safetensors")
    (a / "checkpoints" / "step-000000000020" / "state.json").unlink()
    damage(b / "checkpoints" / "step-000000000020" / "optim.safetensors")
    assert lmkit("verify", "a", "b", "c") == 4
    shown, err = capsys.readouterr()
    damaged = [line.split()[1:4] for line in shown.splitlines() if "DAMAGED" in line]
    assert damaged == [
        ["step-000000000010", "model.safetensors", "is"],
        ["step-000000000020", "state.json", "is"],
        ["step-000000000020", "optim.safetensors", "is"],
    ]
    assert "runs/a: 2 of 2 checkpoints damaged" in err.replace(os.sep, "/")
    assert "runs/b: 1 of 2 checkpoints damaged" in err.replace(os.sep, "/")
    assert "runs/c" not in err.replace(os.sep, "/")
    assert err.count("\n") == 1


def test_verify_takes_a_checkpoint_and_does_not_call_nothing_whole(lmkit: Lmkit, capsys: Output) -> None:
    path = make_run("a") / "checkpoints" / "step-000000000010"
    assert lmkit("verify", str(path)) == 0
    damage(path / "config.json")
    assert lmkit("verify", str(path)) == 4
    assert lmkit("verify", "a") == 4
    (Path("runs") / "empty" / "checkpoints").mkdir(parents=True)
    capsys.readouterr()
    assert lmkit("verify", "empty") == 4
    assert "has no checkpoint" in capsys.readouterr().err


# pin and rm


def test_a_pinned_checkpoint_outlives_newer_ones_until_it_is_unpinned(lmkit: Lmkit, capsys: Output) -> None:
    path = make_run("a")

    def go_on(*steps: int) -> list[str]:
        with open_run(path, resume=True) as run:
            for step in steps:
                save_checkpoint(run, snapshot(step, loss=9.0), keep=1)
        return [p.name[-2:] for p in list_checkpoints(path)]

    assert lmkit("pin", "a", "step=20") == 0
    assert go_on(30, 40) == ["10", "20", "40"]
    assert lmkit("unpin", "a", "step=20") == 0
    assert go_on(50) == ["10", "50"]
    capsys.readouterr()
    for words, problem in (
        (["pin", "a", "step=20"], "no checkpoint of step 20; it has step=10, step=50"),
        (["unpin", "a", "step=20"], "step 20 of runs/a is not pinned"),
    ):
        assert lmkit(*words) == 4
        assert problem in capsys.readouterr().err.replace(os.sep, "/")
    assert lmkit("pin", "a", "20") == 2
    assert capsys.readouterr().err == "error: '20' is not a step; write step=K, as in step=1000\n"


@pytest.mark.parametrize(("answer", "removed"), [("y\n", True), ("YES\n", True), ("n\n", False), ("\n", False)])
def test_rm_asks_and_takes_only_yes_for_an_answer(
    lmkit: Lmkit, capsys: Output, monkeypatch: pytest.MonkeyPatch, answer: str, removed: bool
) -> None:
    a, b = make_run("a"), make_run("b")
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    assert lmkit("rm", "a") == 0
    assert a.exists() is not removed
    assert b.exists()
    err = capsys.readouterr().err
    assert "lstm 50 on text, finished, step 20, " in err
    assert "remove it for good? [y/N] " in err
    assert sorted(p.name for p in Path("runs").iterdir()) == (["b"] if removed else ["a", "b"])


def test_rm_without_anybody_to_ask_removes_nothing_unless_told_so(
    lmkit: Lmkit, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = make_run("a"), make_run("b")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert lmkit("rm", "a") == 2
    assert "add --yes" in capsys.readouterr().err
    assert a.exists()
    assert lmkit("rm", "--yes", "a", "runs/b", "a") == 0
    assert not a.exists()
    assert not b.exists()
    assert list(Path("runs").iterdir()) == []


def test_rm_refuses_a_run_in_use_and_then_removes_nothing(lmkit: Lmkit, capsys: Output) -> None:
    a, b = make_run("a"), make_run("b")
    with open_run(b, resume=True):
        assert lmkit("rm", "--yes", "a", "b") == 5
    assert f"in use by process {os.getpid()} " in capsys.readouterr().err
    assert a.exists()
    assert b.exists()
    assert lmkit("rm", "--yes", "a", "b") == 0


def test_rm_lets_go_of_the_lock_before_its_file_which_a_network_would_keep_while_it_is_open(
    lmkit: Lmkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("a")
    remove_file, held = storage.remove_file, list[bool]()

    def noted(path: Path) -> None:
        if path.name == "LOCK":
            held.append(is_locked(path.parent))
        remove_file(path)

    monkeypatch.setattr(storage, "remove_file", noted)
    assert lmkit("rm", "--yes", "a") == 0
    assert held == [False]
    assert list(Path("runs").iterdir()) == []


def test_rm_where_there_are_no_locks_says_how_to_do_without(
    lmkit: Lmkit, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = make_run("a")

    def none(path: Path, patience_s: float) -> None:
        raise NoLocksError(f"{path} is on a file system without locks", "train without one: run.lock=off")

    monkeypatch.setattr(runs_command, "acquire", none)
    assert lmkit("rm", "--yes", "a") == 6
    said = capsys.readouterr().err
    assert "without locks; nothing was removed; see that no process trains it, and remove the folder by hand" in said
    assert "run.lock" not in said
    assert a.exists()


def test_rm_names_what_it_could_not_remove_by_the_place_where_it_lies_now(
    lmkit: Lmkit, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("a")
    remove_file = storage.remove_file

    def refuse(path: Path) -> None:
        if path.name == "metrics.jsonl":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        remove_file(path)

    monkeypatch.setattr(storage, "remove_file", refuse)
    assert lmkit("rm", "--yes", "a") == 6
    (left,) = Path("runs").iterdir()
    assert f"cannot remove {left.absolute() / 'metrics.jsonl'}: Permission denied" in capsys.readouterr().err


def test_rm_removes_what_one_that_was_killed_has_left_and_no_other_hidden_folder(
    lmkit: Lmkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        make_run(name)
    for name in (".trash-1000", ".trash-mine", ".tmp-a-1-0123abcd"):
        (Path("runs") / name).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove_directory", lambda path: signal.raise_signal(signal.SIGINT))
        assert lmkit("rm", "--yes", "a") == 130
    assert len(list(Path("runs").glob(".trash-a-*"))) == 1
    assert lmkit("rm", "--yes", "b") == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == [".tmp-a-1-0123abcd", ".trash-1000", ".trash-mine"]


def test_two_that_remove_a_run_together_do_not_disturb_each_other(
    lmkit: Lmkit, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("a")
    remove_file, others = storage.remove_file, [True]

    def together(path: Path) -> None:
        if path.name == "metrics.jsonl" and others and others.pop():
            storage.empty_trash(Path("runs"))
        remove_file(path)

    monkeypatch.setattr(storage, "remove_file", together)
    assert lmkit("rm", "--yes", "a") == 0
    assert list(Path("runs").iterdir()) == []
    assert capsys.readouterr().out.replace(os.sep, "/") == "removed runs/a\n"


def test_rm_touches_nothing_that_is_not_a_run(lmkit: Lmkit, capsys: Output) -> None:
    a = make_run("a")
    Path("data").mkdir()
    for word in ("data", "runs", ".", "nowhere", str(a / "checkpoints" / "step-000000000010")):
        assert lmkit("rm", "--yes", "a", word) == 4, word
        assert capsys.readouterr().err.count("\n") == 1
    assert a.exists()


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_rm_does_not_follow_a_link(lmkit: Lmkit, capsys: Output) -> None:
    a = make_run("a")
    Path("link").symlink_to(a)
    assert lmkit("rm", "--yes", "link") == 2
    assert "symbolic link" in capsys.readouterr().err
    assert a.exists()


# verify-resume

TRAINER = """\
import json, os, shutil, sys, time
from pathlib import Path

folder, pause, behaviour = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
words = dict(word.split("=", 1) for word in sys.argv[5:])
run, steps, every = Path(words["run.dir"]), int(words["train.max_steps"]), int(words["save.every_steps"])
with (folder / "starts").open("a") as log:
    log.write(json.dumps(words) + "\\n")
if behaviour == "fails":
    sys.exit(print("reading\\nerror: the corpus is gone; mend it", file=sys.stderr) or 3)
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
start = max((int(path.name[5:]) for path in (run / "checkpoints").iterdir()), default=0)
resumed = words["resume"] == "true"
assert resumed == (start > 0)
if behaviour == "starts anew":
    start = 0
journal = (run / "journal.jsonl").open("a")
print(json.dumps({"event": "resume" if resumed else "start"}), file=journal, flush=True)
with (run / "metrics.jsonl").open("w") as log:
    for step in range(start + 1, steps + 1):
        time.sleep(pause)
        log.write(json.dumps({"step": step}) + "\\n")
        log.flush()
        if step % every == 0:
            kind = "other" if behaviour == "differs" and resumed else "same"
            name = f"step-{step:012d}"
            print(json.dumps({"event": "save", "step": step}), file=journal, flush=True)
            if not (run / "checkpoints" / name).exists():
                shutil.copytree(folder / kind / "checkpoints" / name, run / name, dirs_exist_ok=True)
                os.rename(run / name, run / "checkpoints" / name)
(run / "result.json").write_text("{}")
"""


class Trainer:
    """Stands in for ``lmkit pretrain``: logs steps and copies checkpoints that were made before."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._patch = folder, monkeypatch
        (folder / "starts").write_bytes(b"")

    def behave(self, how: str, pause: float = 0.03) -> None:
        program = (sys.executable, str(self._folder / "trainer.py"), str(self._folder), str(pause), how)
        self._patch.setattr(runs_resume, "PROGRAM", program)

    def starts(self) -> list[dict[str, str]]:
        """The words of each start."""
        return [json.loads(line) for line in (self._folder / "starts").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def trainer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, and the checkpoints of 12 steps in two versions that differ in one number of the last one."""
    folder = tmp_path_factory.mktemp("trainer")
    (folder / "trainer.py").write_text(TRAINER, encoding="utf-8")
    for kind, delta in (("same", 0.0), ("other", 0.25)):
        with open_run(folder / kind) as run:
            for step in (3, 6, 9, 12):
                taken = snapshot(step)
                taken.state["elapsed_s"] = step * (1.0 + delta)
                if step == 12:
                    taken.optimizer["optimizer/head.weight/exp_avg"][7] += delta
                save_checkpoint(run, taken, keep=99)
    return folder


@pytest.fixture
def trainer(trainer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return Trainer(trainer_folder, monkeypatch)


@pytest.fixture
def verify_resume(lmkit: Lmkit, corpus: Path) -> Lmkit:
    return lambda *words: lmkit("verify-resume", "dataset=text", f"dataset.path={corpus}", "tokenizer=byte", *words)


def test_verify_resume_kills_a_copy_between_a_checkpoint_and_the_end_and_resumes_it(
    verify_resume: Lmkit, trainer: Trainer, tmp_path: Path, capsys: Output
) -> None:
    trainer.behave("same")
    assert verify_resume("model=tiny", "train.max_steps=9999", "train.budget=1h", "run.dir=mine") == 0
    shown, err = capsys.readouterr()
    found = re.fullmatch(
        r"identical: 1 weights, 1 optimizer tensors \(400 bytes\) and all counters are the same bytes after 12 steps,"
        r" undisturbed or killed \(kill -9\) after step (\d+) and resumed from the checkpoint of step (\d+)\n",
        shown,
    )
    assert found is not None, shown
    assert 7 <= int(found[1]) < 12
    assert int(found[2]) in (3, 6, 9)
    parts = [line[:4] for line in err.splitlines() if line[1:3] == "/3"]
    assert list(dict.fromkeys(parts)) == ["1/3 ", "2/3 ", "3/3 "]  # a kill that came too late is tried again
    whole, *_, killed, resumed = trainer.starts()
    assert whole["run.dir"] != killed["run.dir"] == resumed["run.dir"]
    assert [words["resume"] for words in (whole, killed, resumed)] == ["false", "false", "true"]
    assert (whole["model"], whole["train.max_steps"], whole["train.budget"]) == ("tiny", "12", "null")
    assert not Path("mine").exists()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_verify_resume_names_the_first_tensor_that_differs_and_ends_with_4(
    verify_resume: Lmkit, trainer: Trainer, tmp_path: Path, capsys: Output
) -> None:
    trainer.behave("differs")
    assert verify_resume("model=tiny") == 4
    shown, err = capsys.readouterr()
    assert shown == ""
    assert "optimizer optimizer/head.weight/exp_avg (1 of 50 numbers, by at most 0.25)" in err.splitlines()[-1]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_verify_resume_does_not_take_a_run_that_began_anew_for_a_resumed_one(
    verify_resume: Lmkit, trainer: Trainer, capsys: Output
) -> None:
    trainer.behave("starts anew")
    assert verify_resume("model=tiny") == 4
    assert "did not go on from its checkpoint" in capsys.readouterr().err.splitlines()[-1]


def test_verify_resume_ends_as_a_copy_that_fails(
    verify_resume: Lmkit, trainer: Trainer, tmp_path: Path, capsys: Output
) -> None:
    trainer.behave("fails")
    assert verify_resume("model=tiny") == 3
    assert capsys.readouterr().err.splitlines()[-1] == "error: the copy failed: the corpus is gone; mend it"
    assert list((tmp_path / "scratch").iterdir()) == []


def test_verify_resume_does_not_pass_off_a_run_that_came_to_its_end_as_a_killed_one(
    verify_resume: Lmkit, trainer: Trainer, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.behave("same", pause=0.0)
    start = runs_resume._start

    def ended(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        process = start(words, log)
        process.wait()
        return process

    monkeypatch.setattr(runs_resume, "_start", ended)
    monkeypatch.setattr(runs_resume, "ATTEMPTS", 2)
    assert verify_resume("model=tiny") == 2
    assert "raise --steps" in capsys.readouterr().err.splitlines()[-1]
    assert len(trainer.starts()) == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_verify_resume_leaves_no_process_and_no_file_when_it_is_interrupted(
    verify_resume: Lmkit, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    trainer.behave("same", pause=0.05)
    started: list[subprocess.Popen[bytes]] = []
    start = runs_resume._start

    def interrupted(run_dir: Path) -> int:
        if len(trainer.starts()) == 2:
            signal.raise_signal(number)
        return 0

    monkeypatch.setattr(runs_resume, "_start", lambda *a: started.append(start(*a)) or started[-1])
    monkeypatch.setattr(runs_resume, "_last_step", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    assert verify_resume("model=tiny") == code
    assert signal.getsignal(signal.SIGTERM) is before
    assert all(process.returncode is not None for process in started)
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize("steps", range(LEAST_STEPS, 60))
def test_the_kill_is_after_a_committed_checkpoint_and_before_the_end(steps: int) -> None:
    interval, kill = runs_resume.save_interval(steps), runs_resume.kill_step(steps)
    assert kill > 2 * interval  # the save at 2 * interval has begun, so that the one at interval is committed
    assert kill < steps
    assert runs_resume.fixed_values(steps)["save.every_steps"] == str(interval)


def pair(left: Tensor, right: Tensor) -> tuple[Snapshot, Snapshot]:
    first, second = (Snapshot(1, {"weight": tensor}, {}, {"step": 1}, {}) for tensor in (left, right))
    return first, second


@pytest.mark.parametrize(
    ("left", "right", "problem"),
    [
        (torch.zeros(3), -torch.zeros(3), "model weight"),
        (torch.ones(3), torch.tensor([1.0, 1.0, 1.5]), r"model weight \(1 of 3 numbers, by at most 0\.5\)"),
        (torch.ones(3), torch.ones(3, dtype=torch.float64), r"torch\.float32 \[3\] and torch\.float64 \[3\]"),
        (torch.ones(3), torch.ones(3, 1), r"\[3\] and torch\.float32 \[3, 1\]"),
    ],
)
def test_comparing_is_by_bytes(left: Tensor, right: Tensor, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        runs_resume.compare(*pair(left, right))


def test_equal_bytes_are_equal_even_where_numbers_are_not() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert "1 weights" in runs_resume.compare(*pair(nan, nan.clone()))


def test_counters_are_compared_and_clocks_are_not() -> None:
    first, second = pair(torch.ones(2), torch.ones(2))
    second.state |= {"elapsed_s": 5.0, "eval_s": 1.0}
    runs_resume.compare(first, second)
    second.state["num_targets"] = 7
    with pytest.raises(CheckpointError, match=r"state num_targets \(None and 7\)"):
        runs_resume.compare(first, second)
    third = Snapshot(1, {"weight": torch.ones(2)}, {"exp_avg": torch.ones(1)}, {"step": 1}, {})
    with pytest.raises(CheckpointError, match=r"optimizer exp_avg \(it is missing in the undisturbed run\)"):
        runs_resume.compare(first, third)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["model=tiny", "optimizer=muon"], ["model=lstm", "schedule=plateau"]], ids=" ".join)
def test_verify_resume_proves_real_training(verify_resume: Lmkit, words: list[str], capsys: Output) -> None:
    small = ["train.batch_size=4", "train.seq_len=16", "train.micro_batch_size=2", "device=cpu", "device.threads=1"]
    assert verify_resume(*words, *small) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.startswith("identical: ")


@pytest.mark.slow
@pytest.mark.parametrize("task", [["task=lm", "adapter=lora"], ["task=prefer", "task.data=pairs.jsonl"]], ids=" ".join)
def test_verify_resume_proves_finetuning(task: list[str], lmkit: Lmkit, corpus: Path, capsys: Output) -> None:
    small = ["train.batch_size=4", "train.seq_len=16", "device=cpu", "device.threads=1"]
    text = ["dataset=text", f"dataset.path={corpus}"]
    assert (
        cli.main(["pretrain", *text, "tokenizer=byte", "model=tiny", *small, "train.max_steps=2", "run.dir=base"]) == 0
    )
    pairs = [{"prompt": f"{i}", "chosen": f"{i} {i}", "rejected": "x"} for i in range(40)]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    words = [*task, *small] if "task.data=pairs.jsonl" in task else [*task, *text, *small]
    assert lmkit("verify-resume", "finetune", "run=base", *words) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.startswith("identical: ")
