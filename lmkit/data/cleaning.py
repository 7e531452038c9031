"""Documents as streams of pieces, and the cleaning steps that a corpus may ask for, with a report of what they did.

A document always ends in "\\n" (a missing one is added) and is never only white space (such documents are dropped and
counted). The other steps are off by default and run in this order: control characters, NFC, empty, short, duplicate.
Memory is bounded: a document that must be seen whole before it can be kept waits in a temporary file;
``drop_duplicates`` remembers 16 bytes for each document (about 100 with Python's overhead).
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import IO

from lmkit.config.data import CleaningConfig

VERSION = 3
"""Raised when the same options leave other text."""

_CONTROL = re.compile("{0}{0}*".format("[\x00-\x08\x0b-\x1f\x7f-\x9f]"))  # found three times as fast as with +
_WAITING_BYTES = 16 << 20
_PIECE_CHARS = 1 << 20


@dataclass(frozen=True)
class Piece:
    """Consecutive text of one document: whole lines, but for lines of many megabytes. About 1 MB."""

    text: str
    ends_document: bool
    """Whether the document ends with this piece."""


@dataclass
class StepReport:
    """What one cleaning step got and what it left, documents and characters."""

    documents_before: int = 0
    documents_after: int = 0
    chars_before: int = 0
    chars_after: int = 0


class Cleaner:
    """Cleans the documents of one split, one after the other; ``report`` holds what each step did so far."""

    def __init__(self, config: CleaningConfig) -> None:
        self.config = config
        self.report: dict[str, StepReport] = {}
        self._seen: set[bytes] = set()

    def clean(self, document: Iterable[Piece]) -> Iterator[Piece]:
        """The cleaned pieces of a document; none if it is dropped. Reads the document to its end."""
        config, stream = self.config, end_line(document)
        if config.strip_control:
            stream = self._step("control characters", stream, lambda s: _mapped(s, _without_control))
        if config.normalize_nfc:
            stream = self._step("NFC", stream, lambda s: _mapped(s, lambda t: unicodedata.normalize("NFC", t)))
        stream = self._step("empty documents", stream, lambda s: _at_least(s, 1, _has_text))
        if config.min_chars > 0:
            stream = self._step("short documents", stream, lambda s: _at_least(s, config.min_chars, _num_chars))
        if config.drop_duplicates:
            stream = self._step("duplicate documents", stream, self._unless_seen)
        return stream

    def plain_report(self) -> dict[str, dict[str, int]]:
        """The report as JSON data."""
        return {name: asdict(step) for name, step in self.report.items()}

    def _step(
        self, name: str, stream: Iterator[Piece], apply: Callable[[Iterator[Piece]], Iterator[Piece]]
    ) -> Iterator[Piece]:
        step = self.report.setdefault(name, StepReport())

        def before() -> Iterator[Piece]:
            for piece in stream:
                step.documents_before += piece.ends_document
                step.chars_before += len(piece.text)
                yield piece

        def after() -> Iterator[Piece]:
            for piece in apply(before()):
                step.documents_after += piece.ends_document
                step.chars_after += len(piece.text)
                yield piece

        return after()

    def _unless_seen(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """The document unless an earlier one had the same text, compared by a 128-bit BLAKE2b digest."""
        digest = hashlib.blake2b(digest_size=16)
        with contextlib.closing(_Waiting()) as waiting:
            for piece in pieces:
                digest.update(piece.text.encode())
                if not piece.ends_document:
                    waiting.add(piece)
                elif digest.digest() not in self._seen:
                    self._seen.add(digest.digest())
                    yield from waiting.release()
                    yield piece


class _Waiting:
    """Pieces of a document of which it is not yet known whether it is kept: 16 MB in memory, else in a file."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._lengths: list[int] = []

    def add(self, piece: Piece) -> None:
        """Put a piece that does not end its document, or will not be asked for, behind the others."""
        if self._file is None:
            self._file = tempfile.SpooledTemporaryFile(max_size=_WAITING_BYTES)  # noqa: SIM115 - open till ``close``
        self._lengths.append(self._file.write(piece.text.encode()))

    def release(self) -> Iterator[Piece]:
        """Give them back, in order and once."""
        if self._file is not None:
            self._file.seek(0)
            for length in self._lengths:
                yield Piece(self._file.read(length).decode(), False)
            self.close()

    def close(self) -> None:
        """Forget them."""
        if self._file is not None:
            self._file.close()
        self._file, self._lengths = None, []


def document_pieces(text: str) -> Iterator[Piece]:
    """A document that is in memory as a whole, cut into pieces at line ends; CRLF becomes "\\n"."""
    if "\r" in text:
        text = text.replace("\r\n", "\n")
    start = 0
    while len(text) - start > _PIECE_CHARS:
        cut = text.rfind("\n", start, start + _PIECE_CHARS) + 1 or text.find("\n", start + _PIECE_CHARS) + 1
        if cut in (0, len(text)):
            break
        yield Piece(text[start:cut], False)
        start = cut
    yield Piece(text[start:] if start else text, True)


def one_document(blocks: Iterable[str]) -> Iterator[Piece]:
    """The blocks as the pieces of one document; nothing if there are none."""
    last: str | None = None
    for block in blocks:
        if last is not None:
            yield Piece(last, False)
        last = block
    if last is not None:
        yield Piece(last, True)


def end_line(document: Iterable[Piece]) -> Iterator[Piece]:
    """The document with "\\n" at its end."""
    for piece in document:
        ended = not piece.ends_document or piece.text.endswith("\n")
        yield piece if ended else Piece(piece.text + "\n", True)


def _mapped(pieces: Iterator[Piece], change: Callable[[str], str]) -> Iterator[Piece]:
    for piece in pieces:
        yield Piece(change(piece.text), piece.ends_document)


def _without_control(text: str) -> str:
    return _CONTROL.sub(_left_of_control, text)


def _left_of_control(found: re.Match[str]) -> str:
    """A blank if nothing but control characters (CR, form feed ...) stands between two words, else nothing."""
    text, (start, end) = found.string, found.span()
    separates = any(map(str.isspace, found[0]))
    return " " if separates and text[start - 1 : start].strip() and text[end : end + 1].strip() else ""


def _has_text(piece: Piece) -> int:
    return int(piece.text != "" and not piece.text.isspace())


def _num_chars(piece: Piece) -> int:
    """Without the "\\n" at the end of a document, which may have been added."""
    return len(piece.text) - piece.ends_document


def _at_least(document: Iterator[Piece], minimum: int, measure: Callable[[Piece], int]) -> Iterator[Piece]:
    """The document if its pieces measure ``minimum`` or more in sum."""
    total = 0
    with contextlib.closing(_Waiting()) as waiting:
        for piece in document:
            total += measure(piece)
            if total < minimum:
                waiting.add(piece)
            else:
                yield from waiting.release()
                yield piece
