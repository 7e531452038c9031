from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from lmkit.config.data import (
    ByteTokenizerConfig,
    CharTokenizerConfig,
    HfTokenizerConfig,
    SentencePieceKind,
    SentencePieceTokenizerConfig,
    TokenizerConfig,
    WordTokenizerConfig,
)
from lmkit.errors import DataError, ResourceError
from lmkit.tokenizers import SentencePieceTokenizer, Tokenizer, WordTokenizer, load_tokenizer, probe, train_tokenizer
from lmkit.tokenizers.sentencepiece import _draw

TEXT = "the cat sat on the mat .\nthe dog <unk> on the cat ,  N times\n\nthe end .\n"
SPECIAL_LOOKING = ["<s>", "</s>", "<unk>", "<eod>", "<eos>", "<0x41>", "<|endoftext|>", "▁", "a▁b ▁", "▅", "⁇"]
ODD = [
    "",
    " ",
    "  a   b  ",
    "\t\t",
    "a\r\nb\r",
    "\0a\0",
    "\u2028\u2029\x85\xa0\ufeff",
    "我喜欢学习",
    "👩‍👩‍👧 e\u0301 é",
    "\n\n\n",
]


def lines_of(text: str) -> Callable[[], Iterator[str]]:
    return lambda: iter(text.splitlines(keepends=True))


def byte_level_json(eos: str | None) -> str:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[eos] if eos else [],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.enable_truncation(4)
    return str(tokenizer.to_str())


def llama_style_json() -> str:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcehnot", "▁t"]
    model = tokenizers.models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, [("▁", "t")], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    d = tokenizers.decoders
    tokenizer.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    return str(tokenizer.to_str())


def word_piece_json() -> str:
    model = tokenizers.models.WordPiece({"[UNK]": 0, "the": 1, "cat": 2, "##s": 3}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    return str(tokenizer.to_str())


def read_hf(folder: Path, text: str) -> Tokenizer:
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return train_tokenizer(HfTokenizerConfig(path=str(folder)), lines_of(""))


SENTENCEPIECE = [SentencePieceTokenizerConfig(vocab_size=320, algorithm=kind) for kind in SentencePieceKind]
TRAINED: list[TokenizerConfig] = [WordTokenizerConfig(), CharTokenizerConfig(), ByteTokenizerConfig(), *SENTENCEPIECE]


@pytest.fixture(params=TRAINED, ids=["word", "char", "byte", "unigram", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train_tokenizer(request.param, lines_of(TEXT))


def test_word_vocabulary_is_ordered_by_frequency_then_alphabet() -> None:
    tokenizer = train_tokenizer(WordTokenizerConfig(), lines_of("b a\nc c <unk>\n"))
    assert [tokenizer.token_text(i) for i in range(tokenizer.vocab_size)] == ["<unk>", "<eos>", "c", "a", "b"]


def test_word_vocabulary_limit_counts_the_specials_and_keeps_the_most_frequent() -> None:
    tokenizer = train_tokenizer(WordTokenizerConfig(vocab_size=3), lines_of(TEXT))
    assert [tokenizer.token_text(i) for i in range(tokenizer.vocab_size)] == ["<unk>", "<eos>", "the"]


def test_word_ends_each_line_with_eos_and_an_unfinished_line_without() -> None:
    tokenizer = train_tokenizer(WordTokenizerConfig(), lines_of("a b\n"))
    assert tokenizer.encode("a b\n\na x").tolist() == [2, 3, 1, 1, 2, 0]
    assert tokenizer.encode("").tolist() == []
    assert tokenizer.ends_lines
    assert tokenizer.encode_document_end() == []


def test_word_maps_unk_in_the_text_to_its_type_and_eos_in_the_text_to_unknown() -> None:
    tokenizer = train_tokenizer(WordTokenizerConfig(), lines_of("a <unk> <eos> b\n"))
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("<unk> <eos>").tolist() == [0, 0]


def test_word_decoding_gives_the_canonical_text() -> None:
    tokenizer = train_tokenizer(WordTokenizerConfig(), lines_of(TEXT))
    canonical = "".join(" ".join(line.split()) + "\n" for line in TEXT.splitlines())
    assert tokenizer.decode(tokenizer.encode(TEXT)) == canonical


def test_unknown_characters_become_unk() -> None:
    tokenizer = train_tokenizer(CharTokenizerConfig(), lines_of("ab\n"))
    assert tokenizer.encode("a我b").tolist() == [3, tokenizer.unk_id, 4]
    assert tokenizer.decode([3, 0, 4]) == "a\ufffdb"


def test_bytes_are_their_own_ids() -> None:
    tokenizer = train_tokenizer(ByteTokenizerConfig(), lines_of(""))
    assert tokenizer.encode("é\n").tolist() == [0xC3, 0xA9, 0x0A]
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.unk_id) == (256, 257, None)


@pytest.mark.parametrize("config", SENTENCEPIECE, ids=["unigram", "bpe"])
@pytest.mark.parametrize("text", [*SPECIAL_LOOKING, *ODD])
def test_sentencepiece_keeps_every_text_and_makes_no_control_token_of_it(
    config: SentencePieceTokenizerConfig, text: str
) -> None:
    tokenizer = train_tokenizer(config, lines_of(TEXT))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.eos_id, tokenizer.unk_id} & set(ids.tolist())
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text


@pytest.mark.parametrize("config", SENTENCEPIECE, ids=["unigram", "bpe"])
@pytest.mark.parametrize("text", ["a", " ", "我喜欢学习", "x" * 10000, "".join(map(chr, range(0x4E00, 0x5200)))])
def test_sentencepiece_trains_on_texts_that_do_not_fill_or_do_overfill_the_vocabulary(
    config: SentencePieceTokenizerConfig, text: str
) -> None:
    tokenizer = train_tokenizer(config, lines_of(text))
    assert tokenizer.vocab_size <= config.vocab_size
    assert tokenizer.decode(tokenizer.encode(text + " b")) == text + " b"


def test_sentencepiece_encodes_a_line_the_same_wherever_it_stands() -> None:
    tokenizer = train_tokenizer(SENTENCEPIECE[0], lines_of(TEXT))
    lines = TEXT.splitlines(keepends=True)
    apart = np.concatenate([tokenizer.encode(line) for line in lines])
    assert apart.tolist() == tokenizer.encode(TEXT).tolist()


def test_sentencepiece_draws_lines_evenly_and_keeps_to_its_limits() -> None:
    text = "".join(f"{i}\n\n" for i in range(1000))
    assert list(_draw(lines_of(text), 4, 10**9)) == ["249", "499", "749", "999"]
    assert list(_draw(lambda: iter([text]), 4, 10**9)) == ["249", "499", "749", "999"]
    assert len(list(_draw(lines_of(text), 10**9, 10**9))) == 1000
    assert sum(map(len, _draw(lines_of(text), 10**9, 500))) <= 500
    assert list(_draw(lines_of("x" * 1000), 10, 500)) == ["x" * 500]
    few = SentencePieceTokenizerConfig(vocab_size=300, max_sentences=10)
    assert train_tokenizer(few, lines_of(text)).decode([259, 260])


@pytest.mark.parametrize("config", TRAINED, ids=["word", "char", "byte", "unigram", "bpe"])
def test_the_same_text_trains_the_same_tokenizer(config: TokenizerConfig) -> None:
    first = train_tokenizer(config, lines_of(TEXT))
    assert first.digest == train_tokenizer(config, lambda: iter([TEXT])).digest


@pytest.mark.parametrize("config", [WordTokenizerConfig(), CharTokenizerConfig(), *SENTENCEPIECE])
def test_training_on_nothing_is_an_error(config: TokenizerConfig) -> None:
    with pytest.raises(DataError, match="train split has no"):
        train_tokenizer(config, lines_of(""))


def test_lone_surrogates_are_refused_in_training_and_in_lossless_encoding(tokenizer: Tokenizer) -> None:
    if tokenizer.unk_id is None or tokenizer.kind == "sentencepiece":
        with pytest.raises(DataError, match="surrogate at character 1"):
            tokenizer.encode("a\ud800")
    else:
        assert tokenizer.encode("\ud800").tolist() == [tokenizer.unk_id]
    with pytest.raises(DataError, match="surrogate"):
        train_tokenizer(WordTokenizerConfig(), lines_of("a \ud800\n"))


def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer) -> None:
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(DataError, match="not in the vocabulary"):
            tokenizer.decode([bad])
        with pytest.raises(DataError, match="not in the vocabulary"):
            tokenizer.decoder().push(bad)
        with pytest.raises(DataError, match="not in the vocabulary"):
            tokenizer.token_text(bad)


def test_every_token_has_a_text_and_documents_end_with_eos(tokenizer: Tokenizer) -> None:
    assert all(tokenizer.token_text(i) for i in range(tokenizer.vocab_size))
    if not tokenizer.ends_lines:
        assert tokenizer.encode_document_end() == [tokenizer.eos_id]
        assert tokenizer.token_text(tokenizer.eos_id) == "<eod>"
        assert tokenizer.decode([tokenizer.eos_id]) == ""


def test_a_stream_holds_incomplete_utf8_back() -> None:
    tokenizer = train_tokenizer(ByteTokenizerConfig(), lines_of(""))
    decoder = tokenizer.decoder()
    assert [decoder.push(byte) for byte in "é我".encode()] == ["", "é", "", "", "我"]
    assert (decoder.push(0xE6), decoder.flush(), decoder.flush()) == ("", "\ufffd", "")
    assert decoder.push(0x61) == "a"


@pytest.mark.parametrize("eos", ["<|endoftext|>", "</s>", None])
def test_hf_byte_level_round_trips_and_keeps_special_looking_text_plain(tmp_path: Path, eos: str | None) -> None:
    tokenizer = read_hf(tmp_path, byte_level_json(eos))
    assert tokenizer.token_text(tokenizer.eos_id) == (eos or "<eod>")
    assert tokenizer.eos_id == (0 if eos else tokenizer.vocab_size - 1)
    for text in [*SPECIAL_LOOKING, *ODD, TEXT]:
        ids = tokenizer.encode(text)
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode([*ids, tokenizer.eos_id]) == text


def test_hf_llama_style_streams_what_it_decodes(tmp_path: Path) -> None:
    tokenizer = read_hf(tmp_path, llama_style_json())
    for text in ["to be  <s> 我 é", " to", "a", ""]:
        ids = tokenizer.encode(text).tolist()
        assert tokenizer.decode(ids) == text
        decoder = tokenizer.decoder()
        assert "".join(decoder.push(id) for id in ids) == text
    assert tokenizer.token_text(tokenizer.eos_id) == "</s>"
    assert tokenizer.token_text(tokenizer.unk_id or 0) == "<unk>"


def test_hf_with_any_other_decoder_gives_its_text_at_the_end(tmp_path: Path) -> None:
    tokenizer = read_hf(tmp_path, word_piece_json())
    ids = [*tokenizer.encode("the cats the").tolist(), tokenizer.eos_id]
    decoder = tokenizer.decoder()
    assert [decoder.push(id) for id in ids] == [""] * len(ids)
    assert decoder.flush() == tokenizer.decode(ids) == "the cats the"
    assert decoder.flush() == ""


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}', "\ud800"])
def test_hf_names_an_unusable_file(tmp_path: Path, damage: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(damage.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=r"tokenizer\.json .*; set tokenizer\.path to another file$"):
        train_tokenizer(HfTokenizerConfig(path=str(tmp_path / "tokenizer.json")), lines_of(""))


def test_hf_says_that_no_process_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: object, **options: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setenv("LMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ResourceError, match=r"no process can be started to try the tokenizer: .*; end other"):
        read_hf(tmp_path, word_piece_json())


def test_hf_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json is missing"):
        train_tokenizer(HfTokenizerConfig(path=str(tmp_path / "nowhere.json")), lines_of(""))


def test_hf_names_a_file_that_may_not_be_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read \(Permission denied\)"):
        read_hf(tmp_path, word_piece_json())


def test_hf_refuses_ids_that_no_model_could_hold(tmp_path: Path) -> None:
    spec = json.loads(word_piece_json())
    spec["model"]["vocab"]["far"] = 2**31
    with pytest.raises(DataError, match="largest token id"):
        read_hf(tmp_path, json.dumps(spec))


def test_the_child_that_tries_a_file_finds_lmkit_where_this_process_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    def run(command: list[str], **options: Any) -> Any:
        found.append(options["env"]["PYTHONPATH"])
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setenv("LMKIT_CACHE", str(tmp_path))  # where it was not found good
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(probe.subprocess, "run", run)
    read_hf(tmp_path, byte_level_json(None))
    assert found == [str(Path(probe.__file__).parents[2])]


def test_loading_gives_back_what_was_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.kind, loaded.vocab_size, loaded.eos_id, loaded.unk_id, loaded.digest) == (
        tokenizer.kind,
        tokenizer.vocab_size,
        tokenizer.eos_id,
        tokenizer.unk_id,
        tokenizer.digest,
    )
    assert loaded.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


def test_loading_hf_needs_the_original_file_no_more(tmp_path: Path) -> None:
    tokenizer = read_hf(tmp_path, byte_level_json(None))
    (tmp_path / "run").mkdir()
    tokenizer.save(tmp_path / "run")
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path / "run").digest == tokenizer.digest


def test_each_flipped_byte_of_a_saved_tokenizer_is_noticed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        good = path.read_bytes()
        for i in range(0, len(good), max(1, len(good) // 50)):
            path.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
            if path.name != "tokenizer.json" or not good[i : i + 1].isspace():  # white space of the JSON is free
                with pytest.raises(DataError, match=r"tokenizer\.json|sentencepiece\.model"):
                    load_tokenizer(tmp_path)
        for cut in (0, 1, len(good) // 2, len(good) - 2):
            path.write_bytes(good[:cut])
            with pytest.raises(DataError, match=path.name):
                load_tokenizer(tmp_path)
        path.unlink()
        with pytest.raises(DataError, match=rf"{path.name} is .*missing"):
            load_tokenizer(tmp_path)
        path.write_bytes(good)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 2},
        {"kind": "pickle"},
        {"kind": ["word"]},
        {"kind": "byte"},
        {"kind": "sentencepiece"},
        {"data": None},
        {"data": ["a"]},
        {"data": "a\n\nb"},
        {"data": "\ud800"},
        {"digest": 1},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_changed_header_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    train_tokenizer(WordTokenizerConfig(), lines_of(TEXT)).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json|sentencepiece\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("words", [["a", "a"], ["<eos>"], ["<unk>"], [""], ["a b"], ["a\n"]])
def test_a_vocabulary_that_could_not_come_from_text_is_refused(words: list[str]) -> None:
    with pytest.raises(DataError, match="vocabulary"):
        WordTokenizer(words)


def test_a_foreign_or_broken_sentencepiece_model_is_refused() -> None:
    for model in (b"", b"\0", b"not a model", bytes(range(256))):
        with pytest.raises(DataError, match="sentencepiece"):
            SentencePieceTokenizer(model)


def test_a_deeply_nested_or_huge_header_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(tmp_path)
    monkeypatch.setattr("lmkit.tokenizers.MAX_FILE_BYTES", 99_999)
    with pytest.raises(DataError, match="too large"):
        load_tokenizer(tmp_path)


@pytest.mark.corpora
@pytest.mark.parametrize(("file", "types"), [("ptb/ptb.train.txt", 10_000), ("wikitext-2/wiki.train.tokens", 33_278)])
def test_the_benchmark_vocabularies_have_their_published_sizes(file: str, types: int) -> None:
    path = Path(os.environ.get("LMKIT_DATA", "")) / file
    if not path.is_file():
        pytest.skip("LMKIT_DATA has no such corpus")
    text = path.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(WordTokenizerConfig(), lambda: iter([text]))
    assert tokenizer.vocab_size == types
    assert len(tokenizer.encode(text)) == len(text.split()) + text.count("\n")
