"""Help, version, the composed configuration, and multirun."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmkit import __version__, cli, errors, presets
from lmkit.keys import every_key, field_docs, keys_of, owners_of, type_text


@pytest.mark.parametrize("command", cli.COMMANDS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_every_group_preset_and_key_with_its_type(lmkit: Any, command: str, option: str) -> None:
    assert lmkit(command, option) == 0, lmkit.err
    lines = lmkit.out.splitlines()
    for group in presets.groups_of(command):
        assert any(line.startswith(f"  {group} (default: ") for line in lines)
        for name in presets.names_in(group):
            assert any(line.split()[:1] == [name] for line in lines)
    for key in keys_of(command, {}):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"  {key}="))
        assert lines[at].endswith("]")
        assert lines[at + 1].startswith("      ")
    assert max(len(line) for line in lines) <= 120
    assert "keys below." not in lmkit.out
    assert "\n\n\n" not in lmkit.out
    assert not lmkit.configs


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_help_of_a_number_names_its_range(command: str) -> None:
    for key, hint in every_key(command).items():
        if type_text(hint).partition(" ")[0] in ("int", "float"):
            for owner in owners_of(command, key):
                said = field_docs(owner)[key.rpartition(".")[2]]
                assert re.search(r"[<>]|\([\d.]+ to |\(above \d|must divide", said), f"{owner.__name__}, {key}: {said}"


def test_help_shows_the_keys_and_values_of_the_choice_made(lmkit: Any) -> None:
    assert lmkit("pretrain", "model=lstm", "seed=9", "--help", "dataset=hub") == 0
    assert "model.cell=lstm   [lstm or gru]" in lmkit.out
    assert "seed=9   [int]" in lmkit.out
    assert "dataset.name=(must be given)   [text]" in lmkit.out
    assert "model.num_heads" not in lmkit.out


def test_help_shows_values_as_they_are_written_on_the_command_line(lmkit: Any) -> None:
    assert lmkit("pretrain", "softmax=adaptive", "softmax.cutoffs=[5,9]", "train.ema_decay=1e-1", "--help") == 0
    assert "  softmax.cutoffs=[5,9]   [list of int]" in lmkit.out
    assert "  softmax.div_value=4   [float]" in lmkit.out
    assert "  train.ema_decay=0.1   [float or null]" in lmkit.out
    assert "  train.patience=null   [int or null]" in lmkit.out


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_commands_options_and_exit_codes(lmkit: Any, words: list[str]) -> None:
    assert lmkit(*words) == 0
    options = ("--cfg job", "-m ", "--completion", "--version", "exit codes", "LMKIT_DATA", "LMKIT_CACHE")
    for part in (*cli.COMMANDS, *options):
        assert part in lmkit.out
    for kind in errors.LmkitError.__subclasses__():
        assert f"{kind.exit_code} " in lmkit.out


def test_help_before_a_command_is_its_help(lmkit: Any) -> None:
    for word in ("help", "--help", "-h"):
        assert lmkit(word, "generate") == 0
        assert lmkit.out.startswith("lmkit generate: ")


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_version(lmkit: Any, word: str) -> None:
    assert lmkit(word) == 0
    assert lmkit.out == f"lmkit {__version__}\n"


@pytest.mark.parametrize("words", [["--cfg", "job", "seed=3"], ["seed=3", "--cfg", "job"], ["seed=3", "--cfg=job"]])
def test_the_composed_configuration_is_yaml_and_nothing_runs(lmkit: Any, words: list[str]) -> None:
    assert lmkit("pretrain", *words) == 0
    assert not lmkit.configs
    shown = yaml.safe_load(lmkit.out)
    assert shown["seed"] == 3
    assert shown["model"]["activation"] == "silu"


def test_a_configuration_that_would_be_refused_is_not_shown(lmkit: Any) -> None:
    assert "seed=-1" in lmkit.refused("pretrain", "--cfg", "job", "seed=-1")


# Multirun


@pytest.mark.parametrize("option", ["-m", "--multirun"])
def test_multirun_runs_every_combination_in_order(lmkit: Any, option: str) -> None:
    assert lmkit("pretrain", "model=tiny,small", "seed=1, 2", "run.dir=runs/x", option, "save.keep=3") == 0
    seen = [(config.model.d_model, config.seed, Path(config.run.dir).as_posix()) for config in lmkit.configs]
    assert seen == [(128, 1, "runs/x/0"), (128, 2, "runs/x/1"), (256, 1, "runs/x/2"), (256, 2, "runs/x/3")]
    assert "job 3 of 4: model=small seed=1" in lmkit.err
    assert all(config.save.keep == 3 for config in lmkit.configs)


def test_presets_of_a_multirun_may_be_written_with_dashes_as_a_single_one_may(lmkit: Any) -> None:
    assert lmkit("pretrain", "-m", "model=awd-lstm,transformer-xl") == 0, lmkit.err
    assert [type(config.model).__name__ for config in lmkit.configs] == ["RecurrentConfig", "TransformerConfig"]


@pytest.mark.parametrize("name", [".", "/"])
def test_a_file_without_a_name_is_left_to_the_command_to_refuse(lmkit: Any, name: str) -> None:
    assert lmkit("eval-ppl", "-m", "run=a,b", f"output={name}") == 0, lmkit.err
    assert [config.output for config in lmkit.configs] == [name, name]


def test_a_failing_job_does_not_stop_the_rest_and_the_worst_code_is_returned(
    lmkit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def run(line: Any, config: Any) -> None:
        seen.append(config.seed)
        if config.seed in failures:
            raise failures[config.seed]

    failures: dict[int, BaseException] = {1: errors.DivergedError("nan"), 2: errors.DataError("x"), 3: ValueError("y")}
    monkeypatch.setattr(cli, "run_command", run)
    assert lmkit("pretrain", "-m", "seed=1,2,3,4") == 7
    assert seen == [1, 2, 3, 4]
    lines = lmkit.err.splitlines()
    assert "error: job 1: nan" in lines
    assert "error: job 2: x" in lines
    assert any(line.startswith("error: job 3: ValueError: y (a bug") for line in lines)
    assert lines[-1] == "3 of 4 jobs failed"


@pytest.mark.parametrize(("error", "code"), [(errors.StoppedError("stopped"), 75), (KeyboardInterrupt(), 130)])
def test_a_stop_ends_the_whole_multirun(lmkit: Any, error: BaseException, code: int) -> None:
    lmkit.error = error
    assert lmkit("pretrain", "-m", "seed=1,2") == code
    assert len(lmkit.configs) == 1


def test_a_mistake_in_one_job_stops_the_multirun_before_it_starts(lmkit: Any) -> None:
    assert "model=tny" in lmkit.refused("pretrain", "-m", "model=tiny,tny")
    assert "seed=-1" in lmkit.refused("pretrain", "-m", "seed=1,-1")


def test_jobs_do_not_overwrite_each_others_output(lmkit: Any) -> None:
    assert lmkit("eval-ppl", "-m", "run=a,b", "output=out/x.json") == 0
    assert [Path(config.output).as_posix() for config in lmkit.configs] == ["out/x-0.json", "out/x-1.json"]
    assert lmkit("eval-ppl", "-m", "run=a,b", "output=x.json,y.json") == 0
    assert [config.output for config in lmkit.configs] == ["x-0.json", "y-1.json", "x-2.json", "y-3.json"]
    assert lmkit("eval-ppl", "-m", "run=a,b", "report=r.html", "word_probs=p.gz") == 0
    written = [(config.report, config.word_probs) for config in lmkit.configs]
    assert written == [("r-0.html", "p-0.gz"), ("r-1.html", "p-1.gz")]
    assert lmkit("finetune", "-m", "run=x", "run.dir=a,b") == 0
    assert [config.run.dir for config in lmkit.configs] == ["a", "b"]


def test_jobs_do_not_overwrite_each_others_predictions(
    lmkit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["finetune", "-m", "run=x", "task=classify", "task.data=x", "run.dir=d", "predict=a/new.csv"]
    assert "add output=FILE" in lmkit.refused(*words, "seed=1,2")
    assert lmkit(*words, "seed=1,2", "output=new.jsonl") == 0
    assert [config.output for config in lmkit.configs] == ["new-0.jsonl", "new-1.jsonl"]
    assert lmkit("finetune", "-m", "run=x,y", "predict=a/new.csv,b/new.csv") == 2
    assert lmkit("finetune", "-m", "run=x", "predict=a/new.csv,b/new.csv") == 0
    assert lmkit(*words, "seed=1") == 0


def test_jobs_that_finetune_never_start_from_one_another(lmkit: Any) -> None:
    said = lmkit.refused("finetune", "-m", "seed=1,2", "run.dir=x")
    assert said == "jobs of a multirun start from one run, and the newest changes as they finish; add run=DIR"
    for words in (["run=x"], ["init=hf:x"], ["task=regress", "task.data=x", "task.numeric=z"]):
        assert lmkit("finetune", "-m", "seed=1,2", *words) == 0, lmkit.err
    assert lmkit("finetune", "-m", "predict=a.csv,b.csv") == 0, lmkit.err  # which trains nothing


def test_plans_of_a_multirun_leave_nothing_behind(lmkit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert lmkit("pretrain", "-m", "plan=true", "seed=1,2", "run.dir=runs/x") == 0
    assert len(lmkit.configs) == 2
    assert not list(tmp_path.iterdir())


def test_a_list_in_brackets_is_one_value(lmkit: Any) -> None:
    assert lmkit("generate", "-m", "stop=[a,b]", "--prompt", "x,y", "seed=1,2") == 0
    assert [config.stop for config in lmkit.configs] == [["a", "b"]] * 2
    assert lmkit.prompts == [["x,y"]] * 2


def test_a_text_with_commas_is_one_value_of_a_multirun_in_brackets(lmkit: Any) -> None:
    assert lmkit("eval-ppl", "-m", "run=a,b", "mix=kn5", "weights=[0.9,0.1]") == 0, lmkit.err
    assert [(config.run.path, config.weights) for config in lmkit.configs] == [("a", "0.9,0.1"), ("b", "0.9,0.1")]
    task = ["task=instruct", "task.data=x", "run=x", "seed=1,2"]
    assert lmkit("finetune", "-m", *task, "task.template=[Well, {prompt}\n{response}]") == 0, lmkit.err
    assert [config.task.template for config in lmkit.configs] == ["Well, {prompt}\n{response}"] * 2
    assert lmkit("generate", "-m", "seed=1,2", "system=[aside]", "--chat", "--prompt", "x") == 0
    assert [config.system for config in lmkit.configs] == ["[aside]"] * 2  # which holds no comma


def test_multirun_with_help_or_cfg_runs_nothing(lmkit: Any) -> None:
    assert lmkit("pretrain", "-m", "seed=1,2", "--cfg", "job") == 0
    assert [shown["seed"] for shown in yaml.safe_load_all(lmkit.out)] == [1, 2]
    assert lmkit("pretrain", "-m", "--help") == 0
    assert not lmkit.configs


def test_without_multirun_a_comma_is_part_of_the_value(lmkit: Any) -> None:
    assert "seed=1,2" in lmkit.refused("pretrain", "seed=1,2")
    assert lmkit.config("pretrain", "run.dir=a,b").run.dir == "a,b"
