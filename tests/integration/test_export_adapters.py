"""Runs finetuned by adapters leave as plain models: the adapter is merged into the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmkit import cli
from lmkit.commands import export, finetune, pretrain
from lmkit.config.adapter import AdapterConfig
from lmkit.config.commands import FinetuneConfig, PretrainConfig
from lmkit.config.data import TextConfig
from lmkit.config.export import ExportConfig
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.optimization import AdamwConfig, CosineConfig
from lmkit.config.training import EvalConfig, ExistingRunConfig, RunConfig, TrainConfig
from lmkit.console import Console
from lmkit.device import resolve_device
from lmkit.hf import import_hf
from lmkit.loading import load_run
from lmkit.models.base import LanguageModel

CPU = DeviceConfig(type=DeviceType.cpu, threads=1)
TOKENS = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))


def existing(run: Path) -> ExistingRunConfig:
    return ExistingRunConfig(path=str(run), root=str(run.parent))


def logits(model: LanguageModel) -> Tensor:
    with torch.no_grad():
        return model.eval().head.logits(model(TOKENS)[0])


@pytest.mark.parametrize("dora", [False, True])
def test_a_finetuned_run_and_its_base_with_the_adapter_are_exported_merged(
    tmp_path: Path, corpus: Path, config: Callable[..., PretrainConfig], dora: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    pretrain.run(config(run="base"))
    finetune.run(
        FinetuneConfig(
            dataset=TextConfig(path=str(corpus)),
            optimizer=AdamwConfig(lr=3e-2),
            schedule=CosineConfig(),
            device=CPU,
            train=TrainConfig(batch_size=4, seq_len=16, max_steps=6),
            eval=EvalConfig(every_steps=3),
            run=RunConfig(path=str(base), dir=str(tuned), root=str(tmp_path)),
            adapter=AdapterConfig(rank=4, use_dora=dora),
        )
    )
    export.run(ExportConfig(run=existing(tuned), to=str(tmp_path / "one")))
    words = [f"run={base}", f"adapter={tuned / 'adapter'}", f"to={tmp_path / 'two'}"]
    assert cli.main(["export", *words]) == 0
    expected = logits(load_run(existing(tuned), device=resolve_device(CPU), console=Console()).model)
    before = logits(load_run(existing(base), device=resolve_device(CPU), console=Console()).model)
    assert float((expected - before).abs().max()) > 0.01
    for name in ("one", "two"):
        assert float((logits(import_hf(tmp_path / name).build()) - expected).abs().max()) < 1e-4
        assert json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))["model_type"] == "llama"
    first, second = ((tmp_path / name / "README.md").read_text(encoding="utf-8") for name in ("one", "two"))
    assert "perplexity per token" in first
    assert "perplexity per token" not in second
    assert f"# base with {tuned / 'adapter'}" in second
    assert cli.main(["export", f"run={base}", f"adapter={base}", f"to={tmp_path / 'three'}"]) == 4
    assert "adapter=" in capsys.readouterr().err
