"""safetensors files, written and read in one pass together with their SHA-256.

The format is 8 bytes header length (little-endian), a JSON header, and the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors). Any safetensors reader opens these files. Reading accepts only the header
that follows from the expected tensor table, compared byte for byte before anything is allocated, so that a crafted
header is never parsed. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from pathlib import Path

import psutil
import torch
from torch import Tensor

from lmkit.errors import CheckpointError, ResourceError
from lmkit.store import storage
from lmkit.store.manifest import FileEntry, TensorSpec, check_digest, check_tensor_name, open_entry, unreadable
from lmkit.store.reading import Job, read_start, read_whole

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "I64": torch.int64,
    "U64": torch.uint64, "F64": torch.float64,
}  # fmt: skip
_NAME_OF = {dtype: name for name, dtype in _DTYPES.items()}


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """The table entry of a tensor. Raises TypeError or ValueError for what the format cannot hold."""
    check_tensor_name(name)
    if tensor.dtype not in _NAME_OF or tensor.layout != torch.strided:
        raise TypeError(f"tensor {name!r} ({tensor.dtype}, {tensor.layout}) cannot be stored as safetensors")
    return TensorSpec(_NAME_OF[tensor.dtype], tuple(tensor.shape))


def _order(table: Mapping[str, TensorSpec]) -> list[tuple[str, TensorSpec]]:
    """Widest elements first, so that every tensor is aligned; then by name."""
    return sorted(table.items(), key=lambda item: (-_DTYPES[item[1].dtype].itemsize, item[0]))


def header_bytes(table: Mapping[str, TensorSpec]) -> bytes:
    """The file's bytes up to the first tensor; a pure function of the table."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in _order(table):
        end = offset + spec.num_bytes
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_bytes(table: Mapping[str, TensorSpec]) -> int:
    """Size of the whole file."""
    return len(header_bytes(table)) + sum(spec.num_bytes for spec in table.values())


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def write_tensors(path: Path, tensors: Mapping[str, Tensor], table: Mapping[str, TensorSpec]) -> FileEntry:
    """Write and sync contiguous CPU tensors to a new file and return its size and SHA-256. Raises OSError."""
    digest = hashlib.sha256()
    num_bytes = 0
    descriptor = storage.create_file(path)
    try:
        pieces = [memoryview(header_bytes(table)), *(_bytes_of(tensors[name]) for name, _ in _order(table))]
        for whole in pieces:
            for start in range(0, len(whole), storage.PIECE_BYTES):
                piece = whole[start : start + storage.PIECE_BYTES]
                storage.write_all(descriptor, piece)
                digest.update(piece)
            num_bytes += len(whole)
        storage.sync_file(descriptor)
    finally:
        os.close(descriptor)
    return FileEntry(path.name, num_bytes, digest.hexdigest())


def read_tensors(
    checkpoint: Path, entry: FileEntry, table: Mapping[str, TensorSpec], hasher: Executor, *, once: bool
) -> Job[tuple[dict[str, Tensor], Callable[[], None]]]:
    """The tensors of a file, and a function to call before they are used: it raises if their SHA-256 is another one.

    They lie in one piece of memory, as in the file. The header is verified before that is allocated. ``hasher``, an
    executor of one thread, hashes each piece while the next ones are read. ``once``: see ``reading.read_whole``. Both
    raise CheckpointError naming the file if it is not the one that the manifest describes. Raises ResourceError for one
    that no memory of this machine holds, such as a sparse file of terabytes, which a system may promise and not have.
    """
    path = checkpoint / entry.path
    header = header_bytes(table)
    if entry.bytes != file_bytes(table):
        raise CheckpointError(f"{path} does not fit the tensor table of its manifest")
    digest = hashlib.sha256()
    with open_entry(checkpoint, entry) as file:
        try:
            if read_start(file, len(header)) != header:
                raise CheckpointError(f"{path} is damaged: its header does not fit the tensor table of its manifest")
            memory_bytes = psutil.virtual_memory().total
            if entry.bytes > memory_bytes:
                raise ResourceError(
                    f"{path} has {entry.bytes / 1e9:,.0f} GB, more than the memory of this machine"
                    f" ({memory_bytes / 1e9:,.0f} GB)"
                )
            memory = yield from read_whole(
                file, entry.bytes, lambda piece: hasher.submit(digest.update, piece), once=once
            )
        except OSError as error:
            raise unreadable(path, error) from None
    if len(memory) != entry.bytes:
        raise CheckpointError(f"{path} is damaged: it ends early")
    found = hasher.submit(digest.hexdigest)
    tensors = {}
    end = len(header)
    for name, spec in _order(table):
        start, end = end, end + spec.num_bytes
        tensors[name] = memory[start:end].view(_DTYPES[spec.dtype]).view(spec.shape)
    return tensors, lambda: check_digest(path, entry, found.result())
