"""What the integration tests share: a small own-text corpus, and small configurations."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lmkit.config.commands import PretrainConfig
from lmkit.config.data import ByteTokenizerConfig, TextConfig
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import ModelConfig, TransformerConfig
from lmkit.config.optimization import AdamwConfig, CosineConfig
from lmkit.config.training import EvalConfig, RunConfig, TrainConfig

WORDS = [
    "the",
    "cat",
    "dog",
    "bird",
    "sat",
    "ran",
    "flew",
    "on",
    "under",
    "a",
    "mat",
    "tree",
    "and",
    "我们",
    "喜欢",
    "学习",
]

TINY_TRANSFORMER = TransformerConfig(d_model=32, num_layers=2, num_heads=2, context=32, dropout=0.1)

MakeConfig = Callable[..., PretrainConfig]


@pytest.fixture(autouse=True)
def _no_corpora_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LMKIT_DATA", raising=False)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 small texts with some structure to learn."""
    folder = tmp_path_factory.mktemp("notes")
    generator = random.Random(0)
    for number in range(30):
        lines = [" ".join(generator.choice(WORDS) for _ in range(8)) + "." for _ in range(12)]
        (folder / f"{number:02d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> MakeConfig:
    """A maker of small pretraining configurations; keywords replace fields of ``train``."""

    def make(
        model: ModelConfig = TINY_TRANSFORMER, *, run: str = "run", resume: bool = False, **train: object
    ) -> PretrainConfig:
        values = {"batch_size": 4, "seq_len": 16, "max_steps": 12} | train
        return PretrainConfig(
            dataset=TextConfig(path=str(corpus)),
            tokenizer=ByteTokenizerConfig(),
            model=model,
            optimizer=AdamwConfig(lr=3e-3),
            schedule=CosineConfig(),
            device=DeviceConfig(type=DeviceType.cpu, threads=1),
            train=TrainConfig(**values),  # type: ignore[arg-type]
            eval=EvalConfig(every_steps=2),
            run=RunConfig(dir=str(tmp_path / run), root=str(tmp_path)),
            resume=resume,
        )

    return make
