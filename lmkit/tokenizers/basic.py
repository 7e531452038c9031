"""Tokenizers without a model: words, characters, bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from lmkit.errors import DataError
from lmkit.tokenizers.base import (
    EOD,
    EOS,
    UNK,
    UNKNOWN_CHAR,
    BytesTokenizer,
    Ids,
    Lines,
    StreamDecoder,
    Tokenizer,
    utf8,
)

WordCounter = Callable[[Iterable[str]], Counter[str]]


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word, between white space, is in the texts."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.split())
    return counts


class WordTokenizer(Tokenizer):
    """Words split at white space; ``<unk>`` is id 0, ``<eos>`` id 1, then words by falling frequency.

    ``<unk>`` in the text is that same type. The text ``<eos>`` is an unknown word, so that no text can end a line but
    by ending it. decode(encode(x)) is the canonical form of x (each line's words joined by one blank) if all its words
    are known. A last line without "\\n" gets no ``<eos>``.
    """

    kind = "word"
    ends_lines = True
    eos_id = 1

    def __init__(self, words: Sequence[str]) -> None:
        self.unk_id = 0
        self.words = [UNK, EOS, *words]
        self.vocab_size = len(self.words)
        self._ids = _WordIds({word: i for i, word in enumerate(self.words) if i != self.eos_id})
        if len(self._ids) != self.vocab_size - 1 or EOS in self._ids:
            raise DataError("a word stands twice in the vocabulary")
        if any(word.split() != [word] for word in words):
            raise DataError("a word of the vocabulary is empty or holds white space")

    @classmethod
    def train(cls, lines: Lines, vocab_size: int | None, count: WordCounter | None = None) -> WordTokenizer:
        """The ``vocab_size`` - 2 most frequent words (None: all); equally frequent ones in code point order.

        ``count`` counts the words of texts; None: on one core.
        """
        counts = (count or count_words)(lines())
        if not counts:
            raise DataError("the train split has no words to make a vocabulary of")
        for special in (UNK, EOS):
            counts.pop(special, None)
        words = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(words if vocab_size is None else words[: vocab_size - 2])

    def encode(self, text: str) -> Ids:
        ids: list[int] = []
        find = self._ids.__getitem__
        for line in text.split("\n"):
            ids += map(find, line.split())
            ids.append(self.eos_id)
        ids.pop()
        return np.array(ids, dtype=np.int64)

    def decoder(self) -> StreamDecoder:
        return _WordDecoder(self)

    def token_text(self, id: int) -> str:
        return self.words[self.check_id(id)]

    def content(self) -> bytes:
        return "\n".join(self.words[2:]).encode()

    @classmethod
    def from_content(cls, content: bytes) -> WordTokenizer:
        return cls(content.decode().split("\n") if content else [])


class _WordIds(dict[str, int]):
    """Ids of words; a missing one is unknown. Faster than ``get`` with a default in a ``map``."""

    def __missing__(self, word: str) -> int:
        return 0


class _WordDecoder(StreamDecoder):
    """A blank between two words, "\\n" for ``<eos>``."""

    def __init__(self, tokenizer: WordTokenizer) -> None:
        self.tokenizer = tokenizer
        self.after_word = False

    def push(self, id: int) -> str:
        if id == self.tokenizer.eos_id:
            self.after_word = False
            return "\n"
        text = " " + self.tokenizer.token_text(id) if self.after_word else self.tokenizer.token_text(id)
        self.after_word = True
        return text

    def flush(self) -> str:
        self.after_word = False
        return ""


class CharTokenizer(BytesTokenizer):
    """Unicode characters: ``<unk>`` is id 0, the end of a document id 1, then the characters in code point order.

    Unknown characters decode to U+FFFD. decode(encode(x)) == x if all characters of x are known.
    """

    kind = "char"
    encodes_slowly = False
    eos_id = 1

    def __init__(self, characters: str) -> None:
        self.unk_id = 0
        if list(characters) != sorted(set(characters)):
            raise DataError("the characters are not distinct and in code point order")
        self.characters = characters
        self.bytes_of = [UNKNOWN_CHAR.encode(), b"", *(char.encode() for char in characters)]
        self.vocab_size = len(self.bytes_of)
        self._id_of_code = np.zeros(0x110000, dtype=np.int32)
        self._id_of_code[[ord(char) for char in characters]] = np.arange(2, self.vocab_size)

    @classmethod
    def train(cls, lines: Lines) -> CharTokenizer:
        characters: set[str] = set()
        for text in lines():
            characters.update(text)
        if not characters:
            raise DataError("the train split has no characters to make a vocabulary of")
        return cls("".join(sorted(characters)))

    def encode(self, text: str) -> Ids:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids: Ids = self._id_of_code[codes].astype(np.int64)
        return ids

    def token_text(self, id: int) -> str:
        return (UNK, EOD)[id] if self.check_id(id) < 2 else self.characters[id - 2]

    def content(self) -> bytes:
        return self.characters.encode()

    @classmethod
    def from_content(cls, content: bytes) -> CharTokenizer:
        return cls(content.decode())


class ByteTokenizer(BytesTokenizer):
    """The bytes of UTF-8, ids 0 to 255; the end of a document is id 256. Round-trips every text."""

    kind = "byte"
    encodes_slowly = False
    eos_id = 256
    vocab_size = 257

    def __init__(self) -> None:
        self.bytes_of = [*(bytes([i]) for i in range(256)), b""]

    def encode(self, text: str) -> Ids:
        return np.frombuffer(utf8(text), dtype=np.uint8).astype(np.int64)

    def token_text(self, id: int) -> str:
        printable = 0x20 < self.check_id(id) < 0x7F
        return EOD if id == self.eos_id else chr(id) if printable else f"<0x{id:02X}>"

    def content(self) -> bytes:
        return b""

    @classmethod
    def from_content(cls, content: bytes) -> ByteTokenizer:
        if content:
            raise DataError("a byte tokenizer has no data")
        return cls()
