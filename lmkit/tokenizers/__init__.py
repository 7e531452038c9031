"""Tokenizers: text to token ids and back, trained in place, saved without pickle and loaded strictly.

``word`` reads a line as its words and one ``<eos>`` that stands for the line break. All the others encode the text as
it is, line breaks included, and put one end-of-document token after each document. Either way ``eos_id`` is what the
first token of a stream is conditioned on. Writing the name of a control token in the text does not make one: ``</s>``
is a few ordinary tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import NoneType

from lmkit.config.data import (
    ByteTokenizerConfig,
    CharTokenizerConfig,
    HfTokenizerConfig,
    SentencePieceTokenizerConfig,
    TokenizerConfig,
    WordTokenizerConfig,
)
from lmkit.errors import ConfigError, DataError
from lmkit.tokenizers.base import (
    FORMAT,
    HEADER_FILE,
    VERSION,
    Lines,
    StreamDecoder,
    Tokenizer,
    digest_of,
    one_line,
    utf8,
)
from lmkit.tokenizers.basic import ByteTokenizer, CharTokenizer, WordCounter, WordTokenizer
from lmkit.tokenizers.hf import HfTokenizer
from lmkit.tokenizers.probe import try_in_child
from lmkit.tokenizers.sentencepiece import SentencePieceTokenizer

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "HfTokenizer",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "WordTokenizer",
    "load_tokenizer",
    "train_tokenizer",
]

MAX_FILE_BYTES = 1 << 27

KINDS: dict[str, type[Tokenizer]] = {
    cls.kind: cls for cls in (WordTokenizer, CharTokenizer, ByteTokenizer, SentencePieceTokenizer, HfTokenizer)
}
"""The name in a saved tokenizer -> its class."""


def train_tokenizer(config: TokenizerConfig, lines: Lines, count: WordCounter | None = None) -> Tokenizer:
    """Train, or for ``hf`` read, the tokenizer that ``config`` asks for.

    ``lines()`` starts a new pass over the text of the train split, in pieces that end at line ends. The result depends
    on the text and the options only. ``count`` counts words, see ``WordTokenizer.train``. Raises DataError if the text
    is empty or does not allow it.
    """

    def checked() -> Iterator[str]:
        for text in lines():
            utf8(text)
            yield text

    match config:
        case WordTokenizerConfig():
            return WordTokenizer.train(checked, config.vocab_size, count)
        case CharTokenizerConfig():
            return CharTokenizer.train(checked)
        case ByteTokenizerConfig():
            return ByteTokenizer()
        case SentencePieceTokenizerConfig():
            return SentencePieceTokenizer.train(checked, config)
        case HfTokenizerConfig():
            return _read_hf(Path(os.path.expanduser(config.path)))
    raise ConfigError(f"unknown tokenizer configuration {type(config).__name__}")


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read what ``save`` wrote. Raises DataError, naming the file, for anything missing, damaged or foreign.

    The file of another library is tried in a child process first, once (see ``probe.py``).
    """
    path = directory / HEADER_FILE
    try:
        header = json.loads(read_bytes(path).decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({one_line(error)})") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise DataError(f"{path} is not a tokenizer of lmkit", "a Hugging Face file is read with tokenizer=hf")
    if header.get("version") != VERSION:
        raise DataError(f"{path} has version {header.get('version')!r}, this lmkit reads {VERSION}", "update lmkit")
    kind, data, digest = header.get("kind"), header.get("data"), header.get("digest")
    cls = KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None or set(header) != {"format", "version", "kind", "digest", "data"}:
        raise DataError(f"{path} is damaged (unknown kind or keys)", "if a newer lmkit has written it, update lmkit")
    if not isinstance(data, NoneType if cls.side_file else str):
        raise DataError(f"{path} is damaged (data of the wrong type)")
    if cls.side_file is not None:
        path = directory / cls.side_file
    try:
        content = read_bytes(path) if data is None else data.encode()
        found = digest_of(cls.kind, content)
        if found != digest:
            raise DataError(f"its digest is {found[:12]}, expected {str(digest)[:12]}")
        if cls.side_file is not None:
            try_in_child(cls, content)
        return cls.from_content(content)
    except (DataError, ValueError) as error:
        reason = one_line(error).removeprefix(f"{path} ")
        raise DataError(f"{path} is damaged: {reason}", "restore it from a backup or another checkpoint") from None


def _read_hf(path: Path) -> HfTokenizer:
    if os.path.isdir(path):
        path = path / HEADER_FILE
    content = read_bytes(path)
    try:
        try_in_child(HfTokenizer, content)
        return HfTokenizer(content)
    except DataError as error:
        raise DataError(
            f"{path} is not a usable tokenizer.json: {error}", "set tokenizer.path to another file"
        ) from None


def read_bytes(path: Path, remedy: str = "check the path") -> bytes:
    """What is in a file of a tokenizer. Raises DataError that names it; remedy: what to do if it is not there."""
    try:
        if not os.path.isfile(path):  # False, where Path.is_file raises, for a name that is too long
            raise DataError(f"{path} is missing", remedy)
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataError(f"{path} is too large for a tokenizer ({size} bytes, at most {MAX_FILE_BYTES})")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or one_line(error)})") from None
