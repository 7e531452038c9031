"""Tensors of a family's files: which files hold them, and the way to the Transformer's parameters and back.

The ``safetensors`` library checks every header it reads, and ``opened`` its length and the names before anything is
made of them. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmkit.config.model import Positions, TransformerConfig
from lmkit.errors import ConfigError, DataError
from lmkit.hf.family import Family, Row
from lmkit.hf.keys import read_json
from lmkit.models.positions import sinusoidal_table
from lmkit.models.transformer import d_ff
from lmkit.store import storage
from lmkit.store.manifest import MAX_TENSORS, check_tensor_name
from lmkit.tokenizers.base import one_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64", "F32", "F16", "BF16"}
MAX_HEADER_BYTES = 8 << 20
"""Of a file of others. 20,000 tensors have about 3 MB; the library takes 100 MB, and much more memory for them."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Any, list[str]]]:
    """A safetensors file of others and the names of its tensors. Raises SafetensorError, OSError, or ValueError for a
    header or a name that no model has."""
    with path.open("rb") as start:
        size = int.from_bytes(start.read(8), "little")
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {size:,} bytes, more than {MAX_HEADER_BYTES:,}")
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if len(names) > MAX_TENSORS:
            raise ValueError(f"{len(names):,} tensors, more than {MAX_TENSORS:,}")
        for name in names:
            check_tensor_name(name)
        yield file, names


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises DataError if there are none, or some of them are missing."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickled:
            raise DataError(
                f"{folder} has its weights in {pickled[0]} only, a pickle, which can run code when it is read",
                f"convert it to {WEIGHTS}: model.save_pretrained(DIR) in transformers writes one",
            )
        raise DataError(f"{folder} has no {WEIGHTS}", "name a folder with config.json, *.safetensors, tokenizer.json")
    table = read_json(folder / INDEX).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise DataError(f"{folder / INDEX} is damaged (it has no weight_map)")
    names = sorted(set(table.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise DataError(f"{folder / INDEX} names {name!r}, which is no safetensors file of the folder")
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing, which {INDEX} names", "download the folder again")
    return [folder / name for name in names]


def read_weights(folder: Path, family: Family) -> dict[str, Tensor]:
    """Every tensor of the folder in fp32 under its full name, the family's computed ones left out."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            with opened(path) as (file, names):
                for name in names:
                    if name.endswith(family.ignored):
                        continue
                    dtype = file.get_slice(name).get_dtype()
                    if dtype not in FLOATS:
                        raise ConfigError(
                            f"{path}: {name} is {dtype}: quantized weights cannot be imported",
                            "name the folder of the model in float32, float16 or bfloat16",
                        )
                    if name in tensors:
                        raise DataError(f"{path}: {name} stands in two files")
                    tensors[name] = file.get_tensor(name).float()
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{path} is damaged ({one_line(error)})") from None
    if not any(name.startswith(family.prefix) for name in tensors):
        tensors = {name if name == "lm_head.weight" else family.prefix + name: t for name, t in tensors.items()}
    return tensors


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A new safetensors file, fp32, which is synced. Raises OSError."""
    try:
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, {"format": "pt"})
    except SafetensorError as error:  # which is none, and has the number of one in its text
        found = re.search(r"(?:os error |code: )(\d+)", str(error))
        number = errno.EIO if found is None else int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # the library leaves it to the owner alone
    with path.open("r+b") as file:
        storage.sync_file(file.fileno())


def to_ours(
    family: Family, config: TransformerConfig, theirs: Mapping[str, Tensor], zeros: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The Transformer's state. Raises DataError naming every tensor that is missing, superfluous or of a wrong shape.

    zeros: endings of the biases that the Transformer has and these files do not.
    """
    embedding = next(row.theirs[0] for row in family.rows(config) if row.ours == "embedding.weight")
    if config.tie_embeddings and embedding not in theirs and "lm_head.weight" in theirs:
        theirs = {**theirs, embedding: theirs["lm_head.weight"]}  # of two names of one tensor, some programs keep this
    left = dict(theirs)
    state: dict[str, Tensor] = {}
    missing: list[str] = []
    for row, shapes in _shaped(family, config, theirs):
        if zeros and row.ours.endswith(zeros):
            state[row.ours] = torch.zeros(sum(shape[0] for shape in shapes))
            continue
        parts = [left.pop(name, None) for name in row.theirs]
        for name, part, shape in zip(row.theirs, parts, shapes, strict=True):
            if part is None:
                missing.append(f"{name} is missing")
            elif tuple(part.shape) != shape:
                missing.append(f"{name} is {list(part.shape)}, not {list(shape)}")
        if not missing:
            state[row.ours] = _there(row, torch.cat([part for part in parts if part is not None]), back=False)
    if config.tie_embeddings:
        state["head.weight"] = state.get("embedding.weight", torch.empty(0))
        head = left.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, theirs[embedding]):
            missing.append("lm_head.weight differs from the embeddings although tie_word_embeddings is true")
    missing += [f"{name} is unknown" for name in left]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(f"the weights do not fit config.json: {'; '.join(missing[:5])}{more}")
    return state


def to_theirs(family: Family, config: TransformerConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The family's tensors. ``config`` is what ``expressible`` returned, and ``state`` fits it."""
    tensors: dict[str, Tensor] = {}
    for row in family.rows(config):
        whole = _there(row, state[row.ours], back=True)
        if len(row.theirs) == 1:
            tensors[row.theirs[0]] = whole
        else:
            tensors.update(zip(row.theirs, torch.split(whole, _row_counts(row, config)), strict=True))
    return tensors


def expressible(
    family: Family, config: TransformerConfig, state: Mapping[str, Tensor]
) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """The same model in the terms of the family, computing the same.

    Sinusoids become learned positions; biases that the family always has become zeros; scaled embeddings are scaled
    once, which unties them from the output layer.
    """
    made, tensors = config, dict(state)
    if family.learned_positions is not None:
        if config.positions is Positions.sinusoidal:
            tensors["positions.weight"] = sinusoidal_table(config.context, config.d_model)
        made = replace(made, positions=Positions.learned, bias=True, qkv_bias=None)
    if family.name == "llama" and config.qkv_bias:
        made = replace(made, bias=True, qkv_bias=None)
    if config.scale_embeddings and family.name != "gemma":
        if config.tie_embeddings:
            tensors["head.weight"] = tensors["embedding.weight"]
        tensors["embedding.weight"] = tensors["embedding.weight"] * math.sqrt(config.d_model)
        made = replace(made, scale_embeddings=False, tie_embeddings=False)
    for row in family.rows(made):
        if row.ours.endswith(".bias") and row.ours not in tensors:
            tensors[row.ours] = torch.zeros(tensors[row.ours.removesuffix("bias") + "weight"].shape[0])
    return made, tensors


def _there(row: Row, tensor: Tensor, *, back: bool) -> Tensor:
    """Their tensor as ours, or ``back``."""
    if row.how == "transposed":
        return tensor.T
    if row.how == "minus_one":
        return tensor - 1 if back else tensor + 1
    return tensor


def _row_counts(row: Row, config: TransformerConfig) -> list[int]:
    """Rows of each part of a stacked parameter."""
    if len(row.theirs) == 3:
        return [config.channels * heads for heads in (config.num_heads, config.kv_heads, config.kv_heads)]
    return [d_ff(config)] * 2


def _shaped(
    family: Family, config: TransformerConfig, theirs: Mapping[str, Tensor]
) -> Iterator[tuple[Row, list[tuple[int, ...]]]]:
    """Each row with the shapes that its tensors must have; the size of the vocabulary is the embeddings'."""
    rows = list(family.rows(config))
    name = next(row.theirs[0] for row in rows if row.ours == "embedding.weight")
    vocab = theirs[name].shape[0] if name in theirs and theirs[name].ndim else 0
    width, heads = config.d_model, config.num_heads * config.channels
    kv = 2 * config.kv_heads * config.channels
    sizes = {
        "embedding": (vocab, width), "head": (vocab, width), "positions": (config.context, width),
        "final_norm": (width,), "attention_norm": (width,), "feed_forward_norm": (width,),
        "q_norm": (config.channels,), "k_norm": (config.channels,), "qkv": (heads + kv, width), "out": (width, heads),
        "gate_up": (2 * d_ff(config), width), "up": (d_ff(config), width), "down": (width, d_ff(config)),
    }  # fmt: skip
    for row in rows:
        module, part = row.ours.split(".")[-2:]
        shape: tuple[int, ...] = sizes[module] if part == "weight" else sizes[module][:1]
        if len(row.theirs) > 1:
            yield row, [(count, *shape[1:]) for count in _row_counts(row, config)]
        else:
            yield row, [shape[::-1] if row.how == "transposed" else shape]
