"""Small pretrained runs, for tests of what comes after pretraining."""

from __future__ import annotations

from pathlib import Path

from lmkit.commands import pretrain
from lmkit.config.commands import PretrainConfig
from lmkit.config.data import DatasetConfig, TokenizerConfig
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import ModelConfig
from lmkit.config.optimization import AdamwConfig, CosineConfig
from lmkit.config.training import EvalConfig, RunConfig, TrainConfig


def pretrain_small(
    run: Path,
    dataset: DatasetConfig,
    model: ModelConfig,
    tokenizer: TokenizerConfig,
    train: TrainConfig,
    *,
    lr: float = 1e-2,
    seed: int = 1,
) -> None:
    """A run in the folder ``run``, validated every 25 steps and at its end."""
    pretrain.run(
        PretrainConfig(
            dataset=dataset,
            tokenizer=tokenizer,
            model=model,
            optimizer=AdamwConfig(lr=lr),
            schedule=CosineConfig(),
            device=DeviceConfig(type=DeviceType.cpu, threads=1),
            train=train,
            eval=EvalConfig(every_steps=25),
            run=RunConfig(dir=str(run), root=str(run.parent)),
            seed=seed,
        )
    )
