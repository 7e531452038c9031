"""lmkit: train, evaluate and sample language models from the command line or from Python.

The names below are loaded when they are first used, so that importing lmkit costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmkit.data.corpus import open_corpus
    from lmkit.data.prepared import prepare
    from lmkit.errors import LmkitError
    from lmkit.evaluation import perplexity
    from lmkit.generate import generate
    from lmkit.loading import load_run
    from lmkit.models.base import LanguageModel
    from lmkit.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
    from lmkit.train import Trainer, fit

__version__ = "0.1.0"

_HOMES = {
    "LanguageModel": "lmkit.models.base",
    "LmkitError": "lmkit.errors",
    "Tokenizer": "lmkit.tokenizers",
    "Trainer": "lmkit.train",
    "fit": "lmkit.train",
    "generate": "lmkit.generate",
    "load_run": "lmkit.loading",
    "load_tokenizer": "lmkit.tokenizers",
    "open_corpus": "lmkit.data.corpus",
    "perplexity": "lmkit.evaluation",
    "prepare": "lmkit.data.prepared",
    "train_tokenizer": "lmkit.tokenizers",
}

__all__ = [
    "LanguageModel",
    "LmkitError",
    "Tokenizer",
    "Trainer",
    "__version__",
    "fit",
    "generate",
    "load_run",
    "load_tokenizer",
    "open_corpus",
    "perplexity",
    "prepare",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lmkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
