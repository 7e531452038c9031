"""Laws that every tokenizer keeps on every text."""

from __future__ import annotations

import tempfile
from pathlib import Path

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
from lmkit.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from lmkit.tokenizers.probe import vouch

TRAIN = "a bc abc  <s> c\tb\n\n我喜欢 <unk> abc abc bc é 1 22 333\nb a ab ca bca cab .\n"
CONFIGS = {
    "word": WordTokenizerConfig(),
    "char": CharTokenizerConfig(),
    "byte": ByteTokenizerConfig(),
    "unigram": SentencePieceTokenizerConfig(vocab_size=310),
    "bpe": SentencePieceTokenizerConfig(vocab_size=310, algorithm=SentencePieceKind.bpe),
}
TOKENIZERS = {name: train_tokenizer(config, lambda: iter([TRAIN])) for name, config in CONFIGS.items()}
LOSSLESS = ["byte", "unigram", "bpe"]

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
spiced_text = st.lists(
    st.one_of(any_text, st.sampled_from(["</s>", "<unk>", "<0x0A>", "▁", " ", "\n", "\t", "\r\n", "abc", "我", "\0"])),
    max_size=8,
).map("".join)
known_text = st.text(st.sampled_from(sorted(set(TRAIN))), max_size=60)
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
examples = settings(max_examples=60, deadline=None)


@pytest.mark.parametrize("name", LOSSLESS)
@given(text=spiced_text)
@examples
def test_lossless_tokenizers_round_trip_every_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=known_text)
@examples
def test_char_round_trips_known_characters(text: str) -> None:
    tokenizer = TOKENIZERS["char"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(lines=st.lists(st.lists(st.sampled_from(TRAIN.split()), max_size=6), max_size=6), blank=st.sampled_from(" \t\r"))
@examples
def test_word_round_trips_to_the_canonical_text(lines: list[list[str]], blank: str) -> None:
    tokenizer = TOKENIZERS["word"]
    canonical = "\n".join(" ".join(line) for line in lines)
    assert tokenizer.decode(tokenizer.encode("\n".join(blank.join(line) + blank for line in lines))) == canonical


@every_tokenizer
@given(text=spiced_text)
@examples
def test_ids_lie_in_the_vocabulary_and_text_never_makes_an_end_of_document(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.ndim == 1
    assert ids.size == 0 or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
    assert (ids == tokenizer.eos_id).sum() == (text.count("\n") if tokenizer.ends_lines else 0)


@every_tokenizer
@given(data=st.data())
@examples
def test_a_stream_gives_what_decode_gives(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    decoder = tokenizer.decoder()
    pieces = [decoder.push(id) for id in ids]
    text = "".join(pieces) + decoder.flush()
    assert text == tokenizer.decode(ids)
    text.encode()
    assert "".join(map(decoder.push, ids)) + decoder.flush() == text, "a flushed decoder is as new"


@every_tokenizer
@given(first=spiced_text, second=spiced_text)
@examples
def test_text_may_be_cut_at_line_ends(tokenizer: Tokenizer, first: str, second: str) -> None:
    apart = [*tokenizer.encode(first + "\n"), *tokenizer.encode(second)]
    assert apart == tokenizer.encode(f"{first}\n{second}").tolist()


@given(words=st.lists(any_text, min_size=1, max_size=8), kind=st.sampled_from(["word", "char", "unigram"]))
@settings(max_examples=25, deadline=None)
def test_saving_and_loading_changes_nothing(words: list[str], kind: str) -> None:
    text = "a b " + " ".join(words)
    tokenizer = train_tokenizer(CONFIGS[kind], lambda: iter([text]))
    vouch(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        loaded = load_tokenizer(Path(folder))
        loaded.save(Path(folder))
        assert load_tokenizer(Path(folder)).digest == loaded.digest == tokenizer.digest
    assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()
