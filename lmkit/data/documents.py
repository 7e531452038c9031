"""What a corpus is: named splits of documents, read as a stream of pieces in bounded memory, as often as needed.

A split is a sequence of documents, a document a sequence of lines that end in "\\n". One pass over a corpus reads every
source once, also where several splits are cut from one source.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lmkit.config.data import CleaningConfig
from lmkit.data.cleaning import Cleaner, Piece, document_pieces

SPLITS = ("train", "valid", "test")


class Corpus(ABC):
    """Documents of the splits ``train``, ``valid`` and ``test`` (those in ``splits``)."""

    name: str
    """Short name, as in ``dataset=NAME``."""
    source: str
    """Where the text comes from, for people."""
    word_level: bool = False
    """Whether the text is one of the word-level benchmark sets, in canonical form."""
    splits: tuple[str, ...] = SPLITS

    def __init__(self, cleaning: CleaningConfig | None) -> None:
        self._cleaning = cleaning
        self._report: dict[str, dict[str, dict[str, int]]] = {}

    @abstractmethod
    def _read(self, splits: Collection[str]) -> Iterator[tuple[str, Piece]]:
        """One pass over the sources of the given splits: (split, piece of a document), each document in one run."""

    def fingerprint(self) -> Mapping[str, Any] | None:
        """JSON data that differs whenever the text does, found without reading it; None if there is no such thing."""
        return None

    def check(self, split: str, num_lines: int, num_words: int, num_bytes: int, text_digest: str) -> None:
        """Raise DataError if a split is not what this corpus is known to be. ``num_words`` counts each line's eos."""
        return

    def pieces(self, split: str) -> Iterator[Piece]:
        """The cleaned documents of one split, in order. Can be called again and again."""
        return (piece for _, piece in self.read((split,)))

    def read(self, splits: Collection[str] | None = None) -> Iterator[tuple[str, Piece]]:
        """One pass: the cleaned documents of the given splits (all by default), which may take turns."""
        wanted = self.splits if splits is None else splits
        raw = self._read(wanted)
        if self._cleaning is None:
            return raw
        return self._cleaned(raw, {split: Cleaner(self._cleaning) for split in wanted})

    def cleaning_report(self) -> dict[str, dict[str, dict[str, int]]]:
        """Split -> step -> counts before and after, of the last whole pass over all splits."""
        return self._report

    def _cleaned(
        self, raw: Iterator[tuple[str, Piece]], cleaners: Mapping[str, Cleaner]
    ) -> Iterator[tuple[str, Piece]]:
        def document(piece: Piece) -> Iterator[Piece]:
            yield piece
            while not piece.ends_document:
                _, piece = next(raw)
                yield piece

        for split, first in raw:
            for cleaned in cleaners[split].clean(document(first)):
                yield split, cleaned
        if set(cleaners) == set(self.splits):
            self._report = {split: cleaner.plain_report() for split, cleaner in cleaners.items()}


class RecordCorpus(Corpus):
    """One document a record; held-out documents are chosen by a hash of their text, so that copies stay together."""

    _held_out: dict[str, float]
    _own: tuple[str, ...]

    @abstractmethod
    def _texts(self, split: str) -> Iterator[str]:
        """The documents of a split that has a source of its own."""

    def _read(self, splits: Collection[str]) -> Iterator[tuple[str, Piece]]:
        for own in self._own:
            cut = self._held_out if own == "train" else {}
            if own not in splits and not any(split in splits for split in cut):
                continue
            for text in self._texts(own):
                split = _choose(text, cut) if cut else own
                if split in splits:
                    for piece in document_pieces(text):
                        yield split, piece


def held_out_shares(valid: float, test: float, own: Collection[str]) -> dict[str, float]:
    """The splits that are cut from train, with their shares."""
    shares = {"valid": valid, "test": test}
    return {split: share for split, share in shares.items() if split not in own and share > 0}


def _choose(text: str, shares: Mapping[str, float]) -> str:
    position = hash_fraction(text.encode())
    for split, share in shares.items():
        if position < share:
            return split
        position -= share
    return "train"


def hash_fraction(data: bytes) -> float:
    """A number in [0, 1) that depends on the data only."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64
