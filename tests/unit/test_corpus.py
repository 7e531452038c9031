"""Corpora: what is read from where, exactly; and what is refused, with which words."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import hashlib
import itertools
import json
import os
import random
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from datasets import load_dataset

from lmkit.config.data import (
    BenchmarkConfig,
    BenchmarkName,
    CleaningConfig,
    HubConfig,
    JsonlConfig,
    PydocsConfig,
    TextConfig,
)
from lmkit.data import cleaning, corpus, textfiles
from lmkit.data.benchmarks import BENCHMARKS, Expected, canonical_lines
from lmkit.data.corpus import open_corpus
from lmkit.data.documents import Corpus
from lmkit.data.survey import Counts, Survey, Surveyor
from lmkit.errors import ConfigError, DataError, LmkitError

NOISE = random.Random(0).randbytes(5000).hex().encode()
"""Data that does not compress; the same in every process, since test names must be."""
SKIPPED = b"\x50\x2a\x4d\x18\x04\0\0\0size"
"""A frame of zstd that is to be skipped, as pzstd writes one before each of its own."""
WIDE = bytes.fromhex("28b52ffd0090290000") + b"text\n"
"""zstd data that asks for a window of 256 MB."""


def text_of(source: Corpus, split: str = "train") -> str:
    return "".join(piece.text for piece in source.pieces(split))


def documents_of(source: Corpus, split: str = "train") -> list[str]:
    found, parts = [], []
    for piece in source.pieces(split):
        parts.append(piece.text)
        if piece.ends_document:
            found.append("".join(parts))
            parts = []
    assert parts == []
    return found


def survey(source: Corpus) -> Survey:
    return Surveyor(source, lambda num_bytes: None).run(lambda lines: None)


def counts(source: Corpus) -> dict[str, Counts]:
    return survey(source).counts


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LMKIT_DATA", raising=False)


# --- the embedded text


def test_pydocs_names_its_python_and_is_split_about_80_10_10_by_characters() -> None:
    source = open_corpus(PydocsConfig())
    found = counts(source)
    total = sum(split.num_chars for split in found.values())
    assert f"CPython {'.'.join(map(str, sys.version_info[:3]))}" in source.source
    assert 0.7 < found["train"].num_chars / total < 0.9
    assert 0.05 < found["valid"].num_chars / total < 0.15
    assert 0.05 < found["test"].num_chars / total < 0.15


def test_no_paragraph_of_pydocs_test_is_most_of_a_train_topic() -> None:
    source = open_corpus(PydocsConfig())
    seen = set(text_of(source, "train").split("\n\n"))
    for split in ("valid", "test"):
        paragraphs = text_of(source, split).split("\n\n")
        repeated = sum(len(paragraph) for paragraph in paragraphs if paragraph in seen)
        assert repeated < 0.1 * sum(map(len, paragraphs))


def test_a_path_has_no_use_with_pydocs() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.path"):
        open_corpus(PydocsConfig(path="somewhere"))


# --- the benchmark sets

LINES = {
    "train": [" = Title = ", " ", " The  <unk> said \u2028 so . ", " ", " N years "],
    "valid": [" ", " one line "],
    "test": [" last ", " "],
}


def expect(monkeypatch: pytest.MonkeyPatch, name: BenchmarkName, texts: dict[str, str]) -> None:
    """Make ``texts`` the known canonical text of a benchmark."""
    expected = {
        split: Expected(
            text.count("\n"), len(text.split()), len(text.encode()), hashlib.sha256(text.encode()).hexdigest()
        )
        for split, text in texts.items()
    }
    patched = {**BENCHMARKS, name: dataclasses.replace(BENCHMARKS[name], expected=expected)}
    monkeypatch.setattr(corpus, "BENCHMARKS", patched)


def canonical() -> dict[str, str]:
    return {split: "".join(" ".join(line.split()) + "\n" for line in lines) for split, lines in LINES.items()}


def write_benchmark(folder: Path, pattern: str, end: str = "\n", start: str = "") -> Path:
    for split, lines in LINES.items():
        write(folder / pattern.format(split=split), start + "".join(line + end for line in lines))
    return folder


@pytest.mark.parametrize(("end", "start"), [("\n", ""), ("\r\n", ""), ("\n", "\ufeff"), ("\r\n", "\ufeff")])
def test_local_files_give_the_canonical_text_whatever_their_line_ends_and_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, start: str
) -> None:
    expect(monkeypatch, BenchmarkName.wikitext2, canonical())
    write_benchmark(tmp_path, "wiki.{split}.tokens", end, start)
    source = open_corpus(BenchmarkConfig(name=BenchmarkName.wikitext2, path=str(tmp_path)))
    survey(source)
    assert {split: text_of(source, split) for split in source.splits} == canonical()
    assert source.word_level


def test_a_missing_newline_at_the_end_of_a_benchmark_file_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect(monkeypatch, BenchmarkName.ptb, canonical())
    write_benchmark(tmp_path, "ptb.{split}.txt")
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    source = open_corpus(BenchmarkConfig(path=str(tmp_path)))
    survey(source)
    assert {split: text_of(source, split) for split in source.splits} == canonical()


def test_raw_sets_are_kept_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {split: "".join(line + "\n" for line in lines) for split, lines in LINES.items()}
    expect(monkeypatch, BenchmarkName.wikitext2_raw, texts)
    write_benchmark(tmp_path / "wikitext-2-raw", "wiki.{split}.raw")
    monkeypatch.setenv("LMKIT_DATA", str(tmp_path))
    source = open_corpus(BenchmarkConfig(name=BenchmarkName.wikitext2_raw))
    survey(source)
    assert text_of(source) == texts["train"]
    assert not source.word_level


def test_lmkit_data_is_used_when_the_folder_is_there_and_the_hub_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_benchmark(tmp_path / "ptb", "ptb.{split}.txt")
    monkeypatch.setenv("LMKIT_DATA", str(tmp_path))
    assert str(tmp_path / "ptb") in open_corpus(BenchmarkConfig()).source
    assert "hub" in open_corpus(BenchmarkConfig(name=BenchmarkName.wikitext2)).source


def test_a_folder_in_lmkit_data_that_lacks_the_files_is_named_with_a_remedy_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMKIT_DATA", str(tmp_path))
    files = write_benchmark(tmp_path / "ptb" / "simple-examples", "ptb.{split}.txt")
    with pytest.raises(DataError, match=r"ptb does not hold ptb\.train\.txt, .*; set dataset\.path to the folder"):
        open_corpus(BenchmarkConfig())
    assert str(files) in open_corpus(BenchmarkConfig(path=str(files))).source


def test_the_archive_s_folder_below_the_path_is_found(tmp_path: Path) -> None:
    write_benchmark(tmp_path / "ptb", "ptb.{split}.txt")
    assert str(tmp_path / "ptb") in open_corpus(BenchmarkConfig(path=str(tmp_path))).source


def test_a_changed_word_is_refused_with_what_was_expected_and_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect(monkeypatch, BenchmarkName.ptb, canonical())
    write_benchmark(tmp_path, "ptb.{split}.txt")
    write(tmp_path / "ptb.test.txt", " lost words \n \n")
    with pytest.raises(DataError) as caught:
        survey(open_corpus(BenchmarkConfig(path=str(tmp_path))))
    message = str(caught.value)
    assert "test split of ptb" in message
    assert "words 1 expected, 2 found" in message
    assert "sha256" in message
    assert "dataset.path" in message
    assert "lines" not in message.split(";")[0]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_benchmark(tmp_path, "ptb.{split}.txt")
    (tmp_path / "ptb.valid.txt").unlink()
    with pytest.raises(DataError, match=r"lacks ptb\.valid\.txt"):
        open_corpus(BenchmarkConfig(path=str(tmp_path)))
    with pytest.raises(DataError, match=r"does not hold ptb\.train\.txt, .*; set dataset\.path"):
        open_corpus(BenchmarkConfig(path=str(tmp_path / "nothing")))


def test_cleaning_a_benchmark_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fixed"):
        open_corpus(BenchmarkConfig(cleaning=CleaningConfig(normalize_nfc=True)))


@pytest.mark.parametrize(
    "text", ["", "\n", " a  b \n", "a\tb\n\n c", "x\u2028y\u00a0z\n", "\x1ca\x85b\r\n", "   \n   \n", "a b\n c d \n"]
)
def test_canonical_lines_are_the_words_of_each_line_joined_by_blanks(text: str) -> None:
    lines = text.split("\n")
    assert canonical_lines(text).removesuffix(" ") == "\n".join(" ".join(line.split()) for line in lines)


# --- the hub: everything after the network call is the real code


@dataclasses.dataclass
class FakeHub:
    """Serves rows by hub split through ``datasets`` from local parquet files, and notes the calls."""

    folder: Path
    column: str = "text"
    rows: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    calls: list[tuple[str, str | None, str | None, str]] = dataclasses.field(default_factory=list)

    def load_dataset(self, repo: str, config_name: str | None, *, revision: str | None, split: str):
        self.calls.append((repo, config_name, revision, split))
        files = {name: str(self.folder / f"{name}.parquet") for name in self.rows}
        for name, rows in self.rows.items():
            pyarrow.parquet.write_table(pyarrow.table({self.column: rows}), files[name])
        return load_dataset("parquet", data_files=files, split=split, cache_dir=str(self.folder / "cache"))


class Reachable:
    def dataset_info(self, repo: str, revision: str | None, timeout: float) -> None:
        assert timeout <= 10


class Unreachable:
    def dataset_info(self, repo: str, revision: str | None, timeout: float) -> None:
        raise ConnectionError("Name or service not known")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    monkeypatch.setattr(huggingface_hub, "HfApi", Reachable)
    return fake


def test_wikitext_rows_of_the_hub_give_the_text_of_the_original_files(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, name in (("train", "train"), ("valid", "validation"), ("test", "test")):
        hub.rows[name] = [line + "\n" if line.strip() else "" for line in LINES[split]]
    expect(monkeypatch, BenchmarkName.wikitext2, canonical())
    source = open_corpus(BenchmarkConfig(name=BenchmarkName.wikitext2))
    survey(source)
    assert text_of(source) == canonical()["train"]
    assert set(hub.calls) == {
        ("Salesforce/wikitext", "wikitext-2-v1", "b08601e04326c79dfdd32d625aee71d232d685c3", split)
        for split in ("train", "validation", "test")
    }
    raw = {split: "".join(line + "\n" for line in lines) for split, lines in LINES.items()}
    expect(monkeypatch, BenchmarkName.wikitext2_raw, raw)
    source = open_corpus(BenchmarkConfig(name=BenchmarkName.wikitext2_raw))
    survey(source)
    assert text_of(source) == raw["train"]


def test_ptb_rows_of_the_hub_have_no_line_ends(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"train": "aer <unk> N\nmr. vinken\n", "valid": "a\n", "test": "b c\n"}
    hub.column = "sentence"
    hub.rows = {"train": ["aer <unk> N", "mr. vinken"], "validation": ["a"], "test": ["b c"]}
    expect(monkeypatch, BenchmarkName.ptb, texts)
    source = open_corpus(BenchmarkConfig())
    survey(source)
    assert {split: text_of(source, split) for split in source.splits} == texts
    assert hub.calls[0][2] == "refs/convert/parquet"


def test_a_dead_hub_is_a_data_error_that_names_the_ways_around_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def offline_load(*args: object, **kwargs: object) -> None:
        assert datasets.config.HF_HUB_OFFLINE, "the library must not try the network again"
        raise ConnectionError("couldn't reach it")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Unreachable)
    monkeypatch.setattr(datasets, "load_dataset", offline_load)
    with pytest.raises(DataError) as caught:
        survey(open_corpus(BenchmarkConfig()))
    for word in ("Name or service not known", "dataset.path=DIR", "LMKIT_DATA", "ptb.*.txt"):
        assert word in str(caught.value)
    assert caught.value.exit_code == 3
    assert not datasets.config.HF_HUB_OFFLINE


def test_any_dataset_of_the_hub_is_one_document_a_row(hub: FakeHub) -> None:
    hub.column = "story"
    hub.rows = {"train": [f"story {i}\nend" for i in range(300)] + [""], "validation": ["v"]}
    source = open_corpus(HubConfig(name="a/b", column="story", valid_split="validation", test_fraction=0.1))
    found = counts(source)
    assert documents_of(source, "valid") == ["v\n"]
    assert found["train"].num_documents + found["test"].num_documents == 300
    assert 10 < found["test"].num_documents < 60
    assert survey(source).cleaning["train"]["empty documents"]["documents_before"] > found["train"].num_documents


def test_a_wrong_column_of_the_hub_is_answered_with_the_columns(hub: FakeHub) -> None:
    hub.column = "story"
    hub.rows = {"train": ["a"]}
    with pytest.raises(DataError, match=r"no column 'text' but story; set dataset\.column"):
        text_of(open_corpus(HubConfig(name="a/b")))


def test_a_row_of_the_hub_without_text_is_named_with_what_to_do(hub: FakeHub) -> None:
    hub.rows = {"train": ["a", None]}  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"row 1: column 'text' holds NoneType, not text; set dataset\.column=NAME"):
        text_of(open_corpus(HubConfig(name="a/b")))


# --- own text


def test_the_splits_of_a_folder_are_used(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write(tmp_path / f"{split}.txt", f"{split}\n")
    source = open_corpus(TextConfig(path=str(tmp_path)))
    assert {split: text_of(source, split) for split in source.splits} == {
        "train": "train\n",
        "valid": "valid\n",
        "test": "test\n",
    }


def test_split_folders_are_read_sorted_and_recursively_through_compression(tmp_path: Path) -> None:
    write(tmp_path / "train/b.txt", "b\n")
    write(tmp_path / "train/a/z.txt", "z\n")
    (tmp_path / "train/c.txt.gz").write_bytes(gzip.compress(b"c1\n", mtime=0) + gzip.compress(b"c2\n"))
    (tmp_path / "train/d.txt.zst").write_bytes(zstandard.compress(b"d1\n") + zstandard.compress(b"d2\n"))
    write(tmp_path / "train/.hidden.txt", "no\n")
    write(tmp_path / "train/.hidden/a.txt", "no\n")
    write(tmp_path / "train/notes.md", "no\n")
    write(tmp_path / "validation.txt", "v\n")
    source = open_corpus(TextConfig(path=str(tmp_path), test_fraction=0.0))
    assert documents_of(source) == ["z\n", "b\n", "c1\nc2\n", "d1\nd2\n"]
    assert source.splits == ("train", "valid")


def test_a_single_file_is_cut_into_contiguous_parts(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    source = open_corpus(TextConfig(path=str(write(tmp_path / "a.txt", text)), valid_fraction=0.1, test_fraction=0.05))
    parts = [text_of(source, split) for split in ("train", "valid", "test")]
    assert "".join(parts) == text
    assert [round(len(part) / len(text), 2) for part in parts] == [0.85, 0.1, 0.05]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress, None])
def test_each_part_of_a_small_file_has_a_line(tmp_path: Path, compress) -> None:
    ending = {gzip.compress: ".txt.gz", zstandard.compress: ".txt.zst", None: ".txt"}[compress]
    path = tmp_path / f"a{ending}"
    text = b"one\ntwo\nthree\n"
    path.write_bytes(compress(text) if compress else text)
    source = open_corpus(TextConfig(path=str(path)))
    assert [text_of(source, split) for split in ("train", "valid", "test")] == ["one\n", "two\n", "three\n"]


@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
def test_a_text_without_line_ends_is_cut_at_blanks(tmp_path: Path, ending: str) -> None:
    text = " ".join(f"word{i}" for i in range(2000))
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if ending == ".txt.gz" else text.encode())
    source = open_corpus(TextConfig(path=str(path)))
    parts = [text_of(source, split) for split in ("train", "valid", "test")]
    assert "".join(part.removesuffix("\n") for part in parts) == text
    assert len(parts[1]) > 500 < len(parts[2])


@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
@pytest.mark.parametrize(
    ("text", "blanks"),
    [
        ("我喜欢学习" * 400, False),
        ("title\nauthor\n\n" + "我喜欢学习。" * 400, False),
        ("title\nauthor\n\n" + "word " * 2000, True),
        ("a b c\n" + "31415926535" * 1000, False),
    ],
    ids=range(4),
)
def test_a_text_whose_lines_and_words_are_too_long_gives_each_part_its_share(
    tmp_path: Path, ending: str, text: str, blanks: bool
) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if ending == ".txt.gz" else text.encode())
    source = open_corpus(TextConfig(path=str(path), valid_fraction=0.1, test_fraction=0.2))
    parts = [text_of(source, split) for split in ("train", "valid", "test")]
    assert "".join(part.removesuffix("\n") for part in parts) == text
    assert [round(len(part) / len(text), 1) for part in parts] == [0.7, 0.1, 0.2]
    assert all(part.endswith(" \n") for part in parts) == blanks


def test_twenty_files_or_more_are_split_whole_and_every_file_is_used(tmp_path: Path) -> None:
    for i in range(30):
        write(tmp_path / f"{i}.txt", f"file {i}\n")
    source = open_corpus(TextConfig(path=str(tmp_path), valid_fraction=0.1))
    found = {split: documents_of(source, split) for split in source.splits}
    assert {split: len(documents) for split, documents in found.items()} == {"train": 25, "valid": 3, "test": 2}
    used = [document for documents in found.values() for document in documents]
    assert sorted(used) == sorted(f"file {i}\n" for i in range(30))


def test_a_split_by_hash_depends_on_the_names_only(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        for i in range(30):
            write(tmp_path / folder / f"{i}.txt", f"{folder} {i}\n")
    first, second = (open_corpus(TextConfig(path=str(tmp_path / folder))) for folder in ("a", "b"))
    assert text_of(first, "test").replace("a", "b") == text_of(second, "test")


def test_lines_end_at_newlines_only_and_crlf_is_one(tmp_path: Path) -> None:
    text = "a\u2028b\x85c\x0cd\re\r\nf\n"
    path = write(tmp_path / "a.txt", "\ufeff" + text)
    source = open_corpus(TextConfig(path=str(path), valid_fraction=0.0, test_fraction=0.0))
    assert text_of(source) == text.replace("\r\n", "\n")
    assert counts(source)["train"].num_lines == 2


def test_a_missing_final_newline_is_added_so_that_documents_do_not_run_together(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "b.txt", "two")
    source = open_corpus(TextConfig(path=str(tmp_path), valid_fraction=0.0, test_fraction=0.0))
    assert documents_of(source) == ["one\n", "two\n"]


def test_text_is_the_same_however_the_file_is_blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\ufeffkurz\r\n" + "sehr lange Zeile ä我 " * 30 + "\r\nOhneLeerzeichenä我" * 5 + "\n\n"
    path = write(tmp_path / "a.txt", text)
    source = open_corpus(TextConfig(path=str(path), valid_fraction=0.0, test_fraction=0.0))
    whole = counts(source)
    for block in (1, 2, 3, 7, 64):
        monkeypatch.setattr(textfiles, "BLOCK_BYTES", block)
        monkeypatch.setattr(textfiles, "MAX_LINE_BYTES", 16)
        assert text_of(source) == text.removeprefix("\ufeff").replace("\r\n", "\n")
        assert counts(source) == whole


@pytest.mark.parametrize("start", [0, 35])
def test_a_compressed_text_comes_in_the_blocks_of_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int
) -> None:
    monkeypatch.setattr(textfiles, "BLOCK_BYTES", 64)
    lines = [f"line {i}\n".encode() for i in range(100)]
    (tmp_path / "a.txt").write_bytes(b"".join(lines))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"".join(lines), mtime=0))
    (tmp_path / "a.txt.zst").write_bytes(b"".join(map(zstandard.compress, lines)))
    paths = [tmp_path / name for name in ("a.txt", "a.txt.gz", "a.txt.zst")]
    plain, *compressed = [list(textfiles.text_blocks(textfiles.Part(path, start))) for path in paths]
    assert len(plain) > 10
    assert compressed == [plain, plain]


def test_frames_to_skip_are_part_of_zstd(tmp_path: Path) -> None:
    frames = [SKIPPED + zstandard.compress(line) for line in (b"one\n", b"two\n")]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    source = open_corpus(TextConfig(path=str(tmp_path / "a.txt.zst"), valid_fraction=0.0, test_fraction=0.0))
    assert text_of(source) == "one\ntwo\n"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"fine\nbad \xff byte\n", ["a.txt is not UTF-8", "0xff", "line 2", "byte offset 9"]),
        ("a.txt", b"cut \xe6\x88", ["not UTF-8", "line 1", "byte offset 4"]),
        ("a.txt.gz", gzip.compress(b"ok\nbad \xff\n", mtime=0), ["line 2", "byte offset (decompressed) 7"]),
        ("a.txt", gzip.compress(b"text\n", mtime=0), ["is gzip data", "rename it to a.txt.gz"]),
        ("a.txt", zstandard.compress(b"text\n"), ["is zstd data", "rename it to a.txt.zst"]),
        ("a.txt.gz", b"plain\n", ["is not gzip data"]),
        ("a.txt.zst", b"plain\n", ["is not zstd data"]),
        ("a.txt.gz", gzip.compress(NOISE, mtime=0)[:-700], ["damaged gzip"]),
        ("a.txt.zst", zstandard.compress(NOISE)[:-700], ["damaged zstd", "ends inside"]),
        ("a.txt.gz", b"", ["a.txt.gz is empty, not gzip data", "fetch the file again"]),
        ("a.txt.zst", b"", ["a.txt.zst is empty, not zstd data"]),
        ("a.txt.zst", WIDE, ["more than 128 MB", "zstd -dc --long=31 a.txt.zst | zstd"]),
        ("a.txt", SKIPPED + zstandard.compress(b"text\n"), ["is zstd data", "rename it to a.txt.zst"]),
        ("a.txt", "text".encode("utf-16"), ["is UTF-16 text"]),
        ("a.txt", b"PAR1....", ["is a parquet file"]),
        ("a.txt", b"PK\x03\x04...", ["is a zip archive"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_not_the_text_it_claims_to_be_is_refused_with_the_place(
    tmp_path: Path, name: str, data: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        survey(open_corpus(TextConfig(path=str(tmp_path / name), valid_fraction=0.0, test_fraction=0.0)))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "line\n" * 10)
    stream = textfiles.text_blocks(textfiles.Part(path))
    next(stream)
    with path.open("a") as file:
        file.write("more\n")
    with pytest.raises(DataError, match="changed while it was read"):
        list(stream)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "a\n")
    write(tmp_path / "deep/b.txt", "b\n")
    real = os.scandir

    def scandir(path: str | Path) -> Any:
        if Path(path).name == "deep":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"cannot read \S*deep: Permission denied"):
        open_corpus(TextConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("path", "remedy"), [("locked", "check path and permissions"), ("locked/train.txt", r"check dataset\.path")]
)
def test_what_may_not_be_looked_at_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, remedy: str
) -> None:
    write(tmp_path / "locked/train.txt", "a\n")
    real = os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        if isinstance(path, str | Path) and Path(path).parent.name == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(DataError, match=rf"^cannot read \S*locked/train\.txt: Permission denied; {remedy}$"):
        open_corpus(TextConfig(path=str(tmp_path / path)))


@pytest.mark.skipif(sys.platform == "win32", reason="links and names that Windows does not have")
def test_a_loop_of_links_and_names_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match=r"^cannot read \S*loop: .*; check dataset\.path$"):
        open_corpus(TextConfig(path=str(tmp_path / "loop")))
    for i in range(30):
        write(tmp_path / os.fsdecode(b"texts/caf\xe9") / f"{i}.txt", f"text {i}\n")
    found = counts(open_corpus(TextConfig(path=str(tmp_path / "texts"))))
    assert sum(split.num_documents for split in found.values()) == 30


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_folders_behind_links_are_read_once(tmp_path: Path) -> None:
    for name in ("elsewhere/a.txt", "elsewhere/deep/b.txt", "home/texts/c.txt", "home/secret.txt"):
        write(tmp_path / name, f"the text of {name}\n")
    texts = tmp_path / "home/texts"
    aims = {"more": "elsewhere", "too": "elsewhere", "again": "elsewhere/deep", "self": "home/texts", "above": "home"}
    for name, aim in aims.items():
        (texts / name).symlink_to(tmp_path / aim)
    (tmp_path / "elsewhere/deep/round").symlink_to(tmp_path / "elsewhere")
    found = [path.relative_to(texts).as_posix() for path in textfiles.find_files(texts, ".txt")]
    assert found == ["again/b.txt", "c.txt", "more/a.txt"]


@pytest.mark.parametrize(
    ("names", "both"),
    [
        (("train.txt", "valid/a.txt", "dev/a.txt"), "valid split: dev, valid"),
        (("train.txt", "valid.txt", "valid.txt.gz"), r"valid split: valid\.txt, valid\.txt\.gz"),
        (("train.txt", "train/a.txt"), r"train split: train\.txt, train"),
        (("train.txt", "TRAIN.TXT.GZ"), r"train split: TRAIN\.TXT\.GZ, train\.txt"),
    ],
    ids=range(4),
)
def test_two_splits_of_the_same_kind_are_both_named(tmp_path: Path, names: tuple[str, ...], both: str) -> None:
    for name in names:
        write(tmp_path / name, "a\n")
    with pytest.raises(DataError, match=rf"more than one {both}; rename or remove one of them"):
        open_corpus(TextConfig(path=str(tmp_path)))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize(
    ("files", "taken", "renamed"),
    [
        (["valid{}"], "valid{} (taken for the valid split)", "valid{}"),
        (
            ["dev{}", "test/a{}"],
            "dev{} (taken for the valid split) and test (taken for the test split)",
            "dev{} and test",
        ),
        (["a{}", "test{}.gz"], "test{}.gz (taken for the test split)", "test{}.gz"),
    ],
    ids=["valid", "both", "beside another text"],
)
def test_a_folder_of_splits_needs_train_and_is_told_both_ways_out(
    tmp_path: Path, files: list[str], taken: str, renamed: str, suffix: str
) -> None:
    for file in files:
        write(tmp_path / file.format(suffix), '{"text": "a"}\n')
    config = TextConfig(path=str(tmp_path)) if suffix == ".txt" else JsonlConfig(path=str(tmp_path))
    with pytest.raises(DataError) as caught:
        open_corpus(config)
    told = f"{tmp_path} holds {taken.format(suffix)}, but neither train{suffix} nor a folder train; put the text to"
    assert str(caught.value).startswith(told)
    assert f"into train{suffix} or a folder train, or, if {renamed.format(suffix)} is to be" in str(caught.value)
    write(tmp_path / f"train/b{suffix}", '{"text": "b"}\n')
    assert open_corpus(config).splits == ("train", "valid", "test")


@pytest.mark.parametrize("content", [{}, {"a.txt": ""}, {"a.txt": " \n\n\t\n"}, {"a.txt": "one line\n"}])
def test_an_empty_corpus_or_split_is_refused(tmp_path: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        write(tmp_path / name, text)
    with pytest.raises(DataError, match=r"would be empty \(train \d|holds no \.txt"):
        survey(open_corpus(TextConfig(path=str(tmp_path))))


def test_names_in_capitals_are_read_as_others_are(tmp_path: Path) -> None:
    write(tmp_path / "splits/TRAIN.TXT", "a\n")
    write(tmp_path / "splits/Valid/A.Txt", "b\n")
    (tmp_path / "splits/test.TXT.GZ").write_bytes(gzip.compress(b"c\n"))
    source = open_corpus(TextConfig(path=str(tmp_path / "splits")))
    assert [text_of(source, split) for split in ("train", "valid", "test")] == ["a\n", "b\n", "c\n"]
    for i in range(30):
        write(tmp_path / f"many/{i}{'.TXT' if i % 2 else '.txt'}", f"text {i}\n")
    assert (
        sum(split.num_documents for split in counts(open_corpus(TextConfig(path=str(tmp_path / "many")))).values())
        == 30
    )


def test_files_beside_those_of_the_splits_are_named_as_not_read(tmp_path: Path) -> None:
    for name in ("train.txt", "valid.txt", "more.txt", "notes.md", "other/a.txt"):
        write(tmp_path / name, "line\n")
    source = open_corpus(TextConfig(path=str(tmp_path)))
    assert source.source == f"{tmp_path} (2 files, test is 5% of train; not read: more.txt)"
    for name in "bcd":
        write(tmp_path / f"{name}.txt", "line\n")
    assert "not read: b.txt, c.txt, d.txt ...)" in open_corpus(TextConfig(path=str(tmp_path))).source


def test_the_share_that_is_held_out_is_told_as_it_was_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "line\n" * 10)
    source = open_corpus(TextConfig(path=str(path), valid_fraction=0.07, test_fraction=0.004))
    assert source.source == f"{path} (1 file, valid is 7% of train, test is 0.4% of train)"


def test_progress_is_told_in_bytes_of_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "我喜欢学习\n" * 10)
    told: list[int] = []
    Surveyor(open_corpus(TextConfig(path=str(path))), told.append).run(lambda lines: None)
    assert told[-1] == path.stat().st_size


def test_a_path_is_needed_and_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.path=PATH"):
        open_corpus(TextConfig())
    with pytest.raises(DataError, match="does not exist"):
        open_corpus(JsonlConfig(path=str(tmp_path / "no")))


# --- JSON lines


def test_jsonl_is_one_document_a_line_and_copies_stay_in_one_split(tmp_path: Path) -> None:
    rows = [{"body": f"text {i % 50}\r\nsecond"} for i in range(400)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    source = open_corpus(JsonlConfig(path=str(path), text_field="body", valid_fraction=0.2, test_fraction=0.2))
    found = {split: documents_of(source, split) for split in source.splits}
    assert sum(map(len, found.values())) == 400
    assert found["train"][0].endswith("\nsecond\n")
    assert set(found["train"]).isdisjoint(found["test"])
    assert set(found["valid"]).isdisjoint(found["test"])


def test_jsonl_splits_are_found_by_name(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", '{"text": "a\\u2028b"}\n')
    (tmp_path / "dev.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "v"}'))
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(b'{"text": "t"}\n', mtime=0))
    source = open_corpus(JsonlConfig(path=str(tmp_path)))
    assert {split: documents_of(source, split) for split in source.splits} == {
        "train": ["a\u2028b\n"],
        "valid": ["v\n"],
        "test": ["t\n"],
    }


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": 1', "is not JSON: Expecting ',' delimiter in column 11; repair"),
        ("<!DOCTYPE html>", "is not JSON"),
        ('{"body": "x"}', "has no field 'text'; its keys are 'body'"),
        ("[1]", "has no field 'text'; it is no object"),
        ('{"text": 5}', "no string but int"),
        ('{"text": null}', "no string but NoneType"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_bad_record_is_named_by_its_line(tmp_path: Path, line: str, words: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        survey(open_corpus(JsonlConfig(path=str(path), valid_fraction=0.0, test_fraction=0.0)))
    assert "a.jsonl, line 3" in str(caught.value)
    assert words in str(caught.value)


def test_a_long_record_comes_in_pieces_and_is_whole(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(400_000))
    path = write(tmp_path / "a.jsonl", json.dumps({"text": text}) + "\n")
    source = open_corpus(JsonlConfig(path=str(path), valid_fraction=0.0, test_fraction=0.0))
    pieces = list(source.pieces("train"))
    assert len(pieces) > 2
    assert all(piece.text.endswith("\n") for piece in pieces)
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]


# --- cleaning


def cleaned(tmp_path: Path, texts: list[str], cleaning: CleaningConfig) -> tuple[list[str], dict]:
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = open_corpus(JsonlConfig(path=str(path), valid_fraction=0.0, test_fraction=0.0, cleaning=cleaning))
    return documents_of(source), source.cleaning_report()["train"]


def test_cleaning_does_what_its_report_says(tmp_path: Path) -> None:
    texts = ["e\u0301 long\x00 enough", "\u00e9 long enough", "short", " \n ", "\x07\x08", "tab\tand\nnewline stay"]
    cleaning = CleaningConfig(normalize_nfc=True, strip_control=True, drop_duplicates=True, min_chars=8)
    documents, report = cleaned(tmp_path, texts, cleaning)
    assert documents == ["\u00e9 long enough\n", "tab\tand\nnewline stay\n"]
    assert [(step["documents_before"], step["documents_after"]) for step in report.values()] == [
        (6, 6),
        (6, 6),
        (6, 4),
        (4, 3),
        (3, 2),
    ]
    assert report["control characters"]["chars_before"] - report["control characters"]["chars_after"] == 3
    assert report["NFC"]["chars_before"] - report["NFC"]["chars_after"] == 1


@pytest.mark.parametrize("space", ["\r", "\x0b", "\x0c", "\x1c", "\x1f", "\x85"])
def test_no_words_run_together_where_control_characters_are_removed(tmp_path: Path, space: str) -> None:
    texts = [
        f"one{space}two{space}\n{space}three {space} fo\x00ur{space}\x00{space}five{space}",
        f"{space}one\r{space}\n",
    ]
    documents, report = cleaned(tmp_path, texts, CleaningConfig(strip_control=True))
    assert documents == ["one two\nthree  four five\n", "one\n"]
    assert [document.split() for document in documents] == [text.replace("\x00", "").split() for text in texts]
    assert report["control characters"]["chars_after"] == sum(map(len, documents))


@pytest.mark.parametrize("end", ["", "\n"])
def test_the_end_of_the_last_line_is_no_character_of_a_short_document(tmp_path: Path, end: str) -> None:
    documents, _ = cleaned(tmp_path, [f"1234567{end}", f"12345678{end}", f"123\n567{end}"], CleaningConfig(min_chars=8))
    assert documents == ["12345678\n"]


def test_without_options_only_empty_documents_are_dropped(tmp_path: Path) -> None:
    texts = ["a\x00", "a\x00", "", "e\u0301"]
    documents, report = cleaned(tmp_path, texts, CleaningConfig())
    assert documents == ["a\x00\n", "a\x00\n", "e\u0301\n"]
    assert list(report) == ["empty documents"]


@pytest.mark.parametrize("options", [{}, {"min_chars": 1 << 30}, {"drop_duplicates": True}])
def test_a_document_that_waits_to_be_kept_does_not_wait_in_memory(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(cleaning, "_WAITING_BYTES", 1 << 16)
    size, kept = 1 << 16, []
    tracemalloc.start()
    pieces = (cleaning.Piece(" " * size + "\n", False) for _ in range(200))
    document = itertools.chain(pieces, [cleaning.Piece("text", True)])
    for piece in cleaning.Cleaner(CleaningConfig(**options)).clean(document):
        kept.append((len(piece.text), piece.ends_document))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept == ([] if "min_chars" in options else [*[(size + 1, False)] * 200, (5, True)])
    assert peak < 2 << 20


def test_long_duplicates_are_found_and_the_first_one_is_whole(tmp_path: Path) -> None:
    long = "".join(f"line {i}\n" for i in range(300_000))
    documents, _ = cleaned(tmp_path, [long, long + "x", long], CleaningConfig(drop_duplicates=True))
    assert documents == [long, long + "x\n"]


def test_every_error_of_a_corpus_is_for_people() -> None:
    assert issubclass(DataError, LmkitError)
    assert DataError.exit_code == 3
