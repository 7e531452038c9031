"""Configuration of lmkit export."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from lmkit.config.training import ExistingRunConfig


class ExportFormat(Enum):
    """What other programs read."""

    hf = "hf"
    gguf = "gguf"
    safetensors = "safetensors"
    onnx = "onnx"


@dataclass(kw_only=True)
class ExportConfig:
    """lmkit export: write a run's model and tokenizer for other programs, checked by reading it again."""

    run: ExistingRunConfig = field(default_factory=ExistingRunConfig)
    """Run to export; the adapter that it was finetuned with, if any, is merged into its weights."""
    adapter: str | None = None
    """Folder of an adapter that was finetuned from the run, as in RUN/adapter, to merge into it; null: none."""
    to: str = "???"
    """Folder to make; it must not exist, or be empty."""
    format: ExportFormat = ExportFormat.hf
    """hf (transformers, vLLM), gguf (llama.cpp), onnx (ONNX Runtime), or safetensors: weights under lmkit's names."""
    debug: bool = False
    """Show the traceback of an error."""
