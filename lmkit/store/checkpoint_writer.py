"""Saving checkpoints: a copy at the step boundary, the rest in the background, one rename as the commit point."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import threading
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Protocol, Self

from lmkit.errors import CheckpointError, DivergedError, ResourceError
from lmkit.store import manifest as mf
from lmkit.store import storage
from lmkit.store.checkpoint import Snapshot, Warn, first_nonfinite
from lmkit.store.environment import environment
from lmkit.store.found import CHECKPOINTS
from lmkit.store.listing import best_first, comparable, list_checkpoints, loss_and_data
from lmkit.store.manifest import FileEntry, Manifest, verify_checkpoint
from lmkit.store.pins import read_pins
from lmkit.store.runs import Run
from lmkit.store.staging import Stage, Staged
from lmkit.store.tensorfile import write_tensors

_DISK_RESERVE_BYTES = 1 << 20
STALL_S = 10.0
"""A run whose training has waited longer than that for one save says so, once; the journal has every wait."""


class SavableTokenizer(Protocol):
    """What a checkpoint needs of a tokenizer."""

    @property
    def digest(self) -> str:
        """SHA-256 of the tokenizer's canonical form."""

    def save(self, directory: Path) -> None:
        """Write the tokenizer's files into an existing directory."""


@dataclass(frozen=True)
class Cost:
    """What a save took, seconds; retiring older checkpoints is left out."""

    copy_s: float
    """Of a processor, by the copy that training waits for; getting memory for it is left out, too."""
    cpu_s: float
    """Of a processor, by the thread."""
    wall_s: float
    """From the start of writing to the end of verifying."""


class CheckpointWriter:
    """Saves snapshots of one run, in the background, one at a time; the caller holds the run's lock.

    ``submit`` copies the snapshot into buffers that are reused from save to save (the only time that training waits,
    unless the save before is still running) and returns. The thread writes and syncs all files in a ``.tmp-``
    directory, commits by renaming it, re-reads from disk and re-hashes, and only then retires older checkpoints. Those
    stay that are whole and among the newest ``keep``, or the best one (and that of the present data, where they
    changed), or of every ``keep_every``-th step, or pinned. What goes wrong there is raised by the next ``submit``,
    ``wait`` or ``close``; older checkpoints are whole all the same, and the caller may catch the error and go on.
    Leaving the ``with`` block waits; on the way of another exception a failed save is a warning.
    ``submit`` is ``hold``, which makes the copy, and ``release``, which hands it over, again if it is called again.
    ``close`` writes what is held and was never released, unless a KeyboardInterrupt is on its way.
    How long the next copy had to wait for the save before is in the journal's ``save`` events (``waited_s``).
    """

    def __init__(
        self,
        run: Run,
        tokenizer: SavableTokenizer,
        *,
        keep: int,
        keep_every: int | None = None,
        warn: Warn,
    ) -> None:
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep={keep} and keep_every={keep_every} must be >= 1")
        self.last_cost = Cost(0.0, 0.0, 0.0)
        """That of the last save that succeeded."""
        self._run = run
        self._folder = run.path / CHECKPOINTS
        self._keep = keep
        self._keep_every = keep_every
        self._warn = warn
        self._handed: SimpleQueue[tuple[Staged | None, SimpleQueue[None]] | None] = SimpleQueue()
        """For the thread: what to save, if anything, and where to tell that it is done; None ends the thread."""
        self._in_flight: SimpleQueue[None] | None = None
        """Where the thread tells that the last save is done. No Event: a signal at the wrong moment breaks those."""
        self._error: BaseException | None = None
        self._waited_s = 0.0
        """How long the caller has waited for saves since the last copy, seconds."""
        self._has_said_stall = False
        self._held: Staged | None = None
        self._is_waiting = False
        """Whether what is held was not released yet."""
        self._whole: set[str] = set()
        """Names of the checkpoints that were hashed by this writer."""
        self._found: dict[str, tuple[float | None, str | None]] = {}
        """Name -> validation loss, and digest of the data."""
        self._damaged: set[str] = set()
        self._tokenizer_digest = tokenizer.digest
        self._stage = Stage(self._read_tokenizer(tokenizer))
        self._thread: threading.Thread | None = self._start_thread()

    def _start_thread(self) -> threading.Thread:
        """The thread that saves, until ``close``: to start one for each save would take time from training."""
        thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise ResourceError(
                f"cannot save checkpoints in the background: {error}",
                "raise the limit of threads (ulimit -u)",
            ) from error
        return thread

    def _read_tokenizer(self, tokenizer: SavableTokenizer) -> dict[str, bytes]:
        """The tokenizer's files as bytes, so that each save writes them as it writes everything else."""
        scratch = self._folder / storage.scratch_name(storage.TMP_PREFIX, mf.TOKENIZER)
        with storage.resource_errors("write", self._folder):
            self._folder.mkdir(exist_ok=True)
            scratch.mkdir()
            try:
                tokenizer.save(scratch)
                files = {f"{mf.TOKENIZER}/{p.name}": p.read_bytes() for p in sorted(scratch.iterdir())}
            finally:
                storage.remove_tree(scratch)
        return files

    def submit(self, snapshot: Snapshot) -> None:
        """Save a snapshot; it may be changed as soon as this returns. Raises what went wrong with the save before.

        ValueError if ``state`` or ``config`` holds NaN, TypeError if it is not JSON; ResourceError if there is no
        memory for the copy.
        """
        self.hold(snapshot)
        self.release()

    def hold(self, snapshot: Snapshot) -> None:
        """Copy a snapshot, in place of the one that is held if there is one. Raises what ``submit`` does."""
        self.wait()
        self._held, self._is_waiting = None, False  # the next one takes its memory
        waited_s, self._waited_s = self._waited_s, 0.0
        if waited_s > STALL_S and not self._has_said_stall:
            self._has_said_stall = True
            self._warn(
                f"training waited {waited_s:.1f} s for a checkpoint to be written: the disk is slow, or"
                " save.every_steps is too small"
            )
        self._held = replace(self._stage.copy(snapshot), waited_s=waited_s)
        self._is_waiting = True

    def release(self) -> None:
        """Begin to save what is held, if anything is. Raises what went wrong with the save before."""
        self.wait()
        staged, self._is_waiting = self._held, False
        if staged is not None:
            assert self._thread is not None, "closed"
            self._in_flight = SimpleQueue()
            self._handed.put((staged, self._in_flight))

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._in_flight is not None and self._in_flight.empty()

    def wait(self) -> None:
        """Wait for the save in flight and raise what went wrong with it."""
        if self._in_flight is not None:
            start_s = time.monotonic()
            self._handed.put((None, self._in_flight))  # if a signal has kept ``submit`` from handing it over
            self._in_flight.get()
            self._in_flight = None
            self._waited_s += time.monotonic() - start_s
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Save what waits for it, raise what went wrong, end the thread and free the buffers."""
        try:
            if self._is_waiting:
                self.release()
            self.wait()
        finally:
            self._held = None
            self._stage.clear()
            if self._thread is not None:
                self._handed.put(None)
                self._thread.join()
                self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        self._is_waiting = self._is_waiting and isinstance(error, Exception)
        try:
            self.close()
        except Exception as save_error:
            self._warn(f"the last save failed: {save_error}")

    def _work(self) -> None:
        for staged, done in iter(self._handed.get, None):
            if staged is not None:
                try:
                    self._save(staged)
                except BaseException as error:
                    self._error = error
            del staged  # or else the buffers would outlive ``close``
            done.put(None)

    def _save(self, staged: Staged) -> None:
        started, cpu_before_s = time.monotonic(), time.thread_time()
        bad = first_nonfinite(staged.tensors[mf.MODEL])
        if bad is not None:
            raise DivergedError(f"{bad} holds NaN or infinity at step {staged.step}: not saved", "lower optimizer.lr")
        try:
            try:
                path = self._write(staged)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                path = self._write(staged)  # after a failed sync the file's pages are unknown: all of it again, once
        except OSError as error:
            target = self._folder / mf.step_directory(staged.step)
            raise storage.resource_error("save checkpoint", target, error, _space_for(staged)) from error
        seconds = round(time.monotonic() - started, 3)
        event = {"step": staged.step, "checkpoint": path.name, "bytes": staged.num_bytes, "seconds": seconds}
        self._run.journal("save", event | {"waited_s": round(staged.waited_s, 3)})
        manifest = verify_checkpoint(path, from_disk=True)
        self._run.journal("verify", {"checkpoint": path.name, "self": manifest.digest})
        cpu_s = time.thread_time() - cpu_before_s
        self.last_cost = Cost(staged.copy_s, cpu_s, time.monotonic() - started)
        self._damaged.discard(path.name)
        self._whole.add(path.name)
        self._found[path.name] = loss_and_data(path)
        self._retire()

    def _write(self, staged: Staged) -> Path:
        """Write and commit; on any error nothing but the older checkpoints is left. Raises OSError."""
        if storage.free_bytes(self._folder) < _space_for(staged):
            raise OSError(errno.ENOSPC, "not enough free disk space")
        target = self._folder / mf.step_directory(staged.step)
        temporary = self._folder / storage.scratch_name(storage.TMP_PREFIX, target.name)
        storage.make_directory(temporary)
        try:
            manifest = self._write_files(staged, temporary)
            if not target.exists():
                storage.rename(temporary, target)
                storage.sync_directory(self._folder)
            elif self._is_same(target, manifest):
                storage.remove_tree(temporary)
            else:  # damaged, or of an earlier continuation
                storage.replace_directory(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                storage.remove_tree(temporary)
            raise
        return target

    def _write_files(self, staged: Staged, folder: Path) -> Manifest:
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
            environment=environment() | self._run.place,
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

        Of those that were there before this writer, only the ones on which it depends are hashed. Where the list of
        pinned ones cannot be read, nothing is deleted.
        """
        newest_first = list_checkpoints(self._run.path)[::-1]
        kept = {*islice(filter(self._is_whole, newest_first), self._keep)}
        found = {path.name: self._loss_and_data(path) for path in newest_first}
        for known in ({name: loss for name, (loss, _) in found.items()}, comparable(newest_first, found)):
            kept |= {*islice(filter(self._is_whole, best_first(newest_first, known)), 1)}
        try:
            pinned = read_pins(self._run.path)
        except CheckpointError as error:
            self._warn(f"no checkpoint is retired: {error}")
            return
        for path in newest_first:
            step = mf.step_of(path.name) or 0
            on_grid = self._keep_every is not None and step % self._keep_every == 0
            if path not in kept and step not in pinned and not on_grid and self._is_whole(path):
                try:
                    storage.discard(path)
                except OSError as error:  # e.g. a reader has it open on Windows
                    self._warn(f"cannot retire {path}: {error}")
                    continue
                self._whole.discard(path.name)
                self._run.journal("retire", {"checkpoint": path.name})

    def _is_whole(self, path: Path) -> bool:
        if path.name in self._damaged:
            return False
        if path.name not in self._whole:
            try:
                verify_checkpoint(path)
                self._whole.add(path.name)
            except CheckpointError as error:
                self._damaged.add(path.name)
                self._warn(f"{path.name} does not count as a checkpoint: {error}")
                return False
        return True

    def _loss_and_data(self, path: Path) -> tuple[float | None, str | None]:
        """Its validation loss and the digest of its data, read once; None also where they cannot be read."""
        if path.name not in self._found:
            with contextlib.suppress(CheckpointError):
                self._found[path.name] = loss_and_data(path)
        return self._found.get(path.name, (None, None))


def _space_for(staged: Staged) -> int:
    """Free bytes without which a save does not begin: its size, with what a file system adds, and a reserve."""
    return round(staged.num_bytes * 1.1) + _DISK_RESERVE_BYTES
