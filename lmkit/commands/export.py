"""lmkit export: a run's model and tokenizer in a folder that other programs read."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmkit.commands.runs_text import format_bytes
from lmkit.config.export import ExportConfig
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import TransformerConfig
from lmkit.console import Console
from lmkit.data.tokenfiles import sha256_of
from lmkit.device import resolve_device
from lmkit.errors import ConfigError, ResourceError
from lmkit.evaluation.scoring import ratios
from lmkit.hf.card import Facts, card
from lmkit.hf.exporting import Source, export_as
from lmkit.loading import LoadedRun, load_run
from lmkit.models.transformer import Transformer
from lmkit.store import storage
from lmkit.store.browse import is_of_present_data, read_newest_config
from lmkit.store.found import read_info, read_result
from lmkit.store.listing import valid_loss

CARD = "README.md"
PLAIN = re.compile(
    r"(embedding|positions|final_norm|head|blocks\.\d+\.(attention_norm|feed_forward_norm|attention\.(qkv|out|q_norm|"
    r"k_norm)|feed_forward\.(up|gate_up|down)))\.(weight|bias)(?<!head\.bias)"
)
"""Names of the Transformer's own parameters."""


def run(cfg: ExportConfig) -> dict[str, Any]:
    """Write the folder, read it again, compare, and only then give it its name; returns what was found."""
    console = Console()
    target = _target(cfg.to)
    device = resolve_device(DeviceConfig(type=DeviceType.cpu))
    loaded = load_run(cfg.run, device=device, console=console, adapter=cfg.adapter)
    source = _source(loaded)
    with _made_whole(target) as folder:
        about = export_as(cfg.format, source, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        digests = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
        text = card(_facts(cfg, loaded, about, digests))
        (folder / CARD).write_bytes(text.encode("utf-8", "backslashreplace"))  # names of files may not be UTF-8
        size = sum(path.stat().st_size for path in files)
    console.say(f"{target}: {about['architecture']}, {format_bytes(size)}; {about['checked']}")
    return {**about, "to": str(target), "digests": digests}


def _target(name: str) -> Path:
    path = Path(os.path.realpath(os.path.expanduser(name)))
    if os.path.lexists(path) and not path.is_dir():
        raise ConfigError(f"to={path} is not a folder", "name a new folder")
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"to={path} is not empty", "name a new folder")
    return path


def _source(loaded: LoadedRun) -> Source:
    if not isinstance(loaded.model, Transformer) or not isinstance(loaded.model_config, TransformerConfig):
        kind = type(loaded.model).__name__
        raise ConfigError(f"run={loaded.path} is a {kind}, which no other program reads", "export a Transformer")
    other = [name for name in loaded.model.state_dict() if PLAIN.fullmatch(name) is None]
    if other:
        raise ConfigError(
            f"run={loaded.path} has parameters that no other program reads: {', '.join(other[:3])}",
            "export a run without adapters or extra heads",
        )
    return Source(loaded.model, loaded.model_config, loaded.tokenizer)


@contextlib.contextmanager
def _made_whole(target: Path) -> Iterator[Path]:
    """A folder to write into, which gets the target's name at the end and is removed on any error; the next export to
    the same target removes that of a killed one."""
    storage.remove_unfinished(target)
    folder = target.parent / storage.scratch_name(storage.TMP_PREFIX, target.name)
    try:
        folder.mkdir(parents=True)
        yield folder
        storage.sync_tree(folder)
        if target.is_dir():
            target.rmdir()
        storage.rename(folder, target)
        with contextlib.suppress(OSError):  # a parent that may be passed through but not read
            storage.sync_directory(target.parent)
    except OSError as error:
        raise ResourceError(f"cannot write to={target}: {error.strerror or error}", "name another folder") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _facts(cfg: ExportConfig, loaded: LoadedRun, about: dict[str, Any], digests: dict[str, str]) -> Facts:
    origin = {"checkpoint": loaded.checkpoint_digest, "tokenizer of the run": loaded.tokenizer.digest}
    data = {"data": loaded.data_digest} if loaded.data_digest else {}
    name = loaded.path.name if cfg.adapter is None else f"{loaded.path.name} with {cfg.adapter}"
    return Facts(
        name=name,
        format=cfg.format.name,
        about=about,
        config=loaded.config,
        info=read_info(loaded.path) or {},
        result=_numbers_of(loaded) if cfg.adapter is None else {},
        step=loaded.step,
        num_parameters=loaded.model.num_parameters(),
        tokenizer_kind=loaded.tokenizer.kind,
        vocab_size=loaded.tokenizer.vocab_size,
        digests={**data, **origin, **digests},
    )


def _numbers_of(loaded: LoadedRun) -> dict[str, Any]:
    """What the run has found on valid of exactly these weights: result.json is about those of its last step, and the
    numbers of words in it are those of other weights only if these have learnt the same data."""
    result = read_result(loaded.path) or {}
    if result.get("step") == loaded.step or "token_ppl" not in result:
        return result
    config = read_newest_config(loaded.path)[1]
    if is_of_present_data(result, config) != is_of_present_data({"step": loaded.step}, config):
        return {}
    num_tokens, *others = (_whole(result.get(f"num_{unit}")) for unit in ("tokens", "words", "bytes", "chars"))
    loss = valid_loss(loaded.checkpoint)
    if loss is None or num_tokens is None:
        return {}
    return {**result, **ratios(loss * num_tokens, num_tokens, *others)}


def _whole(value: object) -> int | None:
    return value if type(value) is int else None
