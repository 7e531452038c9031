"""What is counted is where the device is before it is scored, and takes no keys that say how gradients are followed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmkit import cli
from lmkit.commands import pretrain
from lmkit.config.commands import PretrainConfig
from lmkit.config.data import ByteTokenizerConfig, TextConfig
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import NgramConfig
from lmkit.config.optimization import AdamwConfig, CosineConfig
from lmkit.config.training import NewRunConfig, TrainConfig
from lmkit.models.ngram import KneserNey


def test_a_counted_model_moves_to_the_device(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Kneser-Ney model has no trainer that would move it."""
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


def test_a_logger_that_gets_nothing_of_a_counted_model_is_told(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lmkit.commands.place.require_logger", lambda config: None)
    words = ["dataset=text", f"dataset.path={corpus}", "tokenizer=byte", "device=cpu", "device.threads=1"]
    assert cli.main(["pretrain", "model=kn5", *words, "logger=wandb", f"run.dir={tmp_path / 'run'}"]) == 0
    assert "warning: logger=wandb gets nothing: a model that counts makes no steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["train.shuffle=blocks", "train.seq_len_jitter=true", "train.order=windows"],
        ["softmax.ar_alpha=2", "softmax.tar_beta=1", "softmax.label_smoothing=0.1", "train.average=swa"],
        ["softmax=sampled", "train.ema_decay=0.9"],
        ["init.embeddings=cooccurrence", "init.output_bias=zero", "eval.sample_tokens=60"],
    ],
)
def test_keys_that_a_counted_model_would_ignore_are_refused_by_name_before_any_work(
    words: list[str], tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["dataset=text", f"dataset.path={corpus}", "tokenizer=byte", "device=cpu", f"run.dir={tmp_path / 'run'}"]
    assert cli.main(["pretrain", "model=kn5", *place, *words]) == 2
    found = capsys.readouterr().err.splitlines()[-1]
    assert all(f"{word} has no use with a model that counts" in found for word in words)
    assert not (tmp_path / "run").exists()
