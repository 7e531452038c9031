"""Presets, recipes and the order in which values win."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lmkit import cli, composing, presets
from lmkit.arguments import Line
from lmkit.config import ROOTS, SCHEMAS
from lmkit.config.optimization import Decay
from lmkit.config.training import Average
from lmkit.keys import field_docs, keys_of, presets_with

GIVEN = {
    "hub": ["dataset.name=a/b"],
    "hf": ["tokenizer.path=tokenizer.json"],
    "classify": ["task.data=rows.csv"],
    "instruct": ["task.data=rows.jsonl"],
    "prefer": ["task.data=rows.jsonl"],
    "regress": ["task.data=rows.csv", "task.numeric=a,b"],
}
NEEDED = {"export": ["to=DIR"]}
OBJECTIVE_OF = {"vae_lstm": "vae", "relgan": "gan"}
"""Models that no other objective trains, and the only models that these train."""
ALONE = ("recipe", "task")
GROUPS = sorted({group for command in cli.COMMANDS for group in presets.groups_of(command)})


def choices_covering_all(command: str) -> list[dict[str, str]]:
    """Choices of presets for a command in which each preset of each group occurs; recipes come alone, and tasks without
    a dataset, which most of them do not take."""
    names = {group: presets.names_in(group) for group in presets.groups_of(command) if group not in ALONE}
    rounds = max((len(known) for known in names.values()), default=1)
    choices = [{group: known[i % len(known)] for group, known in names.items()} for i in range(rounds)]
    for choice in choices:
        if "objective" in choice:
            choice["objective"] = OBJECTIVE_OF.get(choice["model"], "lm")
    beside = {group: known[0] for group, known in names.items() if group != "dataset"}
    for group in set(ALONE) & set(presets.groups_of(command)):
        choices += [{**(beside if group == "task" else {}), group: name} for name in presets.names_in(group)]
    return choices


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_preset_composes_and_converts_to_its_dataclass(lmkit: Any, command: str) -> None:
    for groups in choices_covering_all(command):
        words = [f"{group}={name}" for group, name in groups.items()]
        needed = [word for name in groups.values() for word in GIVEN.get(name, [])]
        config = lmkit.config(command, *words, *needed, *NEEDED.get(command, []))
        assert type(config) is ROOTS[command]
        for group, name in groups.items():
            if group != "recipe":
                schema = presets.schema_name(group, name)
                assert schema is not None
                assert type(getattr(config, group)) is SCHEMAS[group][schema]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_keys_that_are_listed_are_those_that_the_configuration_has(command: str) -> None:
    def leaves(config: Any, prefix: str = "") -> set[str]:
        found = set()
        for name in config:
            node = config._get_node(name)
            inner = OmegaConf.is_dict(node) and not (node._is_none() or node._is_missing())
            found |= leaves(node, f"{prefix}{name}.") if inner else {f"{prefix}{name}"}
        return found

    for groups in choices_covering_all(command)[::4]:
        config = composing.compose(Line(command, groups=groups), partial=True)
        assert leaves(config) == set(keys_of(command, groups)) | ({"dataset"} & leaves(config))


@pytest.mark.parametrize("group", GROUPS)
def test_every_preset_says_in_one_line_what_it_is(group: str) -> None:
    for name in presets.names_in(group):
        text = presets.description(group, name)
        assert text, f"{group}/{name}"
        assert text[0].isupper()
        assert len(text) <= 120


def test_every_field_of_every_dataclass_has_help() -> None:
    seen: set[type] = set()
    todo = [*ROOTS.values(), *(cls for table in SCHEMAS.values() for cls in table.values())]
    while todo:
        cls = todo.pop()
        if cls in seen:
            continue
        seen.add(cls)
        docs = field_docs(cls)
        for field in dataclasses.fields(cls):
            assert docs.get(field.name), f"{cls.__name__}.{field.name}"
            if isinstance(field.default_factory, type) and dataclasses.is_dataclass(field.default_factory):
                todo.append(field.default_factory)
    assert len(seen) > 30


def test_a_root_is_beaten_by_a_preset_that_by_a_recipe_and_that_by_the_command_line(
    lmkit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "configs"
    shutil.copytree(presets.config_dir(), folder)
    root = (folder / "pretrain.yaml").read_text(encoding="utf-8")
    (folder / "pretrain.yaml").write_text(root + "  patience: 7\nseed: 5\n", encoding="utf-8")
    (folder / "recipe" / "mine.yaml").write_text(
        "# @package _global_\n# Mine\ndefaults:\n  - override /model: medium\nmodel:\n  context: 77\n"
        "train:\n  patience: 8\nseed: 6\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(presets, "config_dir", lambda: folder)
    clear_caches()
    try:
        plain = lmkit.config("pretrain")
        assert (plain.model.num_layers, plain.train.patience, plain.seed) == (6, 7, 5)
        mine = lmkit.config("pretrain", "recipe=mine")
        assert (mine.model.num_layers, mine.model.context, mine.train.patience, mine.seed) == (8, 77, 8, 6)
        last = lmkit.config("pretrain", "seed=7", "recipe=mine", "model.context=88", "train.patience=9")
        assert (last.model.context, last.train.patience, last.seed) == (88, 9, 7)
        other = lmkit.config("pretrain", "model=tiny", "recipe=mine")
        assert (other.model.d_model, other.model.context) == (128, 77)
    finally:
        clear_caches()


def clear_caches() -> None:
    presets._text.cache_clear()
    presets.names_in.cache_clear()
    composing._hydra_compose.cache_clear()
    composing.values_in.cache_clear()


def test_an_optimizer_for_finetuning_keeps_its_own_rate(lmkit: Any) -> None:
    assert lmkit.config("finetune").optimizer.lr == 5e-4
    assert lmkit.config("finetune", "optimizer=sgd").optimizer.lr == 1.0


def test_the_learning_rate_of_a_recipe_is_not_taken_over_by_another_kind_of_optimizer(lmkit: Any) -> None:
    for recipe, theirs, own in (("ptb_cpu_10min", "adamw", "sgd"), ("pytorch_lstm_200", "sgd", "adamw")):
        words = ["pretrain", f"recipe={recipe}", f"optimizer={own}"]
        expected = f"recipe={recipe} sets optimizer.lr for optimizer={theirs}: set that of optimizer={own}, too"
        assert lmkit.refused(*words) == expected
        assert lmkit.config(*words, "optimizer.lr=0.1").optimizer.lr == 0.1
    for alike in ("adamw", "adam", "nadam"):
        assert lmkit.config("pretrain", "recipe=ptb_cpu_10min", f"optimizer={alike}").optimizer.lr == 5e-3


def test_a_recipe_and_a_preset_that_lacks_its_keys_do_not_go_together(lmkit: Any) -> None:
    message = lmkit.refused("pretrain", "recipe=ptb_cpu_10min", "model=kn5")
    assert "recipe=ptb_cpu_10min sets model." in message
    assert "leave out the recipe or model=kn5" in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "sentencepiece"),
        (["dataset=ptb"], "word"),
        (["dataset=wikitext2"], "word"),
        (["dataset=wikitext103"], "word"),
        (["dataset=wikitext2_raw"], "sentencepiece"),
        (["dataset=text"], "sentencepiece"),
        (["dataset=ptb", "tokenizer=char"], "char"),
        (["tokenizer=byte", "dataset=ptb"], "byte"),
        (["dataset=ptb", "tokenizer.vocab_size=5000"], "word"),
    ],
)
def test_the_tokenizer_follows_the_dataset_unless_named(lmkit: Any, words: list[str], expected: str) -> None:
    for command in ("prepare", "pretrain"):
        assert type(lmkit.config(command, *words).tokenizer) is SCHEMAS["tokenizer"][expected]


def test_a_recipe_chooses_dataset_and_tokenizer(lmkit: Any) -> None:
    config = lmkit.config("pretrain", "recipe=ptb_cpu_10min")
    assert (config.dataset.name.name, type(config.tokenizer)) == ("ptb", SCHEMAS["tokenizer"]["word"])
    config = lmkit.config("pretrain", "recipe=ptb_cpu_10min", "tokenizer=char")
    assert type(config.tokenizer) is SCHEMAS["tokenizer"]["char"]


SOURCES: dict[str, dict[str, Any]] = {
    # Zaremba et al. 2014, section 4.1, and ptb_word_lm.py, where losses are summed over 20 steps: hence 20 x 1, 5 / 20
    "zaremba_small": {
        "model": {"d_embed": 200, "d_hidden": 200, "num_layers": 2, "tie_embeddings": False, "dropout_output": 0.0},
        "optimizer": {"lr": 20.0, "clip_norm": 0.25, "weight_decay": 0.0},
        "schedule": {"warmup_ratio": 0.0, "factor": 0.5, "num_falls": 9},
        "train": {"batch_size": 20, "seq_len": 20, "max_epochs": 13},
    },
    # main.py of PyTorch's word_language_model, with --tied
    "pytorch_lstm_200": {
        "model": {"d_embed": 200, "d_hidden": 200, "num_layers": 2, "tie_embeddings": True, "dropout_hidden": 0.2},
        "optimizer": {"lr": 20.0, "clip_norm": 0.25, "weight_decay": 0.0},
        "schedule": {"factor": 0.25, "patience": 0},
        "train": {"batch_size": 20, "seq_len": 35, "max_epochs": 40},
        "eval": {"every_steps": 1328},
    },
    # Merity et al. 2018, section 5, and the command of salesforce/awd-lstm-lm
    "awd_lstm": {
        "model": {"d_embed": 400, "d_hidden": 1150, "num_layers": 3, "tie_embeddings": True, "dropout_embed": 0.1}
        | {"dropout_input": 0.4, "dropout_hidden": 0.25, "dropout_output": 0.4, "dropout_recurrent": 0.5},
        "optimizer": {"lr": 30.0, "clip_norm": 0.25, "weight_decay": 1.2e-6, "decay_on": Decay.all},
        "schedule": {"warmup_ratio": 0.0},
        "softmax": {"ar_alpha": 2.0, "tar_beta": 1.0},
        "train": {"batch_size": 20, "seq_len": 70, "seq_len_jitter": True, "max_epochs": 500}
        | {"average": Average.nt_asgd, "asgd_patience": 5},
    },
}


@pytest.mark.parametrize("recipe", SOURCES)
def test_the_recipe_of_a_classic_has_the_values_of_its_source(lmkit: Any, recipe: str) -> None:
    config = lmkit.config("pretrain", f"recipe={recipe}")
    for section, values in SOURCES[recipe].items():
        assert {key: getattr(getattr(config, section), key) for key in values} == values


def test_names_with_dashes_find_the_preset(lmkit: Any) -> None:
    assert type(lmkit.config("pretrain", "schedule=inverse-sqrt").schedule) is SCHEMAS["schedule"]["inverse_sqrt"]


def test_a_group_that_may_be_left_out_can_be_null(lmkit: Any) -> None:
    assert lmkit.config("pretrain", "recipe=null") == lmkit.config("pretrain")
    assert lmkit.config("eval-ppl", "dataset=null").dataset is None
    assert "model=null is unknown" in lmkit.refused("pretrain", "model=null")


def test_presets_with_a_key_are_found() -> None:
    assert presets_with("pretrain", "model.cell") == [f"model={n}" for n in ("awd_lstm", "gru", "lstm", "mogrifier")]
    assert presets_with("eval-ppl", "dataset.text_field") == ["dataset=jsonl"]
    assert presets_with("pretrain", "seed") == []


def test_composing_leaves_nothing_behind(lmkit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lmkit.config("pretrain", "run.dir=somewhere")
    assert os.listdir(tmp_path) == []
