"""Own text: folders of text files and of JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lmkit.config.data import JsonlConfig, TextConfig
from lmkit.data import cutting, textfiles
from lmkit.data.cleaning import Piece, one_document
from lmkit.data.documents import SPLITS, Corpus, RecordCorpus, hash_fraction, held_out_shares
from lmkit.data.textfiles import Part
from lmkit.errors import ConfigError, DataError

_SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
_MANY_DOCUMENTS = 20


class _FileCorpus(Corpus):
    """A file, or those of a folder whose names end in a suffix.

    A folder may hold the splits itself, as files (train.txt, valid.txt, test.txt) or as folders (train/, valid/,
    test/): if any of them, then train. A split that is not there is held out from train.
    """

    def __init__(self, config: TextConfig | JsonlConfig, suffix: str, **rule: Any) -> None:
        """rule: what the text of a split depends on, besides the files and the shares that are held out."""
        super().__init__(config.cleaning)
        self._root = _existing_path(config.path, self.name)
        self._sources = _split_sources(self._root, suffix)
        self._held_out = held_out_shares(config.valid_fraction, config.test_fraction, self._sources)
        self.splits = tuple(split for split in SPLITS if split in self._sources or split in self._held_out)
        self.source = _describe(
            self._root, self._sources, self._held_out, _passed_over(self._root, self._sources, suffix)
        )
        self._rule = rule

    def fingerprint(self) -> Mapping[str, Any] | None:
        stamps = {split: textfiles.stamp_files(files) for split, files in self._sources.items()}
        if None in stamps.values():
            return None
        return {self.name: str(self._root), "held_out": self._held_out, "files": stamps, **self._rule}


class TextCorpus(_FileCorpus):
    """Text files: one document a file; a few large files are cut by lines into contiguous parts.

    Of 20 documents or more whole ones are held out, by the order of a hash of their relative path, at least one; of
    fewer, the end of each file (first train, then valid, then test; see ``cutting.py``).
    """

    name = "text"

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config, ".txt", cut=cutting.VERSION)
        self._parts: dict[str, list[Part]] | None = None

    def _read(self, splits: Collection[str]) -> Iterator[tuple[str, Piece]]:
        if self._parts is None:
            self._parts = self._cut()
        for split in (split for split in SPLITS if split in splits):
            for part in self._parts[split]:
                for piece in one_document(textfiles.text_blocks(part)):
                    yield split, piece

    def _cut(self) -> dict[str, list[Part]]:
        parts: dict[str, list[Part]] = {split: [Part(path) for path in files] for split, files in self._sources.items()}
        if not self._held_out:
            return parts
        files = self._sources["train"]
        parts |= {split: [] for split in ("train", *self._held_out)}
        if len(files) >= _MANY_DOCUMENTS:
            ranked = sorted(files, key=lambda path: hash_fraction(os.fsencode(path.relative_to(self._root).as_posix())))
            owner = dict.fromkeys(files, "train")
            for split, fraction in self._held_out.items():
                count = max(1, round(fraction * len(files)))
                owner.update(dict.fromkeys(ranked[:count], split))
                ranked = ranked[count:]
            for path in files:
                parts[owner[path]].append(Part(path))
            return parts
        for path in files:
            fractions = (self._held_out.get("valid", 0.0), self._held_out.get("test", 0.0))
            second, third, size = cutting.cut_by_lines(path, fractions)
            for split, start, end in (("train", 0, second), ("valid", second, third), ("test", third, size)):
                if start < end:
                    parts[split].append(Part(path, start, end))
        return parts


class JsonlCorpus(_FileCorpus, RecordCorpus):
    """JSON lines: one document a line, in one field."""

    name = "jsonl"

    def __init__(self, config: JsonlConfig) -> None:
        super().__init__(config, ".jsonl", field=config.text_field)
        self._own = tuple(self._sources)
        self._field = config.text_field

    def _texts(self, split: str) -> Iterator[str]:
        for path in self._sources[split]:
            for number, line in enumerate(textfiles.text_lines(path), start=1):
                if not line.isspace():
                    yield self._text(line, f"{path}, line {number}")

    def _text(self, line: str, where: str) -> str:
        try:
            record = json.loads(line.rstrip())
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} in column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise DataError(f"{where} is not JSON: {reason}", "repair or remove the line") from error
        if not isinstance(record, dict) or self._field not in record:
            keys = (
                f"its keys are {', '.join(map(repr, record))[:200]}" if isinstance(record, dict) else "it is no object"
            )
            raise DataError(f"{where} has no field '{self._field}'; {keys}", "set dataset.text_field=NAME")
        text = record[self._field]
        if not isinstance(text, str):
            raise DataError(f"{where}: field '{self._field}' is no string but {type(text).__name__}", "repair the line")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where} holds half a character (a lone surrogate)", "repair the line") from error
        return text


def _existing_path(path: str | None, kind: str) -> Path:
    if path is None:
        raise ConfigError(f"dataset={kind} needs a file or folder", "set dataset.path=PATH")
    found = Path(os.path.expanduser(path)).absolute()
    try:
        os.stat(found)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise DataError(f"{found} does not exist", "set dataset.path to a file or folder") from error
    except OSError as error:
        raise DataError(f"cannot read {found}: {error.strerror or error}", "check dataset.path") from error
    return found


def _split_sources(root: Path, suffix: str) -> dict[str, list[Path]]:
    """Split -> its files, in whatever case their names are. With none by name, or train alone, all are train. DataError
    for others without it."""
    if os.path.isfile(root):
        return {"train": [root]}
    named: dict[str, list[Path]] = {}
    inside_root = _listing(root)
    for split, names in _SPLIT_NAMES.items():
        alone = {name + suffix + ending for name in names for ending in ("", ".gz", ".zst")}
        # what may not be looked at find_files will name
        found = {path.name: [path] for path in inside_root if path.name.lower() in alone and os.path.isfile(path)}
        for path in inside_root:
            if path.name.lower() in names and os.path.isdir(path) and (inside := textfiles.find_files(path, suffix)):
                found[path.name] = inside
        if len(found) > 1:
            both = ", ".join(found)
            raise DataError(f"{root} has more than one {split} split: {both}", "rename or remove one of them")
        if found:
            (named[split],) = found.values()
    if named and "train" not in named:
        entries = {split: files[0].relative_to(root).parts[0] for split, files in named.items()}
        taken = " and ".join(f"{name} (taken for the {split} split)" for split, name in entries.items())
        both = " and ".join(entries.values())
        raise DataError(
            f"{root} holds {taken}, but neither train{suffix} nor a folder train",
            f"put the text to learn from into train{suffix} or a folder train, or, if {both} is to"
            " be learnt from like any other, rename it",
        )
    if len(named) > 1:
        return named
    files = textfiles.find_files(root, suffix)
    if not files:
        raise DataError(f"{root} holds no {suffix}, {suffix}.gz or {suffix}.zst file", "check dataset.path")
    return {"train": files}


def _listing(folder: Path) -> list[Path]:
    """What is in a folder, in one order everywhere. Raises DataError."""
    with textfiles.readable(folder):
        return sorted(folder.iterdir(), key=lambda path: path.name)


def _passed_over(root: Path, sources: Mapping[str, list[Path]], suffix: str) -> list[str]:
    """Names of files beside those of the splits that look as if they were to be read, too."""
    if len(sources) == 1:
        return []
    read = {path for files in sources.values() for path in files}
    others = (path for path in _listing(root) if textfiles.ends_in(path.name, suffix) and path not in read)
    return [path.name for path in others if os.path.isfile(path)]


def _describe(
    root: Path, sources: Mapping[str, list[Path]], held_out: Mapping[str, float], passed_over: list[str]
) -> str:
    files = sum(map(len, sources.values()))
    cut = "".join(f", {split} is {100 * share:g}% of train" for split, share in held_out.items())
    left = f"; not read: {', '.join(passed_over[:3])}{' ...' if len(passed_over) > 3 else ''}" if passed_over else ""
    return f"{root} ({files} file{'s' if files > 1 else ''}{cut}{left})"
