"""A run's model, tokenizer and configuration, ready to evaluate, sample or continue from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lmkit.config.adapter import AdapterConfig
from lmkit.config.data import DatasetConfig
from lmkit.config.model import ModelConfig
from lmkit.config.plain import from_plain
from lmkit.config.tasks import TaskConfig
from lmkit.config.training import ExistingRunConfig
from lmkit.console import Console
from lmkit.device import Device
from lmkit.errors import CheckpointError, ConfigError, DataError
from lmkit.hf import import_hf, resolve_hf
from lmkit.hf.adapters import ORIGIN, read_adapter
from lmkit.lora import add_adapter, merge_adapter
from lmkit.models.base import LanguageModel
from lmkit.store.browse import Status, is_run, newest_finished_run, status_of
from lmkit.store.checkpoint import Snapshot, load_checkpoint, resolve_checkpoint
from lmkit.store.found import RUN_INFO, FoundRun, open_run
from lmkit.store.manifest import TOKENIZER, read_manifest
from lmkit.tokenizers import Tokenizer, load_tokenizer
from lmkit.tuning import language_model_in

NO_LANGUAGE_MODEL = {"classify": "classifier", "regress": "regression"}
"""Tasks after which a run predicts no text, and what it is then."""
BACKBONE = "backbone."
"""What stands before the names of the language model in these."""
_UNFINISHED = {
    Status.running: " (the run is still training)",
    Status.stopped: " (the run was stopped before its end)",
    Status.diverged: " (the run diverged before its end)",
    Status.crashed: " (the run was broken off before its end)",
}
"""What to say of a run whose checkpoint is not the last of it."""


@dataclass(frozen=True)
class LoadedRun:
    """What a checkpoint of a run holds."""

    path: Path
    """The run directory."""
    checkpoint: Path
    checkpoint_digest: str
    """SHA-256 of the checkpoint's manifest, which pins every file in it; with an adapter, of that and the adapter's."""
    step: int
    model: LanguageModel
    model_config: ModelConfig
    dataset: DatasetConfig
    """The corpus that the run was trained on."""
    tokenizer: Tokenizer
    context: int | None
    """Longest sequence to run it on: what it was trained on, at most what it can do; None for carried state."""
    config: dict[str, Any]
    """The whole stored configuration, as JSON data; empty where a model of others does not tell how it was trained."""
    data_digest: str = ""
    """Of the prepared data that the run learnt last; empty where that is not known."""


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


def folder_of(name: str, root: str) -> str:
    """The folder of a run that is named by it, or, where there is no such folder, by its name in ``root``."""
    inside = Path(root) / name
    return str(inside) if not os.path.exists(os.path.expanduser(name)) and is_run(inside) else name


def find_checkpoint(config: ExistingRunConfig, console: Console) -> tuple[FoundRun, Path]:
    """The run ``run.path`` (default: the newest finished run in ``run.root``), and ``run.checkpoint`` of it.

    Raises CheckpointError if there is no such run or checkpoint.
    """
    found = open_run(newest_finished_run(config.root) if config.path is None else folder_of(config.path, config.root))
    return found, resolve_checkpoint(found, config.checkpoint, console.warn)


def read_run(config: ExistingRunConfig, console: Console) -> StoredRun:
    """Read the checkpoint that ``find_checkpoint`` gives, and say which it is.

    Raises CheckpointError if there is no such run or its parts do not fit together.
    """
    found, checkpoint = find_checkpoint(config, console)
    is_run = (found.path / RUN_INFO).is_file()  # and not a checkpoint that was copied elsewhere
    unfinished = _UNFINISHED.get(status_of(found.path), "") if is_run else ""
    console.say(f"run: {found.path}, checkpoint {checkpoint.name}{unfinished}")
    snapshot = load_checkpoint(checkpoint, with_optimizer=False, allow_nonfinite=config.allow_nonfinite)
    try:
        tokenizer = load_tokenizer(checkpoint / TOKENIZER)
    except DataError:
        read_manifest(checkpoint)  # raises if the checkpoint was retired by its run meanwhile
        raise
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


def load_run(
    config: ExistingRunConfig,
    *,
    device: Device,
    console: Console,
    adapter: str | None = None,
    latent: bool = False,
    inside: bool = False,
) -> LoadedRun:
    """The language model of a run: see ``read_run``. Adapters, the run's own and that of a folder, are merged into it.

    ``latent``: the caller knows what to do with a sentence VAE, whose next words depend on a latent vector. ``inside``:
    of a classifier or a regression on texts, the language model inside it will do. Raises CheckpointError also if the
    weights or the adapter do not fit, ConfigError for a run that is no language model.
    """
    stored = read_run(config, console)
    if stored.model_config.objective == "vae" and not latent:
        raise ConfigError(
            f"{stored.path} is a sentence VAE, which has no probability of a next word",
            "use it as run= of eval-ppl or generate",
        )
    if stored.task in NO_LANGUAGE_MODEL:
        what = NO_LANGUAGE_MODEL[stored.task]
        if not inside:
            raise ConfigError(f"{stored.path} is a {what}", f"use lmkit finetune run={stored.path} predict=FILE")
        stored = _inside(stored)
        console.say(f"{stored.path} is a {what}: starting from the language model inside it, without its head")
    model = stored.model_config.build(stored.tokenizer.vocab_size, seed=stored.seed)
    put_weights(stored, model)
    manifest = read_manifest(stored.checkpoint)
    digest = manifest.digest
    if adapter is not None:
        found = read_adapter(Path(adapter), model, digest)
        merge_adapter(model)
        console.say(f"adapter: {adapter}, {found.description}")
        digest = hashlib.sha256(f"{digest}{found.digest}".encode()).hexdigest()
        stored = _finetuned_for(found.task, stored, Path(adapter) / ORIGIN)
    model.to(device.torch_device).eval()
    return LoadedRun(
        path=stored.path,
        checkpoint=stored.checkpoint,
        checkpoint_digest=digest,
        step=stored.snapshot.step,
        model=model,
        model_config=stored.model_config,
        dataset=stored.dataset,
        tokenizer=stored.tokenizer,
        context=None if model.context is None else min(model.context, stored.seq_len),
        config=stored.config,
        data_digest=manifest.digests.get("data", ""),
    )


def _inside(stored: StoredRun) -> StoredRun:
    """A classifier or regression as the language model that it stands on. Raises ConfigError if there is none."""
    weights = stored.snapshot.model
    inner = {name.removeprefix(BACKBONE): tensor for name, tensor in weights.items() if name.startswith(BACKBONE)}
    if not inner:
        raise ConfigError(f"{stored.path} is a regression on numbers alone", "name a run that has read texts")
    return replace(stored, snapshot=replace(stored.snapshot, model=inner))


def _finetuned_for(task: dict[str, Any] | None, stored: StoredRun, source: Path) -> StoredRun:
    """The run as one that was finetuned for an adapter's task; ``source``: where that stands."""
    if task is None:
        return stored
    try:
        from_plain(TaskConfig, task, where="task")
    except ConfigError as error:
        raise CheckpointError(f"{source} does not describe a task: {error}") from None
    return replace(stored, snapshot=replace(stored.snapshot, config={**stored.config, "task": task}))


def load_hf(name: str, dataset: DatasetConfig, *, device: Device, console: Console) -> LoadedRun:
    """A model of a Hugging Face folder or of the hub, as if it were a run; ``dataset``: what it will be trained on.

    Raises what ``lmkit.hf.import_hf`` raises.
    """
    folder = resolve_hf(name)
    imported = import_hf(folder)
    console.say(f"start: {folder}, {imported.family}")
    model = imported.build().to(device.torch_device)
    return LoadedRun(
        path=folder,
        checkpoint=folder,
        checkpoint_digest=_digest(imported.state_dict),
        step=0,
        model=model,
        model_config=imported.model_config,
        dataset=dataset,
        tokenizer=imported.tokenizer,
        context=model.context,
        config={},
    )


def _digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and values."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode())
        found.update(weights[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def put_weights(stored: StoredRun, model: nn.Module) -> None:
    """Put a run's weights into the model of its task, and merge the adapter that the run was finetuned with, if any.

    Raises CheckpointError if they do not fit.
    """
    data = stored.config.get("adapter")
    found = None if data is None else language_model_in(model)
    if found is not None:
        try:
            add_adapter(found[1], from_plain(AdapterConfig, data, where="adapter"), seed=stored.seed)
        except ConfigError as error:
            raise CheckpointError(f"{stored.checkpoint}/config.json does not describe a run: {error}") from None
    load_weights(model, stored.snapshot.model, stored.checkpoint)
    if found is not None:
        merge_adapter(found[1])


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Put a checkpoint's weights into a model. Raises CheckpointError if they do not fit."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint}: the weights do not fit the configuration: {reason}") from None
