"""Multiruns by Hydra's launchers and by Optuna: each job once, its result in its run, and none of them twice."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from stopping import signal_after

from lmkit import cli, launch
from lmkit.arguments import parse
from lmkit.commands.training import command_line
from lmkit.distributed import SINGLE
from lmkit.errors import ConfigError, LmkitError, ResourceError, StoppedError
from lmkit.store.browse import Status, read_summary, status_of
from lmkit.store.runs import Run
from lmkit.store.saving import Saves
from lmkit.store.sweeps import Job as StoredJob
from lmkit.store.sweeps import begin, note_failure, read
from lmkit.sweep import Job, Outcome, here

WORDS = ["pretrain", "-m", "dataset=text", "tokenizer=byte", "model=tiny", "device=cpu", "train.max_steps=2"]
WORDS += ["train.batch_size=2", "train.seq_len=8", "model.d_model=16", "model.num_layers=1", "model.num_heads=2"]
WORDS += ["device.threads=1", "run.dir=jobs"]
SEARCHED = ["sweeper=optuna", "sweeper.n_trials=3", "optimizer.lr=tag(log,interval(1e-4,1e-2))", "model.dropout=0,0.1"]

Lmkit = Callable[..., int]
Output = pytest.CaptureFixture[str]


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec("hydra_plugins") is None or not importlib.util.find_spec(
        f"hydra_plugins.{package}"
    )
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


@pytest.fixture
def lmkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path) -> Lmkit:
    monkeypatch.chdir(tmp_path)
    return lambda *words: cli.main([*WORDS, f"dataset.path={corpus}", *words])


LAUNCHERS = [
    pytest.param(
        ["launcher=joblib", "launcher.n_jobs=1"],
        marks=[pytest.mark.extra("joblib"), needs("hydra_joblib_launcher")],
        id="joblib",
    ),
    pytest.param(
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        marks=[pytest.mark.slow, pytest.mark.extra("joblib"), needs("hydra_joblib_launcher")],
        id="joblib-2-processes",
    ),
    pytest.param(
        ["launcher=submitit_local", "launcher.timeout_min=5"],
        marks=[pytest.mark.slow, pytest.mark.extra("submitit"), needs("hydra_submitit_launcher")],
        id="submitit_local",
    ),
    pytest.param(
        ["launcher=ray", "launcher.ray.init.num_cpus=1", "launcher.ray.init.include_dashboard=false"],
        marks=[pytest.mark.slow, pytest.mark.extra("ray"), needs("hydra_ray_launcher")],
        id="ray",
    ),
]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_computes_what_this_process_does_and_skips_what_has_finished(
    lmkit: Lmkit, launcher: list[str], capsys: Output
) -> None:
    assert lmkit("seed=1,2", *launcher) == 0
    launched = [read_summary(Path("jobs") / str(n)).best_valid_loss for n in (0, 1)]
    assert lmkit("seed=1,2", "run.dir=here") == 0
    assert launched == [read_summary(Path("here") / str(n)).best_valid_loss for n in (0, 1)]
    capsys.readouterr()
    assert lmkit("seed=1,2", *launcher) == 0
    assert capsys.readouterr().err.count("finished before, skipped") == 2
    assert cli.main(["runs", "sweep", "jobs"]) == 0
    assert "2 jobs: 2 done" in capsys.readouterr().out


@pytest.mark.extra("joblib")
@needs("hydra_joblib_launcher")
def test_a_job_that_fails_in_a_launcher_is_noted_and_the_others_are_done(lmkit: Lmkit, capsys: Output) -> None:
    Path("jobs/0").mkdir(parents=True)
    Path("jobs/0/foreign.txt").write_text("in the way", encoding="utf-8")
    assert lmkit("seed=1,2", "launcher=joblib", "launcher.n_jobs=1") == 2
    assert "1 of 2 jobs failed" in capsys.readouterr().err
    assert cli.main(["runs", "sweep", "jobs"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^0 +seed=1 +not started .*exit 2: run.dir=", table, re.MULTILINE)
    assert re.search(r"^1 +seed=2 +done", table, re.MULTILINE)


@pytest.mark.parametrize(
    "error", [StoppedError("stopped by SIGINT after step 1"), ResourceError("the last save failed")]
)
def test_where_a_launcher_stays_in_this_process_a_job_that_is_stopped_is_the_last(
    error: LmkitError, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def run_job(job: str) -> Outcome:
        begun.append(job)
        raise error

    monkeypatch.setattr(launch, "run_job", run_job)
    task = launch._Task({0: "first", 1: "second"})  # type: ignore[dict-item]
    outcomes = [task(SimpleNamespace(number=number)) for number in (0, 1)]
    assert [(outcome.code, outcome.stopped) for outcome in outcomes] == [(error.exit_code, True), (75, True)]
    assert begun == ["first"]


@pytest.mark.extra("joblib")
@needs("hydra_joblib_launcher")
def test_ctrl_c_ends_a_sweep_by_a_launcher_that_stays_in_this_process_and_it_goes_on(
    lmkit: Lmkit, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    words = ["seed=1,2", "launcher=joblib", "launcher.n_jobs=1"]
    with monkeypatch.context() as patch:
        signal_after(patch, 1, signal.SIGINT)
        assert lmkit(*words) == 75
    assert "2 of 2 jobs stopped: resume=true goes on with them" in capsys.readouterr().err
    assert not Path("jobs/1").exists()
    assert lmkit(*words, "resume=true") == 0
    assert [read_summary(Path("jobs") / str(n)).step for n in (0, 1)] == [2, 2]


@pytest.mark.parametrize(
    ("owner", "moment", "status"), [(Saves, "finish", Status.stopped), (Run, "write_result", Status.finished)]
)
def test_a_signal_that_comes_while_a_job_comes_to_its_end_ends_the_multirun_which_goes_on(
    lmkit: Lmkit, monkeypatch: pytest.MonkeyPatch, capsys: Output, owner: type, moment: str, status: Status
) -> None:
    original = getattr(owner, moment)

    def asked(*args: object, **keys: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        original(*args, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, asked)
        assert lmkit("seed=1,2") == 75
    assert "error: stopped by SIGTERM " in capsys.readouterr().err
    assert status_of(Path("jobs/0")) is status
    assert not Path("jobs/1").exists()
    assert lmkit("seed=1,2", "resume=true") == 0
    assert [status_of(Path("jobs") / str(n)) for n in (0, 1)] == [Status.finished, Status.finished]


def test_a_job_that_cannot_be_saved_where_a_signal_asks_to_stop_ends_the_multirun(
    lmkit: Lmkit, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    def full(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        raise ResourceError("the last save failed")

    monkeypatch.setattr(Saves, "finish", full)
    assert lmkit("seed=1,2") == 6
    assert capsys.readouterr().err.count("error: the last save failed") == 1
    assert not Path("jobs/1").exists()


def test_a_job_in_a_worker_notes_the_command_line_that_began_it(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["lmkit", "pretrain", "-m", "seed=1,2"]
    seen: list[tuple[str, list[str]]] = []

    def run_job(job: str) -> Outcome:
        seen.append((job, command_line(SINGLE)))
        return Outcome()

    monkeypatch.setattr(launch, "run_job", run_job)
    monkeypatch.setattr(sys, "argv", command)
    task = launch._Task({0: "the job"})  # type: ignore[dict-item]
    monkeypatch.setattr(sys, "argv", ["worker.py", "--address", "10.0.0.1"])
    task(SimpleNamespace(number=0))
    assert seen == [("the job", command)]


@pytest.mark.extra("optuna")
@needs("hydra_optuna_sweeper")
def test_a_search_ranks_by_valid_loss_and_goes_on_as_it_would_have(lmkit: Lmkit, capsys: Output) -> None:
    assert lmkit(*SEARCHED) == 0
    losses = [read_summary(Path("jobs") / str(number)).best_valid_loss for number in range(3)]
    text = Path("jobs/optimization_results.yaml").read_text(encoding="utf-8")
    assert f"best_value: {min(loss for loss in losses if loss is not None)}" in text
    assert lmkit(*SEARCHED, "sweeper.n_trials=4") == 0
    assert capsys.readouterr().err.count("finished before, skipped") == 3
    sweep = read(Path("jobs"))
    assert sweep is not None
    assert lmkit(*SEARCHED, "sweeper.n_trials=4", "run.dir=at-once") == 0
    at_once = read(Path("at-once"))
    assert at_once is not None
    assert [job.words for job in sweep.jobs] == [job.words for job in at_once.jobs]
    assert cli.main(["runs", "sweep", "jobs"]) == 0
    assert re.search(r"^3 +optimizer.lr=.* done", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.extra("optuna")
@needs("hydra_optuna_sweeper")
def test_another_search_in_the_same_folder_is_refused_before_a_job_runs(lmkit: Lmkit, capsys: Output) -> None:
    assert lmkit(*SEARCHED, "sweeper.n_trials=1") == 0
    other = ["sweeper=optuna", "sweeper.n_trials=1", "optimizer.lr=interval(1e-3,1e-1)", "model.dropout=0,0.1"]
    assert lmkit(*other, "resume=true") == 2
    assert "jobs holds another search: its job 0 is optimizer.lr=" in capsys.readouterr().err


@pytest.mark.extra("optuna")
@needs("hydra_optuna_sweeper")
def test_a_search_goes_on_after_a_failed_job_and_counts_it_as_failed_again(lmkit: Lmkit, capsys: Output) -> None:
    Path("jobs/0").mkdir(parents=True)
    Path("jobs/0/foreign.txt").write_text("in the way", encoding="utf-8")
    assert lmkit(*SEARCHED, "sweeper.n_trials=2") == 2
    assert read_summary(Path("jobs/1")).best_valid_loss is not None
    capsys.readouterr()
    assert lmkit(*SEARCHED, "sweeper.n_trials=2") == 1
    said = capsys.readouterr().err
    assert "job 1: failed before, not tried again" in said
    assert "job 2: finished before, skipped" in said


def test_a_job_of_a_search_that_has_ended_well_after_a_failure_is_not_counted_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = parse("pretrain", ["-m", f"run.dir={tmp_path}"])
    stored = [StoredJob(str(number), {"seed": str(number)}) for number in range(3)]
    begin(tmp_path, ["lmkit"], stored)
    for job in stored[:2]:
        note_failure(tmp_path, job, 6, "the disk is full", pytest.fail)
    monkeypatch.setattr(launch, "is_finished", lambda made: made == "done")
    jobs = [Job(0, "job 1", line, "done"), Job(1, "job 2", line, "failed")]
    assert launch._Trials(line, {}, here)._failed_before(jobs) == {1: "exit 6: the disk is full"}


def test_a_job_of_a_search_that_was_stopped_does_not_count_as_failed(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "run.json").write_text("{}", encoding="utf-8")
    line = parse("pretrain", ["-m", "seed=1,2", f"run.dir={tmp_path}"])
    trials = launch._Trials(line, {"seed": "seed"}, lambda jobs: pytest.fail("a job was run"))
    with pytest.raises(ConfigError, match=r"job 1 of the search has begun and not finished; .*resume=true"):
        trials.launch([["seed=1"]], 0)


def test_a_search_does_not_plan(tmp_path: Path) -> None:
    line = parse("pretrain", ["-m", "seed=1,2", "plan=true", f"run.dir={tmp_path / 'new'}"])
    trials = launch._Trials(line, {"seed": "seed"}, lambda jobs: pytest.fail("a job was run"))
    with pytest.raises(ConfigError, match=r"plan=true trains nothing that a search could choose by"):
        trials.launch([["seed=1"]], 0)
    assert not (tmp_path / "new").exists()


def test_finished_jobs_are_skipped_where_the_stored_configuration_is_not_the_asked_one(
    lmkit: Lmkit, capsys: Output
) -> None:
    words = [
        "softmax=adaptive",
        "model.tie_embeddings=false",
        "seed=1,2",
    ]  # the model that is stored has the cutoffs of its vocabulary
    assert lmkit(*words) == 0
    assert lmkit(*words) == 0
    assert capsys.readouterr().err.count("finished before, skipped") == 2
    asked = Path("jobs/0/asked.json")
    assert set(json.loads(asked.read_text(encoding="utf-8"))) == {"asked", "stored"}
    assert lmkit(*words, "optimizer.lr=0.5") == 2  # another configuration: the runs are in its way


def test_finished_jobs_of_finetune_are_skipped_and_those_of_another_base_are_not(
    lmkit: Lmkit, corpus: Path, capsys: Output
) -> None:
    assert lmkit("seed=1,2") == 0
    tune = ["finetune", "-m", "dataset=text", f"dataset.path={corpus}", "device=cpu", "train.max_steps=1", "seed=1,2"]
    tune += ["train.batch_size=2", "train.seq_len=8", "run.dir=tuned"]
    assert cli.main([*tune, "run=jobs/0"]) == 0
    capsys.readouterr()
    assert cli.main([*tune, "run=jobs/0"]) == 0
    assert capsys.readouterr().err.count("finished before, skipped") == 2
    for other in (["run=jobs/1"], ["run=jobs/0", "run.checkpoint=latest"]):
        assert cli.main([*tune, *other]) == 2
        assert "finished before" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launcher=jobli"], "launcher=jobli is unknown: did you mean joblib?"),
        (["sweeper=opt"], "sweeper=opt is unknown"),
        (["launcher=joblib", "launcher._target_=os.system"], "names code to be run"),
        (["launcher.n_jobs=2"], "launcher.n_jobs needs a launcher; add launcher=joblib"),
        (["optimizer.lr=interval(1e-4,1e-2)"], "add sweeper=optuna"),
    ],
)
def test_a_wrong_word_about_launchers_is_named(lmkit: Lmkit, words: list[str], said: str, capsys: Output) -> None:
    assert lmkit(*words) == 2
    message = capsys.readouterr().err.strip().replace("; did", ": did")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize("run_dir", ["", "null", "None", "a,b"])
def test_a_launcher_needs_one_folder_for_the_runs(run_dir: str) -> None:
    with pytest.raises(ConfigError, match="need a folder for the runs"):
        launch.check(parse("pretrain", ["-m", f"run.dir={run_dir}"]))


@pytest.mark.parametrize(("command", "option"), [("pretrain", []), ("eval-ppl", ["-m"])])
def test_launchers_are_refused_where_they_have_no_use(command: str, option: list[str], capsys: Output) -> None:
    assert cli.main([command, *option, "launcher=joblib", "run.dir=x"]) == 2
    assert "launcher=joblib" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["launcher=submitit_slurm", "launcher=ray", "launcher=joblib", "sweeper=optuna"])
def test_a_missing_plugin_is_named_with_the_extra_that_brings_it(
    lmkit: Lmkit, word: str, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert lmkit(word, "seed=1,2") == 6
    extra = (launch.LAUNCHERS | launch.SWEEPERS)[word.partition("=")[2]]
    message = capsys.readouterr().err.strip()
    assert message.endswith(f"which is not installed; pip install 'lmkit[{extra}]'")
    assert "\n" not in message


@pytest.mark.extra("joblib")
@needs("hydra_joblib_launcher")
def test_a_wrong_setting_of_a_launcher_is_one_line(lmkit: Lmkit, capsys: Output) -> None:
    assert lmkit("seed=1,2", "launcher=joblib", "launcher.n_job=2") == 2
    message = capsys.readouterr().err.strip()
    assert "launcher.n_job" in message
    assert "\n" not in message
