"""Models in and out: Hugging Face folders, and the formats of other runtimes."""

from __future__ import annotations

from lmkit.hf.importing import ImportedModel, import_hf, resolve_hf

__all__ = ["ImportedModel", "import_hf", "resolve_hf"]
