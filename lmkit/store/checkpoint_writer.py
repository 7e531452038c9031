"""Saving checkpoints: a copy at the step boundary, the rest in the background, one rename as the commit point."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from lmkit.errors import CheckpointError, DivergedError, LmkitError, ResourceError
from lmkit.store import manifest as mf
from lmkit.store import storage
from lmkit.store.checkpoint import Snapshot, Warn, first_nonfinite, log_warning
from lmkit.store.environment import environment
from lmkit.store.found import CHECKPOINTS
from lmkit.store.listing import best_first, list_checkpoints, valid_loss
from lmkit.store.manifest import FileEntry, Manifest, TensorSpec, verify_checkpoint
from lmkit.store.pins import read_pins
from lmkit.store.runs import Run
from lmkit.store.tensorfile import file_bytes, spec_of, write_tensors

_DISK_RESERVE_BYTES = 1 << 20
START_TRIES = 1000
"""Milliseconds in which a thread whose start was interrupted runs, if it ever does."""


class SavableTokenizer(Protocol):
    """What a checkpoint needs of a tokenizer."""

    @property
    def digest(self) -> str:
        """SHA-256 of the tokenizer's canonical form."""

    def save(self, directory: Path) -> None:
        """Write the tokenizer's files into an existing directory."""


@dataclass(frozen=True)
class _Staged:
    """A snapshot as it will be written: contiguous copies on the CPU and finished bytes."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    tables: dict[str, dict[str, TensorSpec]]
    aliases: dict[str, dict[str, str]]
    small: dict[str, bytes]

    @property
    def num_bytes(self) -> int:
        return sum(map(file_bytes, self.tables.values())) + sum(map(len, self.small.values()))


class CheckpointWriter:
    """Saves snapshots of one run, in the background, one at a time; the caller holds the run's lock.

    ``submit`` copies the snapshot into buffers that are reused from save to save (the only time that training waits,
    unless the save before is still running) and returns. The thread writes and syncs all files in a ``.tmp-``
    directory, commits by renaming it, re-reads from disk and re-hashes, and only then retires older checkpoints. Those
    stay that are whole and among the newest ``keep``, or the best one, or of every ``keep_every``-th step, or pinned.
    What goes wrong there is raised by the next ``submit``, ``wait`` or ``close``; older checkpoints are whole all the
    same, and the caller may catch the error and go on. Leaving the ``with`` block waits; on the way of another
    exception a failed save is a warning. With ``background=False`` the same happens before ``submit`` returns.
    """

    def __init__(
        self,
        run: Run,
        tokenizer: SavableTokenizer,
        *,
        keep: int,
        keep_every: int | None = None,
        warn: Warn = log_warning,
        background: bool = True,
    ) -> None:
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep={keep} and keep_every={keep_every} must be >= 1")
        self.newest: Path | None = None
        """The last checkpoint that was committed and verified by this writer."""
        self._run = run
        self._folder = run.path / CHECKPOINTS
        self._keep = keep
        self._keep_every = keep_every
        self._warn = warn
        self._background = background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._buffers: dict[tuple[str, str], tuple[Tensor, TensorSpec]] = {}
        self._whole: dict[str, float | None] = {}
        """Name -> validation loss of the checkpoints that were hashed by this writer."""
        self._damaged: set[str] = set()
        self._tokenizer_digest = tokenizer.digest
        self._tokenizer_files = self._read_tokenizer(tokenizer)

    def _read_tokenizer(self, tokenizer: SavableTokenizer) -> dict[str, bytes]:
        """The tokenizer's files as bytes, so that each save writes them as it writes everything else."""
        scratch = self._folder / storage.scratch_name(storage.TMP_PREFIX, mf.TOKENIZER)
        try:
            self._folder.mkdir(exist_ok=True)
            scratch.mkdir()
            try:
                tokenizer.save(scratch)
                return {f"{mf.TOKENIZER}/{p.name}": p.read_bytes() for p in sorted(scratch.iterdir())}
            finally:
                storage.remove_tree(scratch)
        except OSError as error:
            raise storage.resource_error("write", self._folder, error) from error

    def submit(self, snapshot: Snapshot) -> None:
        """Save a snapshot; it may be changed as soon as this returns. Raises what went wrong with the save before.

        ValueError if ``state`` or ``config`` holds NaN, TypeError if it is not JSON; ResourceError if there is no
        memory for the copy.
        """
        self.wait()
        staged = self._stage(snapshot)
        if self._background:
            self._thread = threading.Thread(target=self._save_and_keep_error, args=(staged,), name="checkpoint-writer")
            self._thread.start()
        else:
            self._save_and_keep_error(staged)
            self.wait()

    def wait(self) -> None:
        """Wait for the save in flight and raise what went wrong with it."""
        if self._thread is not None:
            _join(self._thread)
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait for the save in flight, raise what went wrong with it, and free the buffers."""
        try:
            self.wait()
        finally:
            self._buffers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except LmkitError as save_error:
            self._warn(f"the last save failed: {save_error}")

    def _stage(self, snapshot: Snapshot) -> _Staged:
        sections = {mf.MODEL: snapshot.model} | ({mf.OPTIMIZER: snapshot.optimizer} if snapshot.optimizer else {})
        small = {mf.STATE: mf.canonical_json(snapshot.state), mf.CONFIG: mf.canonical_json(snapshot.config)}
        aliases = {}
        tensors: dict[str, dict[str, Tensor]] = {}
        tables: dict[str, dict[str, TensorSpec]] = {}
        on_gpu = False
        for file, named in sections.items():
            tied = _tied_names(named)
            if tied:
                aliases[file] = tied
            stored = {name: tensor for name, tensor in named.items() if name not in tied}
            kept = {name: self._buffer(file, name, tensor) for name, tensor in stored.items()}
            tensors[file] = {name: buffer for name, (buffer, _) in kept.items()}
            tables[file] = {name: spec for name, (_, spec) in kept.items()}
            on_gpu = on_gpu or any(tensor.is_cuda for tensor in stored.values())
            if stored:  # one call for all: a small model's copy is mostly the calls
                with torch.no_grad():
                    torch._foreach_copy_(list(tensors[file].values()), list(stored.values()), non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize()
        return _Staged(snapshot.step, tensors, tables, aliases, small | self._tokenizer_files)

    def _buffer(self, file: str, name: str, tensor: Tensor) -> tuple[Tensor, TensorSpec]:
        """A contiguous CPU tensor of the same type and shape, page-locked for CUDA, and its table entry; made once."""
        found = self._buffers.get((file, name))
        if found is None or found[0].shape != tensor.shape or found[0].dtype != tensor.dtype:
            spec = spec_of(name, tensor)
            try:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            except (RuntimeError, MemoryError) as error:
                size = tensor.numel() * tensor.element_size()
                raise ResourceError(
                    f"no memory ({size / 1e6:.1f} MB) to copy {name} for a checkpoint: {error}", "use a smaller model"
                ) from error
            found = self._buffers[file, name] = buffer, spec
        return found

    def _save_and_keep_error(self, staged: _Staged) -> None:
        try:
            self._save(staged)
        except BaseException as error:
            self._error = error

    def _save(self, staged: _Staged) -> None:
        bad = first_nonfinite(staged.tensors[mf.MODEL])
        if bad is not None:
            raise DivergedError(f"{bad} holds NaN or infinity at step {staged.step}: not saved", "lower optimizer.lr")
        started = time.monotonic()
        try:
            try:
                path = self._write(staged)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                path = self._write(staged)  # after a failed sync the file's pages are unknown: all of it again, once
        except OSError as error:
            target = self._folder / mf.step_directory(staged.step)
            raise storage.resource_error("save checkpoint", target, error, staged.num_bytes) from error
        seconds = round(time.monotonic() - started, 3)
        event = {"step": staged.step, "checkpoint": path.name, "bytes": staged.num_bytes, "seconds": seconds}
        self._run.journal("save", event)
        manifest = verify_checkpoint(path, from_disk=True)
        self._run.journal("verify", {"checkpoint": path.name, "self": manifest.digest})
        self._damaged.discard(path.name)
        self._whole[path.name] = valid_loss(path)
        self.newest = path
        self._retire()

    def _write(self, staged: _Staged) -> Path:
        """Write and commit; on any error nothing but the older checkpoints is left. Raises OSError."""
        if storage.free_bytes(self._folder) < staged.num_bytes * 1.1 + _DISK_RESERVE_BYTES:
            raise OSError(errno.ENOSPC, "not enough free disk space")
        target = self._folder / mf.step_directory(staged.step)
        temporary = self._folder / storage.scratch_name(storage.TMP_PREFIX, target.name)
        storage.make_directory(temporary)
        try:
            manifest = self._write_files(staged, temporary)
            if target.exists() and not self._is_same(target, manifest):
                storage.discard(target)  # damaged, or left by an abandoned continuation
            if target.exists():
                storage.remove_tree(temporary)
            else:
                storage.rename(temporary, target)
            storage.sync_directory(self._folder)
        except BaseException:
            with contextlib.suppress(OSError):
                storage.remove_tree(temporary)
            raise
        return target

    def _write_files(self, staged: _Staged, folder: Path) -> Manifest:
        entries = [
            write_tensors(folder / file, tensors, staged.tables[file]) for file, tensors in staged.tensors.items()
        ]
        storage.make_directory(folder / mf.TOKENIZER)
        for path, data in staged.small.items():
            storage.write_file(folder / path, data)
            entries.append(FileEntry(path, len(data), hashlib.sha256(data).hexdigest()))
        manifest = Manifest(
            run_id=self._run.run_id,
            step=staged.step,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            files=tuple(entries),
            tensors=staged.tables,
            aliases=staged.aliases,
            digests={
                "config": hashlib.sha256(staged.small[mf.CONFIG]).hexdigest(),
                "tokenizer": self._tokenizer_digest,
            }
            | self._run.digests,
            environment=environment(),
        )
        storage.write_file(folder / mf.MANIFEST, manifest.to_bytes())
        storage.sync_directory(folder / mf.TOKENIZER)
        storage.sync_directory(folder)
        return manifest

    def _is_same(self, target: Path, manifest: Manifest) -> bool:
        """Whether a checkpoint of this step with exactly these files is there already."""
        try:
            return verify_checkpoint(target).files == manifest.files
        except CheckpointError:
            return False

    def _retire(self) -> None:
        """Delete the whole checkpoints that nothing keeps (see the class); damaged ones stay.

        Where the list of pinned ones cannot be read, nothing is deleted.
        """
        whole = [path for path in list_checkpoints(self._run.path)[::-1] if self._is_whole(path)]
        kept = {*whole[: self._keep], *best_first(whole, self._whole)[:1]}
        try:
            pinned = read_pins(self._run.path)
        except CheckpointError as error:
            self._warn(f"no checkpoint is retired: {error}")
            return
        for path in whole:
            step = mf.step_of(path.name) or 0
            on_grid = self._keep_every is not None and step % self._keep_every == 0
            if path not in kept and step not in pinned and not on_grid:
                try:
                    storage.discard(path)
                except OSError as error:  # e.g. a reader has it open on Windows: the next save tries again
                    self._warn(f"cannot retire {path}: {error}")
                    continue
                del self._whole[path.name]
                self._run.journal("retire", {"checkpoint": path.name})

    def _is_whole(self, path: Path) -> bool:
        if path.name in self._damaged:
            return False
        if path.name not in self._whole:
            try:
                verify_checkpoint(path)
                self._whole[path.name] = valid_loss(path)
            except CheckpointError as error:
                self._damaged.add(path.name)
                self._warn(f"{path.name} does not count as a checkpoint: {error}")
                return False
        return True


def _tied_names(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Name -> the first name (in sorted order) that is the very same memory seen in the same way."""
    names_at: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names_at.setdefault(tensor.data_ptr(), []).append(name)
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


def save_checkpoint(run: Run, snapshot: Snapshot, tokenizer: SavableTokenizer, *, keep: int) -> Path:
    """Save one snapshot now and return its directory. Raises ResourceError, DivergedError or CheckpointError."""
    with CheckpointWriter(run, tokenizer, keep=keep, background=False) as writer:
        writer.submit(snapshot)
    return run.path / CHECKPOINTS / mf.step_directory(snapshot.step)


def _join(thread: threading.Thread) -> None:
    """Wait for a thread. If a signal has interrupted its start, it runs in a moment, or never will."""
    for _ in range(START_TRIES):
        try:
            return thread.join()
        except RuntimeError:  # not started, as far as it knows
            time.sleep(0.001)
    return None
