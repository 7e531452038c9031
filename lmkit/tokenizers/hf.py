"""Tokenizers read from a ``tokenizer.json`` of the Hugging Face tokenizers library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any
from unicodedata import normalize

import numpy as np

from lmkit.errors import DataError
from lmkit.tokenizers.base import EOD, BytesTokenizer, Ids, StreamDecoder, one_line, utf8


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte (Radford et al. 2019): itself if visible in Latin-1, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]


class HfTokenizer(BytesTokenizer):
    """A ``tokenizer.json`` of the Hugging Face tokenizers library.

    Special tokens written in the text are encoded as plain text; added tokens that the file does not call special are
    still matched. Truncation, padding, dropout and post-processing in the file are switched off, so that a text has one
    encoding and all of it. The end of a document is the first of ``<|endoftext|>``, ``</s>``, ``<eos>``,
    ``<|end_of_text|>`` that exists, or else a new id after the last one.
    Round-trips only if the file's normalizer and pre-tokenizer do. Special tokens decode to nothing. Byte-level and
    Llama-style decoders stream; with any other decoder the text comes at the end, in ``flush``.
    """

    kind = "hf"
    side_file = "hf.json"
    library = "tokenizers"
    EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
    MAX_IDS = 1 << 22

    def __init__(self, content: bytes) -> None:
        import tokenizers

        self._json = content
        try:
            self._hf = tokenizers.Tokenizer.from_str(content.decode())
            spec = json.loads(content)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the Rust library is no Exception
            raise DataError(f"the tokenizers library cannot read it ({one_line(error)})") from None
        self._hf.no_truncation()
        self._hf.no_padding()
        self._hf.post_processor = None
        model = self._hf.model
        if isinstance(model, tokenizers.models.BPE):
            model.dropout = None
        self._hf.encode_special_tokens = True
        tokens = {id: token for token, id in self._hf.get_vocab(with_added_tokens=True).items()}
        if not tokens:
            raise DataError("its vocabulary is empty")
        num_ids = max(tokens) + 1
        if num_ids > self.MAX_IDS:
            raise DataError(f"its largest token id is {num_ids - 1}, which no model could hold")
        known = [id for id in map(self._hf.token_to_id, self.EOS_NAMES) if id is not None]
        self.eos_id = known[0] if known else num_ids
        self.vocab_size = max(num_ids, self.eos_id + 1)
        self._tokens = [tokens.get(id, EOD if id == self.eos_id else "") for id in range(self.vocab_size)]
        unk = spec["model"].get("unk_token")
        self.unk_id = self._hf.token_to_id(unk) if isinstance(unk, str) else spec["model"].get("unk_id")
        silent = {token["id"] for token in spec.get("added_tokens") or () if token["special"]} | {self.eos_id}
        style = _HfStyle.of(spec.get("decoder"))
        self._streams = style is not None
        if style is not None:
            self.strips_blank = style.strips_blank
            self.bytes_of = [b"" if i in silent else style.bytes_of(token) for i, token in enumerate(self._tokens)]

    def encode(self, text: str) -> Ids:
        utf8(text)
        try:
            return np.array(self._hf.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a plain Exception, or a panic of the Rust library, which is none
            raise DataError(f"the tokenizers library cannot encode the text ({one_line(error)})") from None

    def decode(self, ids: Sequence[int] | Ids) -> str:
        if self._streams:
            return super().decode(ids)
        plain = [i for i in map(int, ids) if self.check_id(i) != self.eos_id]
        return str(self._hf.decode(plain, skip_special_tokens=True))

    def first_change(self, lines: Iterable[str]) -> tuple[str, str] | None:
        """The place in the first of the lines that does not come back, as it was and as it came back.

        Blanks, canonically equal characters (NFC) and lines with unknown words, which are counted, are left out of
        account; ends of line, which count as words, are not.
        """
        line_end = self.encode("\n").tolist()
        if self.unk_id not in line_end and line_end in ([], self.encode(" ").tolist()):
            return "\n", self.decode(line_end)
        for line in lines:
            ids = self.encode(line)
            if self.unk_id is None or self.unk_id not in ids:
                before, after = ("".join(normalize("NFC", text).split()) for text in (line, self.decode(ids)))
                if before != after:
                    start = max(0, _common(before, after) - 5)
                    return before[start : start + 20], after[start : start + 20]
        return None

    def decoder(self) -> StreamDecoder:
        return super().decoder() if self._streams else _WholeDecoder(self)

    def token_text(self, id: int) -> str:
        return self._tokens[self.check_id(id)]

    def content(self) -> bytes:
        return self._json

    @classmethod
    def from_content(cls, content: bytes) -> HfTokenizer:
        return cls(content)


class _WholeDecoder(StreamDecoder):
    """For decoders whose text of a prefix may still change: everything is held back."""

    def __init__(self, tokenizer: HfTokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.skipped = ""

    def push(self, id: int) -> str:
        self.ids.append(self.tokenizer.check_id(id))
        return ""

    def flush(self) -> str:
        text = self.tokenizer.decode(self.ids)
        kept = _common(self.skipped, text)  # what follows may have changed the end of what was skipped
        self.ids, self.skipped = [], ""
        return text[kept:]

    def skip(self, ids: Sequence[int]) -> None:
        super().skip(ids)
        self.skipped = self.tokenizer.decode(self.ids)


def _common(first: str, second: str) -> int:
    """How many characters the two have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


class _HfStyle:
    """How the tokens of a ``tokenizer.json`` stand for bytes: GPT-2's byte alphabet, or U+2581 and ``<0x41>``.

    The library itself turns a whole run of byte tokens into U+FFFD if one of them is wrong; here only wrong bytes are.
    """

    def __init__(self, *, byte_level: bool, byte_fallback: bool, strips_blank: bool) -> None:
        self.byte_level, self.byte_fallback, self.strips_blank = byte_level, byte_fallback, strips_blank
        self.byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}

    @classmethod
    def of(cls, decoder: Any) -> _HfStyle | None:
        """The style of a ``decoder`` entry; None if its tokens do not simply stand for bytes."""
        steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
        kinds = {step["type"] for step in steps}
        if kinds == {"ByteLevel"}:
            return cls(byte_level=True, byte_fallback=False, strips_blank=False)
        strips = False
        for step in steps:
            match step:
                case {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}:
                    pass
                case {"type": "Metaspace", "replacement": "\u2581"}:
                    strips = strips or step.get("prepend_scheme", "always") != "never"
                case {"type": "Strip", "content": " ", "start": 0 | 1, "stop": 0}:
                    strips = strips or step["start"] == 1
                case {"type": "ByteFallback" | "Fuse"}:
                    pass
                case _:
                    return None
        if not kinds & {"Replace", "Metaspace"}:
            return None
        return cls(byte_level=False, byte_fallback="ByteFallback" in kinds, strips_blank=strips)

    def bytes_of(self, token: str) -> bytes:
        if self.byte_level:
            in_alphabet = all(char in self.byte_of for char in token)
            return bytes(self.byte_of[char] for char in token) if in_alphabet else token.encode()
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()
