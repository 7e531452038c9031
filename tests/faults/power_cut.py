"""What a power cut may leave of what was done to a disk, as POSIX allows it.

Without fsync a file may have any part of its bytes, or zeros. Without an fsync of its directory a new, renamed or
removed entry may be there or not, whatever became of those before and after it, but a rename is done wholly or not at
all. What was synced holds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PRIMITIVES

from lmkit.store import storage

Tree = dict[str, Any]
"""A directory: name -> bytes of a file, or the Tree of a directory."""


class File:
    """A file: what was written into it, and how much of that was synced."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = data
        self.num_synced = len(data)

    def left(self, rng: random.Random, share: float) -> bytes:
        """Its bytes after the cut; ``share``: only of a Folder."""
        data = self.data
        if self.num_synced == len(data):
            return data
        cut = rng.randrange(len(data) + 1) // 64 * 64
        return rng.choice([b"", data[:cut], bytes(len(data)), data[:cut] + bytes(len(data) - cut), data])


class Folder:
    """A directory, as processes see it and as it lies on the disk."""

    def __init__(self, tree: Tree | None = None) -> None:
        nodes = {name: Folder(node) if isinstance(node, dict) else File(node) for name, node in (tree or {}).items()}
        self.seen: dict[str, File | Folder] = nodes
        self._synced = dict(nodes)
        self._pending: list[dict[str, File | Folder | None]] = []
        """Changes since the last sync, each of which is on the disk or not; None: the name is gone."""

    def change(self, changes: dict[str, File | Folder | None]) -> None:
        """Give names a new meaning, all of them or, after a cut, none."""
        _apply(changes, self.seen)
        self._pending.append(changes)

    def sync(self) -> None:
        for changes in self._pending:
            _apply(changes, self._synced)
        self._pending.clear()

    def left(self, rng: random.Random, share: float) -> Tree:
        """The directory after the cut, where each change that was not synced has this chance to be on the disk."""
        entries = dict(self._synced)
        for changes in self._pending:
            if rng.random() < share:
                _apply(changes, entries)
        return {name: node.left(rng, share) for name, node in entries.items()}


def _apply(changes: dict[str, File | Folder | None], entries: dict[str, File | Folder]) -> None:
    for name, node in changes.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


class PowerCut:
    """Records what is done to a directory with the primitives of ``storage``, and what a cut may leave at any time."""

    def __init__(self, patch: pytest.MonkeyPatch, root: Path) -> None:
        self.log: list[tuple[str, tuple[Any, ...]]] = []
        """Primitive, and its paths in ``root`` (or path and bytes)."""
        self.before = read_tree(root)
        """What was there at the start, all of it on the disk."""
        self._root = root
        self._paths: dict[int, str] = {}
        for name in PRIMITIVES:
            patch.setattr(storage, name, self._wrap(name, getattr(storage, name)))

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    def _wrap(self, name: str, real: Any) -> Any:
        def call(*args: Any) -> Any:
            result = real(*args)
            if name == "create_file":
                self._paths[result] = self._relative(args[0])
                self.log.append((name, (self._paths[result],)))
            elif name == "write_all":
                self.log.append((name, (self._paths[args[0]], bytes(args[1]))))
            elif name == "sync_file":
                self.log.append((name, (self._paths[args[0]],)))
            else:
                self.log.append((name, tuple(self._relative(path) for path in args)))
            return result

        return call

    def calls(self, name: str) -> list[tuple[int, str]]:
        """Where in the log a primitive was used, and on which path."""
        return [(index, args[0]) for index, (called, args) in enumerate(self.log) if called == name]

    def state(self, at: int, rng: random.Random, share: float) -> Tree:
        """The directory after a cut behind the first ``at`` operations; ``share``: see Folder.left."""
        root = Folder(self.before)
        for name, args in self.log[:at]:
            _play(root, name, args)
        return root.left(rng, share)

    def states(self, rng: random.Random, *, begin: int = 0, draws: int = 6) -> Iterator[tuple[int, Tree]]:
        """At each place from ``begin`` on: how many operations came before the cut, and what is left.

        Everything that was not synced is lost, nothing of it is, or chance decides, ``draws`` times.
        """
        for at in range(begin, len(self.log) + 1):
            for share in (0.0, 1.0, *[0.5] * draws):
                yield at, self.state(at, rng, share)


def _play(root: Folder, name: str, args: tuple[Any, ...]) -> None:
    """Do to the model what a primitive did to the disk. KeyError for what was made without the primitives."""
    if name == "sync_directory":
        _folder(root, args[0]).sync()
        return
    parent, _, leaf = args[0].rpartition("/")
    folder = _folder(root, parent)
    if name in ("make_directory", "create_file"):
        folder.change({leaf: Folder() if name == "make_directory" else File()})
    elif name in ("write_all", "sync_file"):
        file = folder.seen[leaf]
        assert isinstance(file, File)
        if name == "write_all":
            file.data += args[1]
        else:
            file.num_synced = len(file.data)
    elif name in ("rename", "replace"):
        target_parent, _, target = args[1].rpartition("/")
        assert target_parent == parent, "a rename between directories is not played"
        folder.change({leaf: None, target: folder.seen[leaf]})
    else:
        assert name in ("remove_file", "remove_directory"), name
        assert leaf in folder.seen, args
        folder.change({leaf: None})


def _folder(root: Folder, path: str) -> Folder:
    folder = root
    for part in path.split("/") if path not in ("", ".") else []:
        found = folder.seen[part]
        assert isinstance(found, Folder)
        folder = found
    return folder


def read_tree(folder: Path) -> Tree:
    return {path.name: read_tree(path) if path.is_dir() else path.read_bytes() for path in folder.iterdir()}


def build(tree: Tree, folder: Path) -> None:
    """Put a tree into an empty directory."""
    for name, node in tree.items():
        if isinstance(node, dict):
            (folder / name).mkdir()
            build(node, folder / name)
        else:
            (folder / name).write_bytes(node)
