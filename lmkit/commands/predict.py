"""predict=FILE of ``lmkit finetune``: what a classifier or a regression says of each row of a file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lmkit.commands.output import output_path, write_file
from lmkit.config.commands import FinetuneConfig
from lmkit.config.plain import from_plain
from lmkit.config.tasks import ClassifyTaskConfig, RegressTaskConfig, RowsTaskConfig, TaskConfig
from lmkit.config.training import ExistingRunConfig
from lmkit.console import Console
from lmkit.data.examples import ExampleBatch, RowReader, Scale
from lmkit.data.rows import HUB, Record, read_records
from lmkit.data.textfiles import is_compressed
from lmkit.device import Device, resolve_device
from lmkit.errors import CheckpointError, ConfigError, DataError
from lmkit.loading import StoredRun, put_weights, read_run
from lmkit.models.base import LanguageModel
from lmkit.tasks import classify, regress
from lmkit.tasks.rows import PREDICT_BATCH, all_outputs, longest_text, reading_notes

ADDED = ("prediction", "probability")
"""Columns that are added to each row."""


def check_prediction(cfg: FinetuneConfig) -> None:
    """Find what would go wrong with predict=FILE before anything is trained. Raises ConfigError, DataError."""
    assert cfg.predict is not None
    assert isinstance(cfg.task, RowsTaskConfig)
    _output_path(cfg)
    _check_columns(read_records(cfg.predict), cfg.task)


def predict_file(cfg: FinetuneConfig, run: ExistingRunConfig) -> dict[str, Any]:
    """Write the rows of ``cfg.predict``, each with what ``run`` says of it, and show a summary.

    The values of a row are written as the text that was read. Returns the numbers of the summary, with accuracy or
    error where the rows hold the label or target. Raises ConfigError if the run is no classifier or regression.
    """
    assert cfg.predict is not None
    console = Console()
    device = resolve_device(cfg.device)
    output = _output_path(cfg)
    stored = read_run(run, console)
    task = task_of(stored)
    records = read_records(cfg.predict)
    _check_columns(records, task)
    outputs_N = _outputs(stored, task, records, device, console)
    fitted = stored.config["fitted"]
    if isinstance(task, ClassifyTaskConfig):
        added, numbers, rows = classify.predictions(task, fitted, outputs_N, records)
    else:
        added, numbers, rows = regress.predictions(task, fitted, outputs_N, records)
    lines = [
        json.dumps({**record.values, **extra}, ensure_ascii=False, default=str)  # the hub has dates and more, too
        for record, extra in zip(records, added, strict=True)
    ]
    write_file(output, "".join(f"{line}\n" for line in lines).encode("utf-8", "replace"), "output")
    console.table(
        "Predictions",
        [("file", cfg.predict), ("rows", str(len(records))), *rows, ("run", str(stored.path)), ("output", str(output))],
    )
    return {"file": cfg.predict, "output": str(output), "num_rows": len(records), **numbers}


def task_of(stored: StoredRun) -> ClassifyTaskConfig | RegressTaskConfig:
    """What the run was finetuned for. Raises ConfigError if that is neither classify nor regress."""
    data = stored.config.get("task")
    if stored.task not in ("classify", "regress"):
        raise ConfigError(
            f"run={stored.path} predicts no labels or numbers (task={stored.task})",
            "name a run of lmkit finetune task=classify or task=regress, or set task= to train one first",
        )
    try:
        task = from_plain(TaskConfig, data, where="task")
        if isinstance(task, RegressTaskConfig):
            regress.scales_of(task, stored.config["fitted"])
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{stored.checkpoint}/config.json does not describe a task of rows: {error}") from None
    if not isinstance(task, ClassifyTaskConfig | RegressTaskConfig) or "fitted" not in stored.config:
        raise CheckpointError(f"{stored.checkpoint}/config.json does not describe a task of rows")
    return task


def _outputs(
    stored: StoredRun,
    task: ClassifyTaskConfig | RegressTaskConfig,
    records: Sequence[Record],
    device: Device,
    console: Console,
) -> Tensor:
    """What the run's model says of each row: (N, C) logits, or (N,) numbers."""
    fitted: dict[str, Any] = stored.config["fitted"]
    backbone: LanguageModel | None = None
    if task.text is not None:
        backbone = stored.model_config.build(stored.tokenizer.vocab_size, seed=stored.seed)
    numeric: dict[str, Scale] = {}
    if isinstance(task, RegressTaskConfig):
        numeric = regress.scales_of(task, fitted)[1]
        model = regress.build_model(task, backbone, seed=stored.seed)
    elif backbone is not None:
        model = classify.build_model(task, backbone, len(fitted["labels"]), seed=stored.seed)
    put_weights(stored, model)
    model.to(device.torch_device)
    reader = RowReader(task, stored.tokenizer, longest_text(task, backbone), numeric)
    examples = reader.examples(records)
    for note in reading_notes(reader, len(records)):
        console.warn(note)

    def forward(module: Any, batch: ExampleBatch) -> Tensor:
        parts = (batch.tokens_BT, batch.lengths_B)
        result: Tensor = module(*parts, batch.numeric_BK) if isinstance(task, RegressTaskConfig) else module(*parts)
        return result

    return all_outputs(model, forward, examples, device=device, batch_size=PREDICT_BATCH)


def _check_columns(records: Sequence[Record], task: RowsTaskConfig) -> None:
    """DataError that names the columns that a row lacks, or that predictions would overwrite."""
    numeric = task.numeric if isinstance(task, RegressTaskConfig) else []
    needed = [*(name for name in (task.text, task.pair) if name is not None), *numeric]
    for record in records:
        if lacking := [name for name in needed if name not in record.values]:
            names = ", ".join(record.values)[:200] or "nothing"
            raise DataError(
                f"{record.where} lacks {', '.join(map(repr, lacking))}; it has {names}",
                f"give the columns that the run was trained on: {', '.join(needed)}",
            )
        if taken := [name for name in ADDED if name in record.values]:
            raise DataError(f"{record.where} already has a column {taken[0]!r}", "rename it")


def _output_path(cfg: FinetuneConfig) -> Path:
    """Where the predictions go."""
    source = cfg.predict or ""
    if cfg.output is not None:
        path = output_path(cfg.output)
        if path.suffix.lower() in (".csv", ".tsv", ".parquet"):
            raise ConfigError(f"output={cfg.output}: predictions are JSON lines", "name it with .jsonl")
    elif source.startswith(HUB):
        raise ConfigError(f"predict={source} is no file", "set output=FILE")
    else:
        read = Path(os.path.expanduser(source))
        stem = Path(read.stem if is_compressed(read) else read.name).stem
        path = output_path(str(read.with_name(f"{stem}.predictions.jsonl")))
    if not source.startswith(HUB) and path == Path(os.path.realpath(os.path.expanduser(source))):
        raise ConfigError(f"output={path} is the file that is read", "name another file")
    return path
