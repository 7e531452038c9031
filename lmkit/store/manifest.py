"""MANIFEST.json, the last file written into a checkpoint: what the checkpoint holds, with sizes and SHA-256.

Everything that is read from a checkpoint is untrusted until it agrees with the manifest, and the manifest until it is
exactly what this module would write: canonical JSON, known keys, plain file names, its own digest. Nothing in it names
code. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

from lmkit.errors import CheckpointError
from lmkit.store import storage
from lmkit.store.migrations import VERSION, check_version, migrate
from lmkit.store.reading import read_through

FORMAT = "lmkit-checkpoint"
MANIFEST = "MANIFEST.json"
MODEL = "model.safetensors"
OPTIMIZER = "optim.safetensors"
STATE = "state.json"
CONFIG = "config.json"
TOKENIZER = "tokenizer"
"""Folder of the tokenizer's files."""

MAX_JSON_BYTES = 16 << 20
MAX_TENSORS = 20_000
_MAX_FILES = 100
_MAX_PARTS = 20 * MAX_TENSORS
"""Brackets and commas of the whole file: a name and a shape of 16 sizes have fewer. Parsed, each may take 150 bytes."""
_MAX_TENSOR_BYTES = (1 << 63) - 1
_REQUIRED = frozenset({MODEL, STATE, CONFIG})
_PATH = re.compile(rf"(?:{TOKENIZER}/)?[A-Za-z0-9][A-Za-z0-9._-]{{0,99}}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TENSOR = re.compile(r"([A-Z][A-Z0-9_]{1,15})\[((?:[0-9]{1,15}(?:,[0-9]{1,15}){0,15})?)\]")
_STEP_DIR = re.compile(r"step-([0-9]{12})")
_TENSOR_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,1000}")
_CLIMBING = re.compile(r"[/\\]|(?:.*[/\\])?\.\.(?:[/\\]|\Z)")
"""What no tensor is called: an absolute path, or one with .. in it."""

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes per element of the safetensors number formats that a checkpoint may hold."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    path: str
    """Relative to the checkpoint, with / between folder and name."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorSpec:
    """Number format and shape of one tensor; written as ``F32[10000,256]``."""

    dtype: str
    """A key of DTYPE_BYTES."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Manifest:
    """The content of MANIFEST.json."""

    run_id: str
    step: int
    """Optimizer steps completed."""
    created: str
    """UTC time, ISO 8601; for people only."""
    files: tuple[FileEntry, ...]
    tensors: dict[str, dict[str, TensorSpec]]
    """Tensor file -> tensor name -> spec."""
    aliases: dict[str, dict[str, str]]
    """Tensor file -> name of a tied tensor -> name under which its data is stored."""
    digests: dict[str, str]
    """SHA-256 of the config, tokenizer and prepared data (``data`` is the key of the prepared data)."""
    environment: dict[str, str]
    """Versions, platform and threads; an allow-list, never the process's environment variables."""
    version: int = VERSION
    """Format version of the checkpoint on the disk; the fields are today's whatever it is."""
    older_digest: str | None = None
    """``self`` in the file of an older version."""

    @property
    def total_bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(entry.bytes for entry in self.files)

    def file(self, path: str) -> FileEntry | None:
        """The entry of ``path``, or None if the checkpoint has no such file."""
        return next((entry for entry in self.files if entry.path == path), None)

    def to_bytes(self) -> bytes:
        """MANIFEST.json in today's version, canonical: equal manifests are equal bytes."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "run_id": self.run_id,
            "step": self.step,
            "created": self.created,
            "files": [{"path": f.path, "bytes": f.bytes, "sha256": f.sha256} for f in self.files],
            "tensors": {f: {name: str(spec) for name, spec in table.items()} for f, table in self.tensors.items()},
            "aliases": self.aliases,
            "digests": self.digests,
            "environment": self.environment,
        }
        return canonical_json(_sealed(body))

    @property
    def digest(self) -> str:
        """The SHA-256 that pins the whole checkpoint (``self`` in the file)."""
        digest: str = self.older_digest or json.loads(self.to_bytes())["self"]
        return digest


def _sealed(body: dict[str, Any]) -> dict[str, Any]:
    """The fields of a manifest and its own digest, ``self``: that of all the rest."""
    return body | {"self": hashlib.sha256(canonical_json(body)).hexdigest()}


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and one fixed layout; NaN and infinity are a ValueError."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


def parse_json(raw: bytes, where: Path) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or infinity. Raises CheckpointError naming the file."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(items)
        if len(value) != len(items):
            raise ValueError("duplicate key")
        return value

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not allowed")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON ({error})") from None


def read_small_file(path: Path) -> bytes:
    """The bytes of a regular file of at most MAX_JSON_BYTES. Raises CheckpointError naming the file."""
    try:
        with storage.open_regular(path) as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise unreadable(path, error) from None
    if len(raw) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes")
    return raw


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for people for an OSError met while reading a checkpoint."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return CheckpointError(f"{path} is missing", "it may have been retired by its run in the meantime")
    return CheckpointError(f"cannot read {path}: {error.strerror or error}")


def step_directory(step: int) -> str:
    """Name of the checkpoint of ``step``."""
    return f"step-{step:012d}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint's directory name, or None if it is not such a name."""
    match = _STEP_DIR.fullmatch(name)
    return int(match[1]) if match else None


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check MANIFEST.json. No other file is opened. Raises CheckpointError naming what is wrong."""
    path = checkpoint / MANIFEST
    raw = read_small_file(path)
    if sum(map(raw.count, (b",", b"[", b"{"))) > _MAX_PARTS:  # before each of them takes memory
        raise CheckpointError(f"{path} is malformed (it lists more than {MAX_TENSORS} tensors)")
    data = parse_json(raw, path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the manifest of an lmkit checkpoint")
    written = data
    try:
        if type(data.get("version")) is not int or data["version"] != VERSION:
            data = _migrated(path, raw, data)
            raw = canonical_json(data)
        manifest = _manifest_from(data)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is malformed ({error})") from None
    if manifest.to_bytes() != raw:  # covers `self`, unknown keys and every byte that the fields do not
        raise CheckpointError(f"{path} is damaged: it does not match its own SHA-256")
    if data is not written:
        manifest = replace(manifest, version=written["version"], older_digest=written["self"])
    name_step = step_of(checkpoint.name)
    if name_step is not None and name_step != manifest.step:
        raise CheckpointError(f"{checkpoint} holds step {manifest.step}", "the directory was renamed: restore its name")
    return manifest


def _migrated(path: Path, raw: bytes, data: dict[str, Any]) -> dict[str, Any]:
    """The manifest of another version as today's would have written it. Raises CheckpointError.

    It is believed only if it matches its own digest: a damaged version number is no newer format.
    """
    body = {key: value for key, value in data.items() if key != "self"}
    if canonical_json(_sealed(body)) != raw:
        raise CheckpointError(f"{path} is damaged: it does not match its own SHA-256")
    check_version(data.get("version"), path, data.get("environment"))
    return _sealed(migrate(path, body, data["version"]) | {"version": VERSION})


def _manifest_from(data: Mapping[str, Any]) -> Manifest:
    """The manifest in parsed JSON; ValueError, TypeError or KeyError where it is not one."""
    files = tuple(
        FileEntry(path=_text(f["path"]), bytes=_count(f["bytes"]), sha256=_sha256(f["sha256"])) for f in data["files"]
    )
    _check_paths([entry.path for entry in files])
    tables = {file: _table(table) for file, table in _table(data["tensors"]).items()}
    if sum(map(len, tables.values())) > MAX_TENSORS:
        raise ValueError(f"more than {MAX_TENSORS} tensors")
    tensors = {file: {name: _tensor_spec(name, text) for name, text in table.items()} for file, table in tables.items()}
    if set(tensors) != {f.path for f in files} & {MODEL, OPTIMIZER}:
        raise ValueError("tensor tables and files differ")
    aliases = {file: _texts(table) for file, table in _table(data["aliases"]).items()}
    for file, table in aliases.items():
        if not set(table.values()) <= set(tensors[file]) or set(table) & set(tensors[file]):
            raise ValueError("tied tensors do not fit the tensor table")
    return Manifest(
        run_id=_text(data["run_id"]),
        step=_count(data["step"]),
        created=_text(data["created"]),
        files=files,
        tensors=tensors,
        aliases=aliases,
        digests=_texts(data["digests"]),
        environment=_texts(data["environment"]),
    )


def _check_paths(paths: list[str]) -> None:
    if len(paths) > _MAX_FILES:
        raise ValueError(f"more than {_MAX_FILES} files")
    for path in paths:
        known = path in _REQUIRED or path == OPTIMIZER or path.startswith(f"{TOKENIZER}/")
        if not _PATH.fullmatch(path) or not known:
            raise ValueError(f"file name {path[:100]!r} is not allowed")
    if len({path.casefold() for path in paths}) != len(paths):
        raise ValueError("a file is listed twice")
    if not _REQUIRED.issubset(paths):
        raise ValueError(f"not listed: {', '.join(sorted(_REQUIRED - set(paths)))}")


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, found {type(value).__name__}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {type(value).__name__}")
    return value


def _texts(value: Any) -> dict[str, str]:
    return {key: _text(item) for key, item in _table(value).items()}


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a count, found {str(value)[:50]}")
    return value


def _sha256(value: Any) -> str:
    if not _SHA256.fullmatch(_text(value)):
        raise ValueError("expected a SHA-256")
    return _text(value)


def check_tensor_name(name: str) -> None:
    """ValueError unless the name is short, printable, no way out of a folder and not reserved by safetensors."""
    if not _TENSOR_NAME.fullmatch(name) or _CLIMBING.match(name) or name == "__metadata__":
        raise ValueError(f"tensor name {name[:100]!r} is not allowed")


def _tensor_spec(name: str, text: Any) -> TensorSpec:
    check_tensor_name(name)
    match = _TENSOR.fullmatch(_text(text))
    if match is None or match[1] not in DTYPE_BYTES:
        raise ValueError(f"tensor {name!r} has the unknown type {_text(text)[:50]!r}")
    shape = tuple(int(size) for size in match[2].split(",")) if match[2] else ()
    if DTYPE_BYTES[match[1]] * math.prod(max(size, 1) for size in shape) > _MAX_TENSOR_BYTES:  # also if it is empty
        raise ValueError(f"tensor {name!r} is too large ({text})")
    return TensorSpec(match[1], shape)


def open_entry(checkpoint: Path, entry: FileEntry) -> BufferedReader:
    """Open a file of the manifest if it has the right size. Raises CheckpointError."""
    path = checkpoint / entry.path
    try:
        if (checkpoint / TOKENIZER).is_symlink():
            raise CheckpointError(f"{checkpoint / TOKENIZER} is a symbolic link")
        file = storage.open_regular(path)
    except OSError as error:
        raise unreadable(path, error) from None
    size = file.seek(0, 2)
    file.seek(0)
    if size != entry.bytes:
        file.close()
        raise CheckpointError(f"{path} is damaged: {size} bytes, expected {entry.bytes}")
    return file


def read_entry(checkpoint: Path, entry: FileEntry, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The verified bytes of a small file of the manifest. Raises CheckpointError."""
    path = checkpoint / entry.path
    if entry.bytes > max_bytes:
        raise CheckpointError(f"{path} is larger than {max_bytes} bytes")
    with open_entry(checkpoint, entry) as file:
        try:
            raw = file.read()
        except OSError as error:
            raise unreadable(path, error) from None
    check_digest(path, entry, hashlib.sha256(raw).hexdigest())
    return raw


def check_digest(path: Path, entry: FileEntry, found: str) -> None:
    """CheckpointError unless the SHA-256 is the manifest's."""
    if found != entry.sha256:
        raise CheckpointError(f"{path} is damaged: SHA-256 {found[:12]}..., expected {entry.sha256[:12]}...")


def verify_entry(checkpoint: Path, entry: FileEntry, *, from_disk: bool = False) -> None:
    """Hash one file and compare. ``from_disk``: what the cache holds does not count. Raises CheckpointError."""
    path = checkpoint / entry.path
    digest = hashlib.sha256()
    with open_entry(checkpoint, entry) as file:
        try:
            read_through(file, entry.bytes, digest.update, from_disk=from_disk)
        except OSError as error:
            raise unreadable(path, error) from None
    check_digest(path, entry, digest.hexdigest())


def verify_checkpoint(checkpoint: Path, *, from_disk: bool = False) -> Manifest:
    """Check the manifest, then size and SHA-256 of every file. Raises CheckpointError naming what is wrong."""
    manifest = read_manifest(checkpoint)
    for entry in manifest.files:
        open_entry(checkpoint, entry).close()
    for entry in manifest.files:
        verify_entry(checkpoint, entry, from_disk=from_disk)
    return manifest
