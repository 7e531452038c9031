"""A run's model, tokenizer and configuration, ready to evaluate, sample or continue from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmkit.config.data import DatasetConfig
from lmkit.config.model import ModelConfig
from lmkit.config.plain import from_plain
from lmkit.config.training import ExistingRunConfig
from lmkit.console import Console
from lmkit.device import Device
from lmkit.errors import CheckpointError, ConfigError
from lmkit.models.base import LanguageModel
from lmkit.store.checkpoint import load_checkpoint, resolve_checkpoint
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


def load_run(config: ExistingRunConfig, *, device: Device, console: Console) -> LoadedRun:
    """Load ``run.path`` (default: the newest finished run in ``run.root``) at ``run.checkpoint``, and say which it is.

    Raises CheckpointError if there is no such run or it does not fit together.
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
    model = model_config.build(vocab_size, seed=seed)
    try:
        model.load_state_dict(snapshot.model)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint}: the weights do not fit the configuration: {reason}") from None
    model.to(device.torch_device).eval()
    return LoadedRun(
        path=found.path,
        checkpoint=checkpoint,
        checkpoint_digest=read_manifest(checkpoint).digest,
        step=snapshot.step,
        model=model,
        model_config=model_config,
        dataset=dataset,
        tokenizer=tokenizer,
        context=None if model.context is None else min(model.context, seq_len),
        config=stored,
    )
