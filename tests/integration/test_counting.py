"""What is counted is where the device is before it is scored; a Kneser-Ney model has no trainer that would move it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmkit.commands import pretrain
from lmkit.config.commands import PretrainConfig
from lmkit.config.data import ByteTokenizerConfig, TextConfig
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import NgramConfig
from lmkit.config.optimization import AdamwConfig, CosineConfig
from lmkit.config.training import NewRunConfig, TrainConfig
from lmkit.models.ngram import KneserNey


def test_a_counted_model_moves_to_the_device(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[object] = []
    monkeypatch.setattr(KneserNey, "to", lambda self, *args: moved.append(args))
    config = PretrainConfig(
        dataset=TextConfig(path=str(corpus)),
        tokenizer=ByteTokenizerConfig(),
        model=NgramConfig(),
        optimizer=AdamwConfig(),
        schedule=CosineConfig(),
        train=TrainConfig(),
        device=DeviceConfig(type=DeviceType.cpu, threads=1),
        run=NewRunConfig(dir=str(tmp_path / "run"), root=str(tmp_path)),
    )
    pretrain.run(config)
    assert moved == [(torch.device("cpu"),)]
