"""The files of prepared data: written by one writer per split, opened strictly, memory-mapped.

A folder holds index.json, tokenizer/ and per split SPLIT.tokens (little-endian integers of the smallest type that holds
the vocabulary) and SPLIT.ends (int64, the token offset after each document). The index holds counts, sizes and SHA-256
of everything else, and its own digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lmkit.data.cleaning import Piece
from lmkit.data.documents import SPLITS
from lmkit.data.survey import Counter, digest_of
from lmkit.errors import DataError
from lmkit.store import storage
from lmkit.tokenizers import Tokenizer, load_tokenizer

FORMAT = "lmkit-prepared"
VERSION = 1
INDEX = "index.json"
VERIFIED_BYTES = 1_000_000_000
"""Token files of at most this many bytes in sum are verified by their SHA-256 whenever they are opened.

Of all files, the ids are looked at as they are read: see ``lmkit.ids``."""

_MAX_INDEX_BYTES = 16 << 20
_ENDS_TYPE = np.dtype("<i8")
_REMEDY = "delete the folder, or prepare again with force=true"


@dataclass(frozen=True)
class Split:
    """Tokens and counts of one split."""

    tokens: NDArray[np.unsignedinteger[Any]]
    """(num_tokens,), read-only memory map."""
    document_ends: NDArray[np.int64]
    """(num_documents,), offset in ``tokens`` after each document."""
    num_tokens: int
    num_words: int
    """Words separated by white space, plus the <eos> of each line; the same for every tokenizer."""
    num_bytes: int
    """UTF-8 bytes of the text, newlines included, end-of-document tokens not."""
    num_chars: int
    num_lines: int
    num_documents: int
    num_unk: int
    """Tokens that are the tokenizer's <unk>."""
    text_digest: str
    """SHA-256 of the UTF-8 text."""


@dataclass(frozen=True)
class PreparedData:
    """A corpus as a tokenizer sees it."""

    path: Path
    key: str
    """SHA-256 that pins text, tokenizer and options."""
    name: str
    """Short name of the corpus."""
    tokenizer: Tokenizer
    splits: dict[str, Split]
    report: dict[str, Any]
    """``source``: where the text came from; ``cleaning``: split -> step -> counts before and after; ``repeats``: split
    -> documents that are copies of others (always there in what ``prepare`` returns); ``changes_text`` of a tokenizer
    made elsewhere: a place that it does not give back, as it was and as it came back (null: none was found)."""


def _smallest_type(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")


class SplitWriter:
    """Appends tokens and document ends of one split to its two files, with digests."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer) -> None:
        self.counter = Counter()
        self.num_tokens = self.num_unk = self._max_id = 0
        self._tokenizer, self._dtype = tokenizer, _smallest_type(tokenizer.vocab_size)
        self._unk_id = -1 if tokenizer.unk_id is None else tokenizer.unk_id
        self._files: dict[str, BinaryIO] = {}
        self._digests = {kind: hashlib.sha256() for kind in ("tokens", "ends")}
        self._names = {kind: f"{split}.{kind}" for kind in self._digests}
        self._folder = folder

    def __enter__(self) -> SplitWriter:
        for kind, name in self._names.items():
            self._files[kind] = (self._folder / name).open("xb")
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            try:
                file.flush()
                storage.sync_file(file.fileno())
            finally:
                file.close()

    def add(self, piece: Piece, ids: NDArray[np.integer[Any]]) -> int:
        """Write a piece, with the ids of its text; returns its size in bytes."""
        before = self.counter.counts.num_bytes
        self.counter.add(piece)
        self._write_tokens(ids)
        if piece.ends_document:
            self._write_tokens(np.asarray(self._tokenizer.encode_document_end(), np.int64))
            self._write("ends", np.array([self.num_tokens], _ENDS_TYPE))
        return self.counter.counts.num_bytes - before

    def entry(self) -> dict[str, Any]:
        """What the index says of the split's tokens."""
        files = {
            kind: {
                "file": name,
                "bytes": (self._folder / name).stat().st_size,
                "sha256": self._digests[kind].hexdigest(),
            }
            for kind, name in self._names.items()
        }
        return {"num_tokens": self.num_tokens, "num_unk": self.num_unk, "max_id": self._max_id, **files}

    def _write_tokens(self, ids: NDArray[np.integer[Any]]) -> None:
        if len(ids) == 0:
            return
        self.num_tokens += len(ids)
        self.num_unk += int(np.count_nonzero(ids == self._unk_id))
        self._max_id = max(self._max_id, int(ids.max()))
        self._write("tokens", ids.astype(self._dtype))

    def _write(self, kind: str, values: NDArray[Any]) -> None:
        data = values.tobytes()
        self._digests[kind].update(data)
        self._files[kind].write(data)


def write_index(
    folder: Path, key: str, name: str, tokenizer: Tokenizer, splits: Mapping[str, Any], report: Mapping[str, Any]
) -> None:
    """Write tokenizer and index beside the token files, which makes the folder prepared data. Raises OSError."""
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    index = {
        "format": FORMAT,
        "version": VERSION,
        "key": key,
        "name": name,
        "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "digest": tokenizer.digest},
        "dtype": _smallest_type(tokenizer.vocab_size).str,
        "splits": splits,
        "report": report,
    }
    text = json.dumps(index | {"self": digest_of(index)}, indent=1, ensure_ascii=True) + "\n"
    storage.write_file(folder / INDEX, text.encode())


def open_prepared(path: Path, *, verify: bool = False) -> PreparedData:
    """Open a folder that ``prepare`` wrote; ``verify`` hashes the token files even if they are large.

    Raises DataError, naming the file, for anything missing, damaged or written by another version.
    """
    index = read_index(path / INDEX)
    tokenizer = load_tokenizer(path / "tokenizer")
    try:
        if tokenizer.digest != index["tokenizer"]["digest"]:
            raise DataError(f"the tokenizer in {path} is not the one that its index names", _REMEDY)
        dtype = _smallest_type(tokenizer.vocab_size)
        if index["dtype"] != dtype.str:
            raise DataError(f"{path / INDEX} is damaged (tokens of type {index['dtype']}, not {dtype.str})", _REMEDY)
        entries = {split: index["splits"][split] for split in SPLITS if split in index["splits"]}
        if "train" not in entries:
            raise DataError(f"{path / INDEX} is damaged (no train split)", _REMEDY)
        total = sum(entry["tokens"]["bytes"] for entry in entries.values())
        verify = verify or total <= VERIFIED_BYTES
        splits = {split: _open_split(path, entry, dtype, verify) for split, entry in entries.items()}
        for split, entry in entries.items():
            largest = int(splits[split].tokens.max()) if verify else entry["max_id"]
            if largest != entry["max_id"] or not 0 <= largest < tokenizer.vocab_size:
                raise DataError(
                    f"{path / entry['tokens']['file']} holds token ids outside the vocabulary of"
                    f" {tokenizer.vocab_size}, or its index is wrong about them",
                    _REMEDY,
                )
        return PreparedData(path, index["key"], index["name"], tokenizer, splits, index["report"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path / INDEX} is damaged ({error})", _REMEDY) from error


def read_index(path: Path) -> dict[str, Any]:
    """What the index says, for ``open_prepared``, which tells what it raises."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_INDEX_BYTES + 1)
        if len(data) > _MAX_INDEX_BYTES:
            raise ValueError("too large")
        index = json.loads(data)
        if not isinstance(index, dict):
            raise ValueError("not an object")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}", "prepare the data again") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error})", _REMEDY) from error
    if index.get("format") != FORMAT or index.get("version") != VERSION:
        raise DataError(
            f"{path} has format {index.get('format')!r} version {index.get('version')!r}; "
            f"this lmkit reads {FORMAT!r} version {VERSION}",
            "prepare the data again",
        )
    if index.get("self") != digest_of({key: value for key, value in index.items() if key != "self"}):
        raise DataError(f"{path} is damaged (its digest does not match)", _REMEDY)
    return index


def _open_split(path: Path, entry: Mapping[str, Any], dtype: np.dtype[Any], verify: bool) -> Split:
    arrays = {}
    for kind, length, kind_type in (
        ("tokens", entry["num_tokens"], dtype),
        ("ends", entry["num_documents"], _ENDS_TYPE),
    ):
        file = path / Path(entry[kind]["file"]).name
        try:
            size = file.stat().st_size
            if size != entry[kind]["bytes"] or size != length * kind_type.itemsize:
                raise DataError(f"{file} has {size:,} bytes, not {length * kind_type.itemsize:,}", _REMEDY)
            if verify and sha256_of(file) != entry[kind]["sha256"]:
                raise DataError(f"{file} is damaged (its SHA-256 does not match)", _REMEDY)
            arrays[kind] = np.memmap(file, kind_type, mode="r")
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror or error}", _REMEDY) from error
    counts = [field.name for field in fields(Split)][2:]  # all but the arrays
    return Split(arrays["tokens"], arrays["ends"], **{name: entry[name] for name in counts})


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
