"""init=hf:DIR: pretrain and finetune start from a Hugging Face folder, with its tokenizer."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lmkit.commands import export, finetune, pretrain, replay
from lmkit.config.chat import InstructTaskConfig, PreferTaskConfig
from lmkit.config.commands import FinetuneConfig, PretrainConfig
from lmkit.config.export import ExportConfig
from lmkit.config.model import RecurrentConfig, TransformerConfig
from lmkit.config.optimization import AdamwConfig, ConstantConfig
from lmkit.config.start import BiasInit, EmbeddingInit, InitConfig, StartConfig
from lmkit.config.training import ExistingRunConfig, LogConfig, RunConfig, SaveConfig
from lmkit.console import Console
from lmkit.errors import ConfigError
from lmkit.hf import ImportedModel, import_hf
from lmkit.models.dropout import DropPath
from lmkit.session import Session
from lmkit.store.checkpoint import list_checkpoints, load_checkpoint
from lmkit.store.found import read_metrics

MakeConfig = Callable[..., PretrainConfig]


@pytest.fixture
def first(config: MakeConfig) -> PretrainConfig:
    cfg = config(max_steps=6)
    pretrain.run(cfg)
    return cfg


@pytest.fixture
def folder(first: PretrainConfig, tmp_path: Path) -> Path:
    run, to = ExistingRunConfig(path=first.run.dir), tmp_path / "hf"
    export.run(ExportConfig(run=run, to=str(to)))
    return to


def weights(run_dir: str | None, step: int) -> dict[str, torch.Tensor]:
    paths = {int(path.name.removeprefix("step-")): path for path in list_checkpoints(Path(str(run_dir)))}
    return load_checkpoint(paths[step], with_optimizer=False).model


def test_pretraining_starts_from_the_weights_of_the_folder_and_takes_its_model_and_tokenizer(
    first: PretrainConfig, folder: Path, tmp_path: Path
) -> None:
    """With a learning rate of next to nothing the first checkpoint is what it started from."""
    cfg = replace(
        first,
        model=replace(first.model, num_layers=1, d_model=16),
        init=InitConfig(weights=f"hf:{folder}"),
        optimizer=AdamwConfig(lr=1e-30, weight_decay=0.0),
        schedule=ConstantConfig(warmup_ratio=0.0),
        save=SaveConfig(every_steps=1),
        run=RunConfig(root=first.run.root, dir=str(tmp_path / "second")),
    )
    pretrain.run(cfg)
    before, after = weights(first.run.dir, 6), weights(cfg.run.dir, 6)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    stored = load_checkpoint(list_checkpoints(Path(str(cfg.run.dir)))[-1], with_optimizer=False).config
    assert stored["model"]["num_layers"] == 2
    assert stored["init"]["weights"] == f"hf:{folder}"


def test_the_regularisers_that_are_asked_for_go_with_the_model_of_the_folder(
    first: PretrainConfig, folder: Path, tmp_path: Path
) -> None:
    asked = {"dropout": 0.3, "attention_dropout": 0.05, "dropout_embed": 0.1, "dropout_locked": True, "drop_path": 0.2}
    cfg = replace(
        first,
        model=TransformerConfig(num_layers=1, d_model=16, num_heads=1, **asked),  # type: ignore[arg-type]
        init=InitConfig(weights=f"hf:{folder}"),
        run=RunConfig(root=first.run.root, dir=str(tmp_path / "second")),
    )
    imported = pretrain.prepare_data(cfg, Console())[1]
    assert imported is not None
    assert any(isinstance(module, DropPath) for module in imported.build().modules())
    pretrain.run(cfg)
    stored = load_checkpoint(list_checkpoints(Path(str(cfg.run.dir)))[-1], with_optimizer=False).config["model"]
    assert {name: stored[name] for name in asked} == asked
    assert stored["num_layers"] == 2
    pretrain.run(replace(cfg, resume=True))
    with pytest.raises(ConfigError, match=r"model\.dropout: 0\.3 -> 0\.4"):
        pretrain.run(replace(cfg, resume=True, model=replace(cfg.model, dropout=0.4)))  # type: ignore[call-arg]


def test_what_is_set_beside_the_weights_of_a_folder_and_would_do_nothing_is_refused_before_it_is_read(
    first: PretrainConfig,
) -> None:
    init = InitConfig(weights="hf:x/y", embeddings=EmbeddingInit.cooccurrence, output_bias=BiasInit.zero)
    both = r"init\.embeddings=cooccurrence has no use with init\.weights=hf:x/y.*init\.output_bias=zero has no use"
    with pytest.raises(ConfigError, match=both):
        pretrain.run(replace(first, init=init, resume=True))
    with pytest.raises(ConfigError, match=r"model=recurrent has no use with .*which is a Transformer"):
        pretrain.run(replace(first, init=InitConfig(weights="hf:x/y"), model=RecurrentConfig(), resume=True))


def test_a_run_that_started_from_a_folder_is_resumed_and_replayed(
    first: PretrainConfig, folder: Path, tmp_path: Path
) -> None:
    cfg = replace(
        first,
        init=InitConfig(weights=f"hf:{folder}"),
        log=LogConfig(every_steps=1),
        save=SaveConfig(every_steps=2),
        run=RunConfig(root=first.run.root, dir=str(tmp_path / "second")),
    )
    pretrain.run(replace(cfg, train=replace(cfg.train, max_steps=4)))
    pretrain.run(replace(cfg, resume=True))
    logged = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "second") if "loss" in row}
    assert replay.replay(tmp_path / "second", 1, Console())["loss"] == logged[1]
    assert replay.replay(tmp_path / "second", 6, Console())["loss"] == logged[6]


def test_the_weights_of_the_folder_are_held_once(
    first: PretrainConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, execute = list[weakref.ref[torch.Tensor]](), Session.execute

    def imported(path: Path) -> ImportedModel:
        found = import_hf(path)
        read.extend(map(weakref.ref, found.state_dict.values()))
        return found

    def executed(self: Session) -> Any:
        gc.collect()
        assert not any(tensor() is not None for tensor in read)
        return execute(self)

    monkeypatch.setattr(pretrain, "import_hf", imported)
    monkeypatch.setattr(Session, "execute", executed)
    run = RunConfig(root=first.run.root, dir=str(tmp_path / "second"))
    pretrain.run(replace(first, init=InitConfig(weights=f"hf:{folder}"), run=run))
    assert len(read) > 10


def tuning(first: PretrainConfig, folder: Path, tmp_path: Path, **changes: Any) -> FinetuneConfig:
    """A finetuning of the folder's model on what ``first`` is trained on, as long."""
    return FinetuneConfig(
        dataset=first.dataset,
        optimizer=first.optimizer,
        schedule=first.schedule,
        device=first.device,
        train=first.train,
        init=StartConfig(weights=f"hf:{folder}"),
        run=RunConfig(root=first.run.root, dir=str(tmp_path / "tuned")),
        **changes,
    )


def test_finetuning_starts_from_a_folder_instead_of_a_run(first: PretrainConfig, folder: Path, tmp_path: Path) -> None:
    result = finetune.run(tuning(first, folder, tmp_path, log=LogConfig(every_steps=1)))
    assert result["step"] == 6
    assert "forgetting" not in result, "nobody knows what the folder's model was trained on"
    logged = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "tuned") if "loss" in row}
    assert replay.replay(tmp_path / "tuned", 2, Console())["loss"] == logged[2]


@pytest.mark.parametrize("kind", ["instruct", "prefer"])
def test_conversations_are_learnt_from_a_folder_which_has_no_template_of_its_own(
    kind: str, first: PretrainConfig, folder: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": str(i), "response": "ab", "chosen": "ab", "rejected": "cd"} for i in range(6)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tasks = {"instruct": InstructTaskConfig(data=str(data)), "prefer": PreferTaskConfig(data=str(data))}
    cfg = tuning(first, folder, tmp_path, task=tasks[kind], save=SaveConfig(every_steps=3))
    finetune.run(replace(cfg, train=replace(cfg.train, max_steps=3)))
    result = finetune.run(replace(cfg, resume=True))
    assert result["step"] == 6
    assert "forgetting" not in result
    stored = load_checkpoint(list_checkpoints(tmp_path / "tuned")[-1], with_optimizer=False).config
    assert (stored["task"]["kind"], stored["task"]["template"]) == (kind, "plain")


def test_a_run_and_a_folder_at_once_are_refused(first: PretrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"init\.weights=hf:x and run= both say what to start from"):
        FinetuneConfig(
            dataset=first.dataset,
            optimizer=first.optimizer,
            schedule=first.schedule,
            train=first.train,
            init=StartConfig(weights="hf:x"),
            run=RunConfig(path="y"),
        )


@pytest.mark.parametrize("text", ["gpt2", "hf:", ""])
def test_what_init_names_begins_with_hf(text: str) -> None:
    with pytest.raises(ConfigError, match=r"must be hf:NAME_OR_DIR or null"):
        StartConfig(weights=text)
