"""ONNX: the model as one graph from tokens to logits, for batches and lengths of any size up to the context."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmkit.errors import ConfigError, DataError, ResourceError
from lmkit.hf.exporting import Source, compare_ids, compare_logits, write_tokenizer
from lmkit.models.transformer import Transformer
from lmkit.tokenizers import HfTokenizer
from lmkit.tokenizers.base import HEADER_FILE, one_line

FILE = "model.onnx"
INPUT, OUTPUT = "tokens", "logits"


class _Logits(nn.Module):
    """(B, T) tokens -> (B, T, V) logits."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        hidden_BTD, _ = self.model(tokens)
        return self.model.head.logits(hidden_BTD)


def export_onnx(source: Source, folder: Path) -> dict[str, Any]:
    """Write model.onnx and tokenizer.json, run the graph in ONNX Runtime and compare.

    Raises ResourceError if one of the packages is missing.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise ResourceError(f"format=onnx needs the package {package}", "pip install 'lmkit[onnx]'") from None
    if source.config.context < 2:
        raise ConfigError("model.context=1 is too short for format=onnx")
    _write(source, folder / FILE)
    write_tokenizer(source, folder)
    compare_ids(source, HfTokenizer((folder / HEADER_FILE).read_bytes()).encode(source.sample).tolist(), HEADER_FILE)
    difference, version = _check(source, folder / FILE)
    checked = f"ONNX Runtime {version} agrees (logits to {difference:.1e}), sample text gets the same ids"
    return {"architecture": "ONNX graph", "checked": checked}


def _write(source: Source, path: Path) -> None:
    example = torch.zeros(2, min(4, source.config.context), dtype=torch.int64)
    shapes = {"tokens": {0: torch.export.Dim("batch"), 1: torch.export.Dim("time", max=source.config.context)}}
    chatty = [logging.getLogger(name) for name in ("onnxscript", "torch.onnx._internal.exporter._registration")]
    levels = [logger.level for logger in chatty]
    for logger in chatty:
        logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Logits(source.model).eval(),
                (example,),
                path,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=shapes,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise DataError(f"PyTorch could not make an ONNX graph of the model ({one_line(error)})") from None
    finally:
        for logger, level in zip(chatty, levels, strict=True):
            logger.setLevel(level)


def _check(source: Source, path: Path) -> tuple[float, str]:
    """Largest difference of the logits, also for one token alone; and ONNX Runtime's version."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

    def run(tokens_BT: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: tokens_BT.numpy()})[0])

    difference = max(compare_logits(source, run, length) for length in (1, None))
    return difference, str(onnxruntime.__version__)
