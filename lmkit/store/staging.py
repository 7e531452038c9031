"""The copy that a save is made from: the one part of it that training waits for."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lmkit.errors import ResourceError
from lmkit.store import manifest as mf
from lmkit.store.checkpoint import Snapshot
from lmkit.store.manifest import TensorSpec
from lmkit.store.tensorfile import file_bytes, spec_of


@dataclass(frozen=True)
class Staged:
    """A snapshot as it will be written: contiguous copies on the CPU, and texts."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    tables: dict[str, dict[str, TensorSpec]]
    aliases: dict[str, dict[str, str]]
    texts: dict[str, str]
    """State and configuration as JSON."""
    tokenizer_files: dict[str, bytes]
    copy_s: float
    """What copying the tensors took of a processor, seconds, without getting memory for them."""
    waited_s: float = 0.0
    """How long training had waited for the save before, seconds."""

    @cached_property
    def small(self) -> dict[str, bytes]:
        """The files beside the tensors. To lay out JSON takes time: not while training waits."""
        return {file: mf.canonical_json(json.loads(text)) for file, text in self.texts.items()} | self.tokenizer_files

    @property
    def num_bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(map(file_bytes, self.tables.values())) + sum(map(len, self.small.values()))


@dataclass(frozen=True)
class _Buffers:
    """Memory for copies of one file's tensors."""

    layout: list[tuple[str, torch.Size, torch.dtype, torch.device]]
    """Of the tensors that are copied."""
    tensors: dict[str, Tensor]
    table: dict[str, TensorSpec]
    on_gpu: bool
    """Whether any tensor comes from one."""


class Stage:
    """Copies snapshots, each into the memory of the one before."""

    def __init__(self, tokenizer_files: dict[str, bytes]) -> None:
        self._tokenizer_files = tokenizer_files
        self._buffers: dict[str, _Buffers] = {}

    def clear(self) -> None:
        """Free the memory."""
        self._buffers.clear()

    def copy(self, snapshot: Snapshot) -> Staged:
        """A copy, valid until the next one. Errors: see CheckpointWriter.submit."""
        texts = {mf.STATE: json.dumps(snapshot.state, allow_nan=False)}
        texts[mf.CONFIG] = json.dumps(snapshot.config, allow_nan=False)
        sections = {mf.MODEL: snapshot.model} | ({mf.OPTIMIZER: snapshot.optimizer} if snapshot.optimizer else {})
        aliases = {}
        copy_s = 0.0
        buffers: dict[str, _Buffers] = {}
        for file, named in sections.items():
            tied = _tied_names(named)
            if tied:
                aliases[file] = tied
            stored = {name: tensor for name, tensor in named.items() if name not in tied} if tied else named
            buffers[file] = self._buffers_for(file, stored)
            copies, on_gpu = list(buffers[file].tensors.values()), buffers[file].on_gpu
            start_s = time.thread_time()
            if stored:  # one call for all: a small model's copy is mostly the calls
                with torch.no_grad():
                    torch._foreach_copy_(copies, list(stored.values()), non_blocking=on_gpu)
            if on_gpu:
                torch.cuda.synchronize()
            copy_s += time.thread_time() - start_s
        tensors = {file: kept.tensors for file, kept in buffers.items()}
        tables = {file: kept.table for file, kept in buffers.items()}
        return Staged(snapshot.step, tensors, tables, aliases, texts, self._tokenizer_files, copy_s)

    def _buffers_for(self, file: str, tensors: dict[str, Tensor]) -> _Buffers:
        """What the tensors of a file are copied into; the same while they keep names, order, shapes, types, device."""
        layout = [(name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in tensors.items()]
        found = self._buffers.pop(file, None)
        if found is None or found.layout != layout:
            found = None  # its memory is free before the next is asked for
            table = {name: spec_of(name, tensor) for name, tensor in tensors.items()}
            copies = {name: _buffer(name, tensor) for name, tensor in tensors.items()}
            found = _Buffers(layout, copies, table, any(tensor.is_cuda for tensor in tensors.values()))
        self._buffers[file] = found
        return found


def _buffer(name: str, tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor of the same type and shape, page-locked for CUDA. Raises ResourceError."""
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    except (RuntimeError, MemoryError) as error:
        size = tensor.numel() * tensor.element_size()
        raise ResourceError(
            f"no memory ({size / 1e6:.1f} MB) to copy {name} for a checkpoint: {error}", "use a smaller model"
        ) from error


def _tied_names(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Name -> the first name (in sorted order) that is the very same memory seen in the same way."""
    addresses = [tensor.data_ptr() for tensor in tensors.values()]
    names_at: dict[int, list[str]] = {}
    if len(set(addresses)) < len(addresses):
        for name, address in zip(tensors, addresses, strict=True):
            names_at.setdefault(address, []).append(name)
    tied = {}
    for names in names_at.values():
        first: dict[tuple[Any, ...], str] = {}
        for name in sorted(names) if len(names) > 1 else ():
            tensor = tensors[name]
            if tensor.numel() == 0:
                continue
            view = (tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())
            if view in first:
                tied[name] = first[view]
            else:
                first[view] = name
    return tied
