"""Adapters as folders in the layout of the ``peft`` library: adapter_config.json and adapter_model.safetensors.

``PeftModel.from_pretrained(model, FOLDER)`` puts one on lmkit's own model, whose modules it names, and computes the
same. The model of a classifier or regression is that of ``lmkit.models.classifier``, and what stands on its language
model (``head``, ``network``) is among ``modules_to_save``. ``lmkit.json`` says which checkpoint an adapter belongs to
and what it was finetuned for; folders that peft wrote lack it, and are then taken on trust.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lmkit.config.adapter import AdapterConfig
from lmkit.errors import CheckpointError, ConfigError
from lmkit.hf.weights import opened, write_weights
from lmkit.lora import PARTS, adapted_layers, add_adapter
from lmkit.store import storage
from lmkit.tokenizers.base import one_line

CONFIG, WEIGHTS, ORIGIN = "adapter_config.json", "adapter_model.safetensors", "lmkit.json"
PREFIX = "base_model.model."
"""What peft puts before the names of a model's modules."""
MAX_JSON_BYTES = 1 << 24
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "alpha_pattern": ({}, None), "bias": ("none",), "fan_in_fan_out": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the base, too
    "lora_bias": (False, None), "modules_to_save": ([], None), "rank_pattern": ({}, None),
    "trainable_token_indices": ([], None),
}  # fmt: skip
"""Keys of peft's configuration whose other values change what is computed, and the values that do not."""


@dataclass(frozen=True)
class Origin:
    """Where an adapter comes from: what ``lmkit.json`` holds."""

    base: str
    """Checkpoint that was finetuned."""
    base_sha256: str
    """SHA-256 of its manifest."""
    prefix: str = ""
    """Of the names of the language model's modules in the model that was trained; empty: it was itself trained."""
    task: dict[str, Any] | None = None
    """What it was finetuned for, as JSON data; None: not told."""


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter folder that was put on a model."""

    digest: str
    """SHA-256 of its weights' file and scaling."""
    description: str
    """In a few words."""
    task: dict[str, Any] | None
    """What it was finetuned for, as JSON data; None: not told."""


def write_adapter(folder: Path, config: AdapterConfig, weights: Mapping[str, Tensor], origin: Origin) -> None:
    """Write the folder; one that is there is replaced.

    weights: the adapters' tensors by their names in the model, and those of modules beside its language model, which
    were trained as a whole. Raises OSError.
    """
    beside = sorted({name.partition(".")[0] for name in weights if not name.endswith(PARTS)})
    ends = [f"model.{name}" for name in beside]  # of names in peft, which are not those inside the language model
    layers = sorted({name.removesuffix(f".{part}") for name in weights for part in PARTS if name.endswith(part)})
    description: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": origin.base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": layers,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": ends or None,
    }
    temporary = folder.parent / storage.scratch_name(storage.TMP_PREFIX, folder.name)
    temporary.mkdir(parents=True)
    try:
        write_weights(temporary / WEIGHTS, {PREFIX + name: tensor.cpu() for name, tensor in weights.items()})
        for name, data in ((CONFIG, description), (ORIGIN, asdict(origin))):
            storage.write_file(temporary / name, (json.dumps(data, indent=2) + "\n").encode())
        storage.sync_directory(temporary)
        if folder.exists():
            storage.replace_directory(temporary, folder)
        else:
            storage.rename(temporary, folder)
            storage.sync_directory(folder.parent)
    finally:
        if temporary.exists():
            storage.remove_tree(temporary)


def read_adapter(folder: Path, model: nn.Module, base_digest: str) -> FoundAdapter:
    """Put the folder's adapter on a language model, whose weights are then frozen. Modules beside it are left out.

    base_digest: SHA-256 of the manifest of the model's checkpoint. Raises CheckpointError for a folder that is missing,
    damaged, of another base, or does not fit the model.
    """
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"adapter={folder} holds no {CONFIG}", "name a folder that does, as RUN/adapter")
    origin = _read_origin(folder, base_digest)
    prefix = "" if origin is None else origin.prefix
    config = _read_config(folder / CONFIG, prefix)
    tensors = _read_weights(folder / WEIGHTS, prefix)
    for name, tensor in tensors.items():
        if name.endswith(PARTS[0]) and tensor.shape[:1] != (config.rank,):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name} is {list(tensor.shape)}, but {CONFIG} says r={config.rank}",
                "the folder was put together from two adapters",
            )
    try:
        add_adapter(model, config, seed=0)
    except ConfigError as error:
        raise CheckpointError(f"adapter={folder} does not fit the model: {error.problem}", error.remedy) from None
    targets = {f"{name}.{part}": t for name, layer in adapted_layers(model) for part, t in _parts(layer.state_dict())}
    wrong = [f"{name} is missing" for name in targets if name not in tensors]
    wrong += [f"{name} is unknown" for name in tensors if name not in targets]
    wrong += [
        f"{name} is {list(tensors[name].shape)}, not {list(t.shape)}"
        for name, t in targets.items()
        if name in tensors and tensors[name].shape != t.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{folder / WEIGHTS} does not fit the model: {'; '.join(wrong[:3])}{more}",
            "name the run that it was finetuned from",
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])
    identity = hashlib.sha256((folder / WEIGHTS).read_bytes() + f"{config.alpha} {config.use_rslora}".encode())
    kind = ("DoRA" if config.use_dora else "LoRA") + (" (rsLoRA)" if config.use_rslora else "")
    count = sum(t.numel() for t in targets.values())
    description = f"{kind} of rank {config.rank}, {count:,} parameters"
    return FoundAdapter(identity.hexdigest(), description, None if origin is None else origin.task)


def _parts(state: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(part, state[part]) for part in PARTS if part in state]


def _read_origin(folder: Path, base_digest: str) -> Origin | None:
    path = folder / ORIGIN
    if not path.exists():
        return None
    data = _read_json(path)
    texts = all(isinstance(data.get(key), str) for key in ("base", "base_sha256", "prefix"))
    if not texts or not isinstance(data.get("task"), dict | None):
        raise CheckpointError(f"{path} is damaged (base, base_sha256, prefix or task)")
    origin = Origin(data["base"], data["base_sha256"], data["prefix"], data.get("task"))
    if origin.base_sha256 != base_digest:
        raise CheckpointError(
            f"adapter={folder} was finetuned from another checkpoint", f"name that one: run={origin.base}"
        )
    return origin


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with storage.open_regular(path) as file:
            data = json.loads(file.read(MAX_JSON_BYTES).decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({one_line(error)})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged (it holds no object)")
    return data


def _read_config(path: Path, prefix: str) -> AdapterConfig:
    data = _read_json(path)
    if data.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type={str(data.get('peft_type'))[:40]!r} is not LORA", "convert it to LoRA"
        )
    known = {key: values for key, values in UNSUPPORTED.items() if not prefix or key != "modules_to_save"}
    for key, harmless in known.items():
        if data.get(key, harmless[0]) not in harmless:
            raise CheckpointError(f"{path}: {key}={json.dumps(data[key])[:100]} is not supported")
    targets = data.get("target_modules")
    targets = [targets] if isinstance(targets, str) else targets
    rank, alpha = data.get("r"), data.get("lora_alpha")
    flags = {name: data.get(name, False) for name in ("use_rslora", "use_dora")}
    if (
        type(rank) is not int
        or not isinstance(alpha, int | float)
        or not all(isinstance(value, bool) for value in flags.values())
        or not isinstance(targets, list)
        or not all(isinstance(target, str) for target in targets)
    ):
        raise CheckpointError(f"{path} is damaged (r, lora_alpha, target_modules, use_rslora or use_dora)")
    try:
        return AdapterConfig(
            rank=rank, alpha=float(alpha), targets=[target.removeprefix(prefix) for target in targets], **flags
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_weights(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of the language model in fp32 by their names in it."""
    before = PREFIX + prefix
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with opened(path) as (file, found):
            names = [name for name in found if not prefix or name.startswith(before)]
            tensors = {name.removeprefix(before): file.get_tensor(name).float() for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({one_line(error)})") from None
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name} is not finite")
    return tensors
