"""A tokenizer as a tokenizer.json gives the same ids."""

from __future__ import annotations

import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkit.config.data import (
    ByteTokenizerConfig,
    CharTokenizerConfig,
    SentencePieceKind,
    SentencePieceTokenizerConfig,
    WordTokenizerConfig,
)
from lmkit.errors import DataError
from lmkit.hf.sample import PAGE
from lmkit.tokenizers import (
    ByteTokenizer,
    HfTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    WordTokenizer,
    train_tokenizer,
)
from lmkit.tokenizers.convert import SPACES, end_name, hf_json

CONFIGS = {
    "word": WordTokenizerConfig(),
    "char": CharTokenizerConfig(),
    "byte": ByteTokenizerConfig(),
    "unigram": SentencePieceTokenizerConfig(vocab_size=450),
    "bpe": SentencePieceTokenizerConfig(vocab_size=450, algorithm=SentencePieceKind.bpe),
}
TEXT = "".join(f"the {n} cats sat on a mat, and 我们 liked it; théâtre {n * n}\n" for n in range(300)) + PAGE


@functools.cache
def pair(name: str) -> tuple[Tokenizer, HfTokenizer]:
    tokenizer = train_tokenizer(CONFIGS[name], lambda: iter([TEXT]))
    return tokenizer, HfTokenizer(hf_json(tokenizer))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_ids_of_text_the_end_and_the_size_are_the_same(name: str) -> None:
    tokenizer, converted = pair(name)
    assert converted.vocab_size == tokenizer.vocab_size
    assert converted.eos_id == tokenizer.eos_id
    assert converted.token_text(converted.eos_id) == end_name(tokenizer)
    for text in (TEXT, PAGE, "", "\n", "\n\n", " ", "a\nb", "\nx", "x\n", "\x00", "\U0010ffff", "a" * 500):
        assert same(name, text), text[:40]


def same(name: str, text: str) -> bool:
    """Whether the ids are the same, or for unigram as probable: it adds in fp32, the library in fp64."""
    tokenizer, converted = pair(name)
    expected, found = tokenizer.encode(text).tolist(), converted.encode(text).tolist()
    if expected != found and isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.is_unigram():
        _, scores = tokenizer.pieces_and_scores()
        return abs(sum(scores[i] for i in expected) - sum(scores[i] for i in found)) < 1e-3
    return bool(expected == found)


@pytest.mark.parametrize("name", CONFIGS)
@given(text=st.text(st.sampled_from(list("the cats 我é\n\t\r\u00a0\u2003\u0301xyz0123.,<>_😀\x00\x1c")), max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_without_the_names_of_tokens_gets_the_same_ids(name: str, text: str) -> None:
    assert same(name, text)


@given(text=st.lists(st.sampled_from(["a", "b", "<eos>", "<unk>", *SPACES, "\n"]), max_size=40).map("".join))
@settings(max_examples=200, deadline=None)
def test_words_are_cut_at_the_same_blanks_and_a_written_eos_is_unknown(text: str) -> None:
    tokenizer = WordTokenizer(["a", "b", "ab"])
    assert HfTokenizer(hf_json(tokenizer)).encode(text).tolist() == tokenizer.encode(text).tolist()


@pytest.mark.parametrize("name", ["char", "byte", "unigram", "bpe"])
def test_decoding_gives_the_text_back(name: str) -> None:
    tokenizer, converted = pair(name)
    ids = tokenizer.encode(PAGE).tolist()
    assert converted.decode(ids) == PAGE == tokenizer.decode(ids)


def test_a_file_of_the_library_loses_only_what_is_not_used() -> None:
    spec = json.loads(hf_json(ByteTokenizer()))
    spec["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    spec["added_tokens"] = []
    del spec["model"]["vocab"]["<|endoftext|>"]
    tokenizer = HfTokenizer(json.dumps(spec).encode())
    again = HfTokenizer(hf_json(tokenizer))
    assert again.encode(PAGE).tolist() == tokenizer.encode(PAGE).tolist()
    assert (again.eos_id, again.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size) == (256, 257)
    assert again.token_text(256) == "<|endoftext|>"


def test_a_kind_that_nobody_knows_is_refused() -> None:

    with pytest.raises(DataError, match="kind unknown"):
        hf_json(_Unknown())  # type: ignore[arg-type]


class _Unknown:
    kind = "unknown"
