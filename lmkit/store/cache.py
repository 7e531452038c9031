"""The cache folder: prepared data, and which tokenizers were tried. All of it can be made again."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """LMKIT_CACHE, or lmkit's folder in the user's cache."""
    override = os.environ.get("LMKIT_CACHE")
    return Path(os.path.expanduser(override)).absolute() if override else platformdirs.user_cache_path("lmkit")
