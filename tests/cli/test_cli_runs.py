"""lmkit runs on the command line: words, help, completion and mistakes; what the actions do is tested elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmkit.commands import runs_resume
from lmkit.completion import candidates
from lmkit.config.runs import ACTIONS
from lmkit.keys import keys_of
from lmkit.runs_line import parse_runs


def complete(line: str) -> list[str]:
    return candidates(["--line", line]).splitlines()


@pytest.fixture
def two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with runs/one (steps 3 and 12) and runs/two."""
    for name in ("one/checkpoints/step-000000000003", "one/checkpoints/step-000000000012", "two/checkpoints"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("words", [["runs"], ["runs", "--help"], ["runs", "-h"], ["help", "runs"], ["--help", "runs"]])
def test_help_lists_every_action(lmkit: Any, words: list[str]) -> None:
    assert lmkit(*words) == 0, lmkit.err
    for name, action in ACTIONS.items():
        assert f"  {name} " in lmkit.out
        assert action.summary in lmkit.out
    assert "exit codes" in lmkit.out


@pytest.mark.parametrize("name", ACTIONS)
def test_each_action_has_a_help_of_its_own_with_its_options(lmkit: Any, name: str) -> None:
    assert lmkit("runs", name, "-h") == 0, lmkit.err
    shown = lmkit.out
    assert f"usage: lmkit runs {name} {ACTIONS[name].words}" in shown
    for option, text in ACTIONS[name].options.items():
        assert f"  {option} " in shown
        assert text in shown
    assert max(map(len, shown.splitlines())) <= 120
    assert lmkit("help", "runs", name) == 0
    assert lmkit.out == shown


def test_the_overview_names_the_command(lmkit: Any) -> None:
    assert lmkit("--help") == 0
    assert "  runs " in lmkit.out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["runs", "lst"], ["no action 'lst'", "did you mean ls?"]),
        (["runs", "verify_resume"], ["no action 'verify_resume'", "verify-resume"]),
        (["runs", "--hlep"], ["no option '--hlep'", "--help"]),
        (["runs", "ls", "--jsn"], ["no option --jsn", "--json"]),
        (["runs", "ls", "a", "b"], ["'b' is too much", "lmkit runs ls [ROOT]"]),
        (["runs", "show"], ["lmkit runs show RUN", "lmkit runs ls"]),
        (["runs", "diff", "a"], ["lmkit runs diff RUN RUN"]),
        (["runs", "rm", "--yes"], ["lmkit runs rm RUN [RUN ...]"]),
        (["runs", "show", "a", "--yes"], ["no option --yes"]),
        (["runs", "show", "--foo", "a", "b"], ["no option --foo", "'b' is too much"]),
        (["runs", "verify-resume", "--steps"], ["--steps must be a whole number >= 4"]),
        (["runs", "verify-resume", "--steps", "3"], ["--steps 3 must be a whole number >= 4"]),
        (["runs", "verify-resume", "--steps=two"], ["--steps two must be"]),
        (["runs", "verify-resume", "modle=tiny"], ["'modle'", "model"]),
        (["runs", "verify-resume", "model=tny", "trian.seq_len=4"], ["model=tny", "tiny", "trian.seq_len"]),
        (["runs", "verify-resume", "finetune", "model=tiny"], ["finetune takes the model from the run"]),
        (["runs", "verify-resume", "-m", "seed=1,2"], ["leave out -m"]),
        (["runs", "verify-resume", "model=kn5"], ["no steps to resume"]),
        (["help", "runs", "lst"], ["did you mean ls?"]),
        (["run", "ls"], ["unknown command 'run'", "runs"]),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_that_says_what_was_meant(lmkit: Any, words: list[str], parts: list[str]) -> None:
    message = lmkit.refused(*words)
    assert all(part in message for part in parts), message


def test_words_and_options_may_come_in_any_order_and_run_may_be_written_as_elsewhere() -> None:
    config = parse_runs(["rm", "a", "--yes", "run=runs/b", "--debug"])
    assert (config.action, config.words, config.yes, config.debug) == ("rm", ["a", "runs/b"], True, True)
    assert parse_runs(["ls", "--json"]).json


def test_verify_resume_takes_the_words_of_pretrain_as_they_are() -> None:
    config = parse_runs(["verify-resume", "model=tiny", "--steps", "20", "--optimizer.lr", "0.1", "run=x"])
    assert config.words == ["model=tiny", "--optimizer.lr", "0.1", "run=x"]
    assert config.steps == 20


def test_verify_resume_of_finetune_writes_no_predictions(lmkit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(runs_resume, "run", lambda cfg, words, steps: given.extend(words))
    task = ["task=classify", "task.data=x.jsonl", "predict=new.jsonl", "output=here.jsonl"]
    assert lmkit("runs", "verify-resume", "finetune", *task) == 0, lmkit.err
    assert given[0] == "finetune"
    assert {"predict=null", "output=null", "task=classify", "task.data=x.jsonl"} <= set(given)


def test_verify_resume_sends_no_metrics_of_its_copies(lmkit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(runs_resume, "run", lambda cfg, words, steps: given.extend(words))
    assert lmkit("runs", "verify-resume", "logger=wandb", "logger.project=mine", "log.every_steps=5") == 0, lmkit.err
    assert [word for word in given if word.startswith("log")] == ["logger=none", "log.every_steps=1"]


def test_verify_resume_trains_whatever_the_words_say_of_plans_and_of_going_on(
    lmkit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    monkeypatch.setattr(runs_resume, "run", lambda cfg, words, steps: given.extend(words))
    words = ["plan=true", "run.dir=runs/mine", "resume=true", "run.allow_data_change=true"]
    assert lmkit("runs", "verify-resume", *words) == 0, lmkit.err
    assert {"plan=false", "run.dir=null", "resume=false", "run.allow_data_change=false"} <= set(given)


@pytest.mark.usefixtures("two_runs")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lmkit ru", ["runs"]),
        ("lmkit help ru", ["runs"]),
        ("lmkit runs ", [*ACTIONS, "--help"]),
        ("lmkit runs ve", ["verify", "verify-resume"]),
        ("lmkit runs show ", ["one", "two"]),
        ("lmkit runs show one ", []),
        ("lmkit runs diff one t", ["two"]),
        ("lmkit runs verify one two ", ["one", "two"]),
        ("lmkit runs pin o", ["one"]),
        ("lmkit runs pin one ", ["step=3", "step=12"]),
        ("lmkit runs pin one step=1", ["step=12"]),
        ("lmkit runs pin nothing ", []),
        ("lmkit runs ls --", ["--json", "--help"]),
        ("lmkit runs ls ", []),
        ("lmkit runs rm --y", ["--yes"]),
        ("lmkit runs nonsense ", []),
        ("lmkit runs verify-resume model=ti", ["model=tiny"]),
        ("lmkit runs verify-resume finet", ["finetune"]),
        ("lmkit runs verify-resume finetune task=pref", ["task=prefer"]),
        ("lmkit runs verify-resume --steps 8 finetune task=pref", ["task=prefer"]),
        ("lmkit runs verify-resume --ste", ["--steps"]),
        ("lmkit runs verify-resume --steps ", []),
    ],
)
def test_completion_offers_actions_options_runs_and_steps(line: str, expected: list[str]) -> None:
    assert complete(line) == expected


def test_completion_of_verify_resume_offers_every_key_of_pretrain() -> None:
    offered = complete("lmkit runs verify-resume ")
    assert {f"{key}=" for key in keys_of("pretrain", {})} <= set(offered)


def test_completion_without_a_folder_of_runs_offers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert complete("lmkit runs show ") == []


@pytest.mark.parametrize("words", [["runs", "ls"], ["runs", "show", "x"], ["runs", "verify", "x"], ["runs", "-h"]])
def test_looking_at_runs_loads_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    code = (
        f"import sys; from lmkit.cli import main; main({words!r});"
        "print([m for m in ('torch', 'hydra', 'omegaconf', 'numpy', 'datasets', 'rich') if m in sys.modules])"
    )
    (tmp_path / "x" / "checkpoints").mkdir(parents=True)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.endswith("[]\n"), done.stdout
