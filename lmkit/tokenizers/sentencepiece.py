"""Subword tokenizers trained in place with sentencepiece."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from lmkit.config.data import SentencePieceTokenizerConfig
from lmkit.errors import DataError
from lmkit.tokenizers.base import EOD, UNKNOWN_CHAR, BytesTokenizer, Ids, Lines, one_line, utf8

BLANK = "\N{LOWER ONE EIGHTH BLOCK}"


class SentencePieceTokenizer(BytesTokenizer):
    """A sentencepiece model with byte fallback (Kudo and Richardson, 2018). Round-trips every text.

    Text is encoded line by line, so that a text can be cut at line breaks without a change and the float32 path scores
    of a unigram model cannot drift over a long text; "\\n" is a piece of its own. U+2581, which sentencepiece writes
    for a blank, is encoded as its three bytes. Nothing is ever unknown, though ``<unk>`` (id 0) has to exist.
    """

    kind = "sentencepiece"
    side_file = "sentencepiece.model"
    library = "sentencepiece"
    _BATCH_CHARS = 1 << 22
    num_threads = 2
    """Threads that encode a batch of many lines."""

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self._model = model
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = int(self._sp.vocab_size())
            self.eos_id, self.unk_id = int(self._sp.eos_id()), int(self._sp.unk_id())
            self._pieces: list[str] = [self._sp.id_to_piece(i) for i in range(self.vocab_size)]
            self.bytes_of = [self._bytes_of_piece(i) for i in range(self.vocab_size)]
        except (RuntimeError, ValueError, TypeError, OSError, IndexError) as error:
            raise DataError(f"sentencepiece cannot read the model ({one_line(error)})") from None
        by_bytes = {self.bytes_of[i]: i for i in range(self.vocab_size) if self._sp.is_byte(i)}
        if len(by_bytes) != 256 or "\n" not in self._pieces or self.eos_id < 0:
            raise DataError("the sentencepiece model lacks the byte pieces, the line break or the end of document")
        self._newline_id = self._pieces.index("\n")
        self._blank_ids = [by_bytes[bytes([byte])] for byte in BLANK.encode()]
        probe = " <s>  x\t\u00e9\uff21\n\n" + BLANK
        if self.decode(self.encode(probe)) != probe:
            raise DataError("the sentencepiece model changes the text", "train it with tokenizer=sentencepiece")

    def _bytes_of_piece(self, id: int) -> bytes:
        if self._sp.is_byte(id):
            return bytes([int(self._pieces[id][1:-1], 16)])
        if self._sp.is_unknown(id):
            return UNKNOWN_CHAR.encode()
        return b"" if self._sp.is_control(id) else self._pieces[id].replace(BLANK, " ").encode()

    def encode(self, text: str) -> Ids:
        utf8(text)
        lines = text.split("\n")
        batches: list[Ids] = []
        start = size = 0
        for end, line in enumerate(lines, 1):
            size += len(line)
            if size > self._BATCH_CHARS or end == len(lines):
                batches.append(self._encode_lines(lines[start:end]))
                start, size = end, 0
        return np.concatenate(batches)[:-1]

    def _encode_lines(self, lines: list[str]) -> Ids:
        ids: list[int] = []
        num_threads = self.num_threads if len(lines) > 1000 else 1
        for line, line_ids in zip(lines, self._sp.encode(lines, num_threads=num_threads), strict=True):
            if BLANK in line:
                parts = self._sp.encode(line.split(BLANK), num_threads=1)
                ids += parts[0]
                ids += chain.from_iterable(self._blank_ids + part for part in parts[1:])
            else:
                ids += line_ids
            ids.append(self._newline_id)
        return np.array(ids, dtype=np.int64)

    def token_text(self, id: int) -> str:
        return EOD if self.check_id(id) == self.eos_id else self._pieces[id]

    def pieces_and_scores(self) -> tuple[list[str], list[float]]:
        """The pieces by id, a blank written U+2581, and their scores (log probabilities, or minus the rank)."""
        return self._pieces, [float(self._sp.get_score(id)) for id in range(self.vocab_size)]

    def is_byte(self, id: int) -> bool:
        """Whether a piece stands for one byte of a character that is no piece."""
        return bool(self._sp.is_byte(id))

    def is_normal(self, id: int) -> bool:
        """Whether a piece is text: neither a control token, nor unknown, nor a byte, nor the line break."""
        return (
            not (self._sp.is_byte(id) or self._sp.is_unknown(id) or self._sp.is_control(id)) and id != self._newline_id
        )

    def is_unigram(self) -> bool:
        """Whether the pieces were chosen by likelihood; else by merging (BPE)."""
        whole = [score for id, score in enumerate(self.pieces_and_scores()[1]) if self.is_normal(id)]
        return whole != sorted(map(float, range(1 - len(whole), 1)), reverse=True)

    def content(self) -> bytes:
        return self._model

    @classmethod
    def from_content(cls, content: bytes) -> SentencePieceTokenizer:
        return cls(content)

    _MAX_TRAIN_CHARS = 16_000_000
    _MAX_LINE_CHARS = 4096
    _NUM_META_PIECES = 259

    @classmethod
    def train(cls, lines: Lines, config: SentencePieceTokenizerConfig) -> SentencePieceTokenizer:
        """Train on at most ``max_sentences`` evenly drawn lines and 16 million characters (about 20 bytes each).

        The same text and options give the same model: one thread, no sampling inside sentencepiece. The rarest 0.05 %
        of the characters, and those that would fill more than half of the vocabulary, are left to the byte pieces.
        """
        import sentencepiece

        sample = list(_draw(lines, config.max_sentences, cls._MAX_TRAIN_CHARS))
        known = _common_characters(sample, (config.vocab_size - cls._NUM_META_PIECES) // 2)
        model = io.BytesIO()
        if not known:
            raise DataError("the train split has no text to train the sentencepiece tokenizer on", "use tokenizer=byte")
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(sample, known, cls._MAX_LINE_CHARS),
                model_writer=model,
                model_type=config.algorithm.name,
                vocab_size=config.vocab_size,
                hard_vocab_limit=False,
                character_coverage=1.0,
                required_chars=BLANK,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                split_digits=True,
                byte_fallback=True,
                user_defined_symbols=["\n"],
                unk_id=0,
                eos_id=1,
                bos_id=-1,
                pad_id=-1,
                max_sentence_length=4 * cls._MAX_LINE_CHARS,
                num_threads=1,
                minloglevel=2,
            )
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            raise DataError(
                f"sentencepiece could not train {config.vocab_size} pieces on this text ({one_line(error)})",
                "change tokenizer.vocab_size or use tokenizer=byte",
            ) from None
        return cls(model.getvalue())


def _draw(lines: Lines, max_lines: int, max_chars: int) -> Iterator[str]:
    """Every n-th line that is not empty, n chosen to keep both limits."""

    def lines_with_text() -> Iterator[str]:
        for text in lines():
            yield from filter(None, text.split("\n"))

    num_lines = num_chars = 0
    for line in lines_with_text():
        num_lines += 1
        num_chars += len(line)
    keep = min(num_lines, max_lines, max(1, num_lines * max_chars // max(num_chars, 1)))
    chars = 0
    for i, line in enumerate(lines_with_text()):
        if (i + 1) * keep // num_lines > i * keep // num_lines:
            yield line[: max_chars - chars]
            chars += len(line)
            if chars >= max_chars:
                return


def _common_characters(sample: Sequence[str], max_chars: int) -> set[str]:
    """The most frequent characters that make up 99.95 % of the text, at most ``max_chars`` of them.

    Without NUL, tab, sentencepiece's blank and its mark for unknown characters, which its trainer keeps for itself.
    """
    counts: Counter[str] = Counter()
    for line in sample:
        counts.update(line)
    for reserved in "\0\t\u2581\u2585":
        counts.pop(reserved, None)
    common: set[str] = set()
    covered = 0
    for char, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:max_chars]:
        if covered >= 0.9995 * counts.total():
            break
        common.add(char)
        covered += count
    return common


def _sentences(sample: Sequence[str], known: set[str], max_chars: int) -> Iterator[str]:
    """The stretches of known characters, none longer than ``max_chars``."""
    for line in sample:
        if not known.issuperset(line):
            line = "".join(char if char in known else "\n" for char in line)
        for part in line.split("\n"):
            for start in range(0, len(part), max_chars):
                yield part[start : start + max_chars]
