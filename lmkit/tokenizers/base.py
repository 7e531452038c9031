"""What every tokenizer is: text to ids and back, a decoder for streams, a digest, and saving."""

from __future__ import annotations

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from lmkit.errors import DataError

Ids = npt.NDArray[np.int64]
Lines = Callable[[], Iterator[str]]

UNK, EOS, EOD = "<unk>", "<eos>", "<eod>"
UNKNOWN_CHAR = "\N{REPLACEMENT CHARACTER}"
FORMAT, VERSION = "lmkit-tokenizer", 1
HEADER_FILE = "tokenizer.json"


class StreamDecoder(ABC):
    """Decodes a growing sequence of ids. The pieces it returns, joined, equal ``decode`` of all the ids.

    Text that continues a prompt needs the prompt's ids skipped first: a word's blank depends on what stands before it.
    """

    @abstractmethod
    def push(self, id: int) -> str:
        """The text that became certain with ``id``; incomplete UTF-8 is held back."""

    @abstractmethod
    def flush(self) -> str:
        """What was held back, with U+FFFD for bytes that are not UTF-8. The decoder is as new afterwards."""

    def skip(self, ids: Sequence[int]) -> None:
        """Begin behind the ids of a whole text, of which nothing is given out."""
        for id in ids:
            self.push(id)


class Tokenizer(ABC):
    """A reversible map between text and ids in ``range(vocab_size)``."""

    kind: ClassVar[str]
    side_file: ClassVar[str | None] = None
    """Name of the file that holds the content when it is the file of another library."""
    library: ClassVar[str | None] = None
    """The distribution of that library, which reads the file."""
    ends_lines: ClassVar[bool] = False
    """True: ``eos_id`` ends a line, and documents have no end token of their own."""
    encodes_slowly: ClassVar[bool] = True
    """Whether a long text is worth several processes."""
    vocab_size: int
    eos_id: int
    unk_id: int | None = None

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """Token ids of ``text``, 1-D int64, without an end-of-document token."""

    @abstractmethod
    def decoder(self) -> StreamDecoder:
        """A new decoder of one stream."""

    @abstractmethod
    def token_text(self, id: int) -> str:
        """The token as people should see it in a table; not the same as its decoded text."""

    @abstractmethod
    def content(self) -> bytes:
        """All that defines the tokenizer, in one canonical form."""

    @classmethod
    @abstractmethod
    def from_content(cls, content: bytes) -> Tokenizer:
        """The inverse of ``content``. Raises DataError or ValueError if it is damaged."""

    def encode_document_end(self) -> list[int]:
        """Ids to put after each document."""
        return [] if self.ends_lines else [self.eos_id]

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Text of ``ids``, always valid Unicode; the end-of-document token decodes to nothing.

        Raises DataError for an id outside ``range(vocab_size)``.
        """
        decoder = self.decoder()
        return "".join(map(decoder.push, map(int, ids))) + decoder.flush()

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over kind and content: equal digests encode alike."""
        return digest_of(self.kind, self.content())

    def save(self, directory: Path) -> None:
        """Write ``tokenizer.json``, and a model file beside it where the kind has one, into an existing folder."""
        content = self.content()
        data: str | None = None
        if self.side_file is None:
            data = content.decode()
        else:
            (directory / self.side_file).write_bytes(content)
        header = {"format": FORMAT, "version": VERSION, "kind": self.kind, "digest": self.digest, "data": data}
        text = json.dumps(header, ensure_ascii=False, indent=1) + "\n"
        (directory / HEADER_FILE).write_text(text, encoding="utf-8", newline="\n")

    def check_id(self, id: int) -> int:
        """``id`` itself. Raises DataError if it is outside ``range(vocab_size)``."""
        if not 0 <= id < self.vocab_size:
            raise DataError(f"token id {id} is not in the vocabulary of {self.vocab_size}", "use the run's tokenizer")
        return id


class BytesTokenizer(Tokenizer):
    """A tokenizer whose ids each stand for some bytes of UTF-8 text; decoding joins them."""

    bytes_of: list[bytes]
    strips_blank: bool = False
    """Whether encoding puts a blank before the text, which decoding takes off again."""

    def decoder(self) -> StreamDecoder:
        return BytesDecoder(self)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        text = b"".join(self.bytes_of[self.check_id(int(i))] for i in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_blank else text


class BytesDecoder(StreamDecoder):
    """Gives out whole characters; never splits one."""

    def __init__(self, tokenizer: BytesTokenizer) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.strip = tokenizer.strips_blank

    def push(self, id: int) -> str:
        return self._stripped(self.utf8.decode(self.tokenizer.bytes_of[self.tokenizer.check_id(id)]))

    def flush(self) -> str:
        text = self._stripped(self.utf8.decode(b"", final=True))
        self.utf8.reset()
        self.strip = self.tokenizer.strips_blank
        return text

    def _stripped(self, text: str) -> str:
        if self.strip and text:
            self.strip = False
            return text.removeprefix(" ")
        return text


def digest_of(kind: str, content: bytes) -> str:
    """The digest of a tokenizer of this kind and content."""
    return hashlib.sha256(f"{FORMAT}/{VERSION}/{kind}\n".encode() + content).hexdigest()


def utf8(text: str) -> bytes:
    """``text`` in UTF-8. Raises DataError for lone surrogates, which no encoding of Unicode has."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds a lone surrogate at character {error.start}, which is not Unicode text",
            "write the text in UTF-8",
        ) from None


def one_line(error: BaseException) -> str:
    """What ``error`` says, short and on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
