"""Coverage-guided fuzzing of what reads files of others (needs ``pip install atheris``, on Linux).

    python scripts/fuzz.py [-max_total_time=60] [further options of libFuzzer]

The first byte chooses a reader: manifest, index of prepared data, stored configuration, text or records. Each must give
a value or an LmkitError; anything else ends the fuzzer and leaves the input in ``crash-*``. tests/faults/test_fuzz.py
holds the same law with Hypothesis, where inputs are damaged in ways that reach deeper.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["lmkit"]):
    from lmkit.config import ROOTS
    from lmkit.config.data import JsonlConfig, TextConfig
    from lmkit.config.plain import from_plain
    from lmkit.data.corpus import open_corpus
    from lmkit.data.tokenfiles import open_prepared
    from lmkit.errors import LmkitError
    from lmkit.store.manifest import parse_json, read_manifest

FOLDER = Path(tempfile.mkdtemp())


def put(name: str, data: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(data)
    return path


def manifest(data: bytes) -> None:
    parse_json(data, Path("MANIFEST.json"))
    put("MANIFEST.json", data)
    read_manifest(FOLDER)


def index(data: bytes) -> None:
    put("index.json", data)
    open_prepared(FOLDER)


def configuration(data: bytes) -> None:
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError):
        return
    from_plain(ROOTS["pretrain"], value)


def text(data: bytes) -> None:
    path = put("a.txt", data)
    list(open_corpus(TextConfig(path=str(path), valid_fraction=0.0, test_fraction=0.0)).pieces("train"))


def records(data: bytes) -> None:
    path = put("a.jsonl", data)
    list(open_corpus(JsonlConfig(path=str(path), valid_fraction=0.0, test_fraction=0.0)).pieces("train"))


READERS: tuple[Callable[[bytes], None], ...] = (manifest, index, configuration, text, records)


def read(data: bytes) -> None:
    if data:
        with contextlib.suppress(LmkitError):
            READERS[data[0] % len(READERS)](data[1:])


if __name__ == "__main__":
    atheris.Setup(sys.argv, read)
    atheris.Fuzz()
