"""lmkit explain: every key and group has its text, which says what the composed configuration says."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from lmkit.arguments import Line
from lmkit.cli import COMMANDS
from lmkit.completion import candidates
from lmkit.composing import compose
from lmkit.config.text import format_value
from lmkit.explain import explain
from lmkit.keys import every_key, keys_of, type_text
from lmkit.presets import default_of, groups_of, names_in


@pytest.mark.parametrize("command", COMMANDS)
def test_every_key_and_group_of_every_command_is_explained(command: str) -> None:
    for key, hint in every_key(command).items():
        first, second, *_ = explain(key, command).splitlines()
        assert first == f"{key}   [{type_text(hint)}]"
        assert len(second.strip()) > 3, f"{key} has no text"
    for group in groups_of(command):
        text = explain(group, command)
        assert f"({command})" in text
        assert all(f"  {name} " in text or f"  {name}\n" in text for name in names_in(group))
        for name in names_in(group):
            assert explain(f"{group}={name}").startswith(f"{group}={name}\n  ")


def test_the_default_is_what_the_command_composes() -> None:
    """All keys of pretrain that belong to no group: the value in its YAML file wins over that of the dataclass."""
    from omegaconf import OmegaConf

    config = compose(Line("pretrain"))
    for key in keys_of("pretrain", {}):
        if key.partition(".")[0] in groups_of("pretrain"):
            continue
        assert f"default: {format_value(OmegaConf.select(config, key))}" in explain(key, "pretrain").splitlines(), key


def test_the_value_of_a_preset_is_what_choosing_it_composes() -> None:
    from omegaconf import OmegaConf

    names = {group: names_in(group) for group in ("model", "optimizer", "schedule", "softmax", "logger")}
    for number in range(max(map(len, names.values()))):
        chosen = {group: known[number % len(known)] for group, known in names.items()}
        config, keys = compose(Line("pretrain", groups=chosen), partial=True), keys_of("pretrain", chosen)
        for group, name in chosen.items():
            lines = explain(f"{group}={name}", "pretrain").splitlines()
            for key in (key for key in keys if key.startswith(f"{group}.")):
                (line,) = [line for line in lines if line.startswith(f"  {key}=")]
                value, shown = OmegaConf.select(config, key), line.partition("=")[2]
                assert shown == format_value(value), key


def test_presets_with_values_of_their_own_and_recipes_are_listed(lmkit: Any) -> None:
    assert lmkit("explain", "optimizer.lr") == 0
    assert "  optimizer=adamw_finetune  0.0005" in lmkit.out
    assert "recipe=ptb_cpu_10min (0.005)" in lmkit.out
    assert lmkit("explain", "train.budget") == 0
    assert "commands: pretrain, finetune" in lmkit.out
    assert "recipe=ptb_cpu_10min (10m)" in lmkit.out


def test_a_recipe_shows_what_it_chooses_and_sets(lmkit: Any) -> None:
    assert lmkit("explain", "recipe=ptb_cpu_10min") == 0
    assert "  model=lstm\n" in lmkit.out
    assert "  train.budget=10m" in lmkit.out


def test_a_part_lists_its_keys_with_the_commands_that_have_them(lmkit: Any) -> None:
    assert lmkit("explain", "save", "pretrain") == 0
    assert lmkit.out.startswith("save   [a part of the configuration of pretrain]\n  Checkpoints.\n")
    assert "  save.keep " in lmkit.out
    assert lmkit("explain", "run") == 0
    assert "  finetune: run=DIR: the run to start from; run.dir=DIR: the run to make.\n" in lmkit.out
    assert "  run=VALUE is short for run.path=VALUE (finetune, eval-ppl, generate, export)\n" in lmkit.out
    for key in {key for command in COMMANDS for key in every_key(command) if key.startswith("run.")}:
        assert f"\n  {key} " in lmkit.out
    text = " ".join(lmkit.out.split())
    assert "run.dir Directory of the run to make; null: a new one in run.root, named after the time" in text
    assert "dataset and model. (pretrain, finetune) run.lock" in text
    assert text.endswith("run.root Folder in which runs are made and looked for.")  # in all of them


def test_a_group_that_other_commands_have_as_a_key_is_both(lmkit: Any) -> None:
    assert lmkit("explain", "adapter") == 0
    assert "adapter   [a group: adapter=NAME]\n" in lmkit.out
    assert "adapter   [text or null]\n  Folder of an adapter that was finetuned from the run" in lmkit.out
    assert lmkit.out.endswith("commands: eval-ppl, generate, export\ndefault: null\n")


def test_a_part_with_a_short_form_is_more_than_that_form(lmkit: Any) -> None:
    assert lmkit("explain", "init") == 0
    assert "  init=VALUE is short for init.weights=VALUE\n" in lmkit.out
    assert {"init.embeddings", "init.output_bias", "init.weights"} <= set(lmkit.out.split())
    assert lmkit("explain", "run", "pretrain") == 0  # where run=DIR is none
    assert "  run.dir " in lmkit.out
    assert "short" not in lmkit.out
    assert lmkit("explain", "run=runs/a", "eval-ppl") == 0
    assert lmkit.out.startswith("run.path   [")
    assert "  run=VALUE is short for it\n" in lmkit.out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["optimizr"], ["'optimizr' is no key or group", "did you mean optimizer?"]),
        (["train.budget", "generate"], ["'train.budget' is no key or group of generate"]),
        (["train.budget", "pretrian"], ["unknown command 'pretrian'", "pretrain"]),
        (["optimizer=adm"], ["optimizer=adm is unknown", "adam"]),
        (["model=awd-lsx"], ["model=awd-lsx is unknown", "awd_lstm"]),
        (["a", "b", "c"], ["'c' is too much"]),
        ([""], ["'' is no key or group"]),
    ],
)
def test_a_mistake_is_one_line_that_says_what_was_meant(lmkit: Any, words: list[str], parts: list[str]) -> None:
    assert lmkit("explain", *words) == 2
    (line,) = lmkit.err.splitlines()
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("words", [["explain"], ["explain", "--help"], ["help", "explain"]])
def test_without_a_key_it_says_how_it_is_used(lmkit: Any, words: list[str]) -> None:
    assert lmkit(*words) == 0
    assert "usage: lmkit explain KEY [COMMAND]" in lmkit.out


def test_completion_offers_keys_groups_presets_and_commands() -> None:
    assert candidates(["--line", "lmkit expl"]).split() == ["explain"]
    assert candidates(["--line", "lmkit explain train.bud"]).split() == ["train.budget"]
    assert candidates(["--line", "lmkit explain optimizer=ada"]).split()[:2] == [
        "optimizer=adadelta",
        "optimizer=adagrad",
    ]
    assert candidates(["--line", "lmkit explain train.budget fine"]).split() == ["finetune"]


def test_it_imports_neither_torch_nor_hydra() -> None:
    script = (
        "import sys; from lmkit.cli import main; main(['explain', 'optimizer.lr'])\n"
        "print([m for m in ('torch', 'hydra', 'datasets', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_the_default_of_a_group_is_said_for_each_command() -> None:
    assert default_of("finetune", "optimizer") == "adamw_finetune"
    assert "default: adamw (pretrain), adamw_finetune (finetune)" in explain("optimizer")
