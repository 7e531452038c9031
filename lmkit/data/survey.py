"""One pass over a corpus that counts and digests every split, and remembers the result for unchanged files."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lmkit.data.benchmarks import with_plain_spaces
from lmkit.data.cleaning import Piece
from lmkit.data.documents import Corpus
from lmkit.errors import DataError
from lmkit.store import storage

VERSION = 1
"""Raised when the same files give other text or other counts."""
KEPT_CHARS = 64 << 20
"""A text of at most this many characters, PIECE_CHARS for each piece among them, stays in memory between the passes."""
PIECE_CHARS = 200
"""As so many characters counts what keeping a piece takes besides its text: there may be millions of short ones."""

_IS_SPACE = bytes(chr(code).isspace() and code < 128 for code in range(256))

Report = dict[str, dict[str, dict[str, int]]]


@dataclass
class Counts:
    """Sizes and digests of the text of one split; complete when every piece was added."""

    num_documents: int = 0
    num_lines: int = 0
    num_words: int = 0
    """Words separated by white space, plus the <eos> of each line."""
    num_chars: int = 0
    num_bytes: int = 0
    """UTF-8 bytes, newlines included."""
    text_digest: str = ""
    """SHA-256 of the UTF-8 text of all documents, one after the other."""
    documents_digest: str = ""
    """SHA-256 of the byte offsets of the ends of the documents."""


@dataclass
class Counter:
    """Adds up the ``Counts`` of a split, piece by piece."""

    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self._text, self._ends = hashlib.sha256(), hashlib.sha256()
        self._inside_word = False

    def add(self, piece: Piece) -> None:
        """Count the next piece of the split."""
        counts, text = self.counts, piece.text
        data = text.encode()
        lines = text.count("\n")
        counts.num_documents += piece.ends_document
        counts.num_lines += lines
        counts.num_words += count_words(text) + lines - (self._inside_word and text != "" and not text[0].isspace())
        counts.num_chars += len(text)
        counts.num_bytes += len(data)
        self._text.update(data)
        if text or piece.ends_document:
            self._inside_word = not piece.ends_document and not text[-1].isspace()
        if piece.ends_document:
            self._ends.update(counts.num_bytes.to_bytes(8, "little"))

    def finish(self) -> Counts:
        """The counts, with the digests of what was added."""
        self.counts.text_digest, self.counts.documents_digest = self._text.hexdigest(), self._ends.hexdigest()
        return self.counts


class Repeats:
    """Counts documents that are exact copies of others. Keeps 8 bytes of SHA-256 of each document."""

    def __init__(self, splits: Sequence[str]) -> None:
        self._texts = {split: hashlib.sha256() for split in splits}
        self._digests = {split: array("Q") for split in splits}

    def add(self, split: str, piece: Piece) -> None:
        """Read the next piece of a split."""
        self._texts[split].update(piece.text.encode())
        if piece.ends_document:
            self._digests[split].append(int.from_bytes(self._texts[split].digest()[:8], "little"))
            self._texts[split] = hashlib.sha256()

    def finish(self) -> dict[str, dict[str, int]]:
        """Split -> ``copies``: documents that stand earlier in it; ``in_train``: those that stand in train, too."""
        digests = {split: np.array(found, np.uint64) for split, found in self._digests.items()}
        train = digests.get("train", np.zeros(0, np.uint64))
        return {
            split: {
                "copies": len(found) - len(np.unique(found)),
                "in_train": 0 if split == "train" else int(np.isin(found, train).sum()),
            }
            for split, found in digests.items()
        }


def count_words(text: str) -> int:
    """len(text.split()), five times as fast: ends of white space, counted in the UTF-8 bytes."""
    data = with_plain_spaces(text).encode().translate(_IS_SPACE)
    is_space = np.frombuffer(data, np.bool_)
    return int(np.count_nonzero(is_space[:-1] > is_space[1:])) + (data[:1] == b"\0")


@dataclass
class Survey:
    """What one pass over a corpus found."""

    counts: dict[str, Counts]
    cleaning: Report
    """Split -> cleaning step -> counts before and after."""
    repeats: dict[str, dict[str, int]]
    """What ``Repeats`` counted, in the text as it was cleaned."""
    pieces: list[tuple[str, Piece]] | None = None
    """The whole text, if it is small enough to be kept."""

    def __post_init__(self) -> None:
        self.total_bytes = sum(counts.num_bytes for counts in self.counts.values())


class Surveyor:
    """Reads a corpus once. While a text that is too long to keep passes by, ``on_long_text`` can use it.

    ``progress`` is told how many bytes of text were read so far.
    """

    def __init__(self, corpus: Corpus, progress: Callable[[int], None]) -> None:
        self._corpus, self._progress = corpus, progress
        self._counters = {split: Counter() for split in corpus.splits}
        self._repeats = Repeats(corpus.splits)

    def run(self, on_long_text: Callable[[Callable[[], Iterator[str]]], None]) -> Survey:
        """Count everything, check it against what is known of the corpus, and return the result.

        ``on_long_text(lines)`` is called when the text turns out to be too long to keep; ``lines()`` then gives the
        text of train as it passes by. Raises DataError for a split without text.
        """
        pieces: list[tuple[str, Piece]] = []
        stream, chars, is_long = self._stream(), 0, False
        for item in stream:
            pieces.append(item)
            chars += len(item[1].text) + PIECE_CHARS
            if chars > KEPT_CHARS:
                is_long = True
                on_long_text(_Lines(self._corpus, pieces, stream))
                pieces.clear()
                for _ in stream:
                    pass
        counts = {split: counter.finish() for split, counter in self._counters.items()}
        repeats = self._repeats.finish()
        survey = Survey(counts, self._corpus.cleaning_report(), repeats, None if is_long else pieces)
        self._check(survey)
        return survey

    def _stream(self) -> Iterator[tuple[str, Piece]]:
        for split, piece in self._corpus.read():
            self._counters[split].add(piece)
            self._repeats.add(split, piece)
            self._progress(sum(counter.counts.num_bytes for counter in self._counters.values()))
            yield split, piece

    def _check(self, survey: Survey) -> None:
        empty = [split for split, counts in survey.counts.items() if counts.num_documents == 0]
        if empty:
            found = "; ".join(
                f"{split} {counts.num_documents:,} documents, {counts.num_lines:,} lines"
                for split, counts in survey.counts.items()
            )
            raise DataError(
                f"{' and '.join(empty)} of {self._corpus.source} would be empty ({found})",
                "add text, or change dataset.valid_fraction, dataset.test_fraction or dataset.cleaning",
            )
        for split, counts in survey.counts.items():
            self._corpus.check(split, counts.num_lines, counts.num_words, counts.num_bytes, counts.text_digest)


class _Lines:
    """The text of train: first what was kept and what is still passing by, after that by reading the corpus again."""

    def __init__(self, corpus: Corpus, kept: list[tuple[str, Piece]], stream: Iterator[tuple[str, Piece]]) -> None:
        self._corpus, self._kept, self._stream = corpus, kept, stream
        self._first = True

    def __call__(self) -> Iterator[str]:
        if not self._first:
            return (piece.text for piece in self._corpus.pieces("train"))
        self._first = False
        return self._passing()

    def _passing(self) -> Iterator[str]:
        self._kept.reverse()
        while self._kept:
            split, piece = self._kept.pop()
            if split == "train":
                yield piece.text
        for split, piece in self._stream:
            if split == "train":
                yield piece.text


def recall(folder: Path, fingerprint: Mapping[str, Any] | None) -> Survey | None:
    """The survey of a corpus with this fingerprint, if one is remembered."""
    if fingerprint is None:
        return None
    try:
        data = json.loads((folder / _name(fingerprint)).read_text(encoding="utf-8"))
        if data["fingerprint"] != json.loads(json.dumps(fingerprint)) or data["digest"] != _digest(data):
            return None
        counts = {split: Counts(**found) for split, found in data["counts"].items()}
        return Survey(counts, data["cleaning"], data["repeats"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(folder: Path, fingerprint: Mapping[str, Any] | None, survey: Survey, temporary: Path) -> None:
    """Keep a survey for ``recall``; temporary: see ``storage.replace_file``."""
    if fingerprint is None:
        return
    counts = {split: vars(counts) for split, counts in survey.counts.items()}
    data = {"fingerprint": fingerprint, "counts": counts, "cleaning": survey.cleaning, "repeats": survey.repeats}
    text = json.dumps(data | {"digest": _digest(data)}, indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    storage.replace_file(folder / _name(fingerprint), text.encode(), temporary)


def digest_of(data: Any) -> str:
    """SHA-256 (hex) of JSON data in a canonical form."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _digest(data: Mapping[str, Any]) -> str:
    return digest_of({key: value for key, value in data.items() if key != "digest"})


def _name(fingerprint: Mapping[str, Any]) -> str:
    return digest_of(fingerprint)[:32] + ".json"
