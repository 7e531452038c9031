"""A run's model, tokenizer and configuration, ready to evaluate, sample or continue from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lmkit.config.data import DatasetConfig
from lmkit.config.model import ModelConfig
from lmkit.config.plain import from_plain
from lmkit.config.training import ExistingRunConfig
from lmkit.console import Console
from lmkit.device import Device
from lmkit.errors import CheckpointError, ConfigError
from lmkit.models.base import LanguageModel
from lmkit.store.checkpoint import Snapshot, load_checkpoint, resolve_checkpoint
from lmkit.store.manifest import read_manifest
from lmkit.store.runs import newest_finished_run, open_run
from lmkit.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class LoadedRun:
    """What a checkpoint of a run holds."""

    path: Path
    """The run directory."""
    checkpoint: Path
    checkpoint_digest: str
    """SHA-256 of the checkpoint's manifest, which pins every file in it."""
    step: int
    model: LanguageModel
    model_config: ModelConfig
    dataset: DatasetConfig
    """The corpus that the run was trained on."""
    tokenizer: Tokenizer
    context: int | None
    """Longest sequence to run it on: what it was trained on, at most what it can do; None for carried state."""
    config: dict[str, Any]
    """The whole stored configuration, as JSON data."""


@dataclass(frozen=True)
class StoredRun:
    """A checkpoint of a run as it lies on disk, before a model is built from it."""

    path: Path
    checkpoint: Path
    snapshot: Snapshot
    tokenizer: Tokenizer
    model_config: ModelConfig
    dataset: DatasetConfig
    seed: int
    seq_len: int

    @property
    def config(self) -> dict[str, Any]:
        """The whole stored configuration, as JSON data."""
        return self.snapshot.config

    @property
    def task(self) -> str:
        """Schema name of what the run learnt last: ``lm`` unless it was finetuned for another task."""
        return str((self.config.get("task") or {}).get("kind", "lm"))


def read_run(config: ExistingRunConfig, console: Console) -> StoredRun:
    """Read ``run.path`` (default: the newest finished run in ``run.root``) at ``run.checkpoint``, and say which it is.

    Raises CheckpointError if there is no such run or its parts do not fit together.
    """
    found = open_run(config.path if config.path is not None else newest_finished_run(config.root))
    checkpoint = resolve_checkpoint(found, config.checkpoint, console.warn)
    console.say(f"run: {found.path}, checkpoint {checkpoint.name}")
    snapshot = load_checkpoint(checkpoint, with_optimizer=False)
    tokenizer = load_tokenizer(checkpoint / "tokenizer", verified=True)
    stored = snapshot.config
    try:
        model_config = from_plain(ModelConfig, stored["model"], where="model")
        dataset = from_plain(DatasetConfig, stored["dataset"], where="dataset")
        vocab_size, seed = int(stored["vocab_size"]), int(stored["seed"])
        seq_len = int(stored["train"]["seq_len"])
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{checkpoint}/config.json does not describe a run: {error}") from None
    if tokenizer.vocab_size != vocab_size:
        raise CheckpointError(
            f"{checkpoint}: the tokenizer has {tokenizer.vocab_size} entries, the model {vocab_size}",
            "the checkpoint was put together from two runs",
        )
    return StoredRun(found.path, checkpoint, snapshot, tokenizer, model_config, dataset, seed, seq_len)


def load_run(config: ExistingRunConfig, *, device: Device, console: Console) -> LoadedRun:
    """The language model of a run: see ``read_run``. Raises CheckpointError also if the weights do not fit."""
    stored = read_run(config, console)
    model = stored.model_config.build(stored.tokenizer.vocab_size, seed=stored.seed)
    load_weights(model, stored.snapshot.model, stored.checkpoint)
    model.to(device.torch_device).eval()
    return LoadedRun(
        path=stored.path,
        checkpoint=stored.checkpoint,
        checkpoint_digest=read_manifest(stored.checkpoint).digest,
        step=stored.snapshot.step,
        model=model,
        model_config=stored.model_config,
        dataset=stored.dataset,
        tokenizer=stored.tokenizer,
        context=None if model.context is None else min(model.context, stored.seq_len),
        config=stored.config,
    )


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Put a checkpoint's weights into a model. Raises CheckpointError if they do not fit."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint}: the weights do not fit the configuration: {reason}") from None
