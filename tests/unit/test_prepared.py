"""Prepared data: what is stored, when it is found again, and what happens when something goes wrong."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from lmkit.commands import prepare as command
from lmkit.config.commands import PrepareConfig
from lmkit.config.data import (
    BenchmarkConfig,
    BenchmarkName,
    ByteTokenizerConfig,
    CharTokenizerConfig,
    CleaningConfig,
    HfTokenizerConfig,
    JsonlConfig,
    PydocsConfig,
    SentencePieceTokenizerConfig,
    TextConfig,
    TokenizerConfig,
    WordTokenizerConfig,
)
from lmkit.console import Console
from lmkit.data import prepared as prepared_data
from lmkit.data import survey, textfiles
from lmkit.data.corpus import open_corpus
from lmkit.data.prepared import PreparedData, cache_dir, open_prepared, prepare, text_digest_of
from lmkit.data.tokenfiles import SplitWriter
from lmkit.errors import DataError, ResourceError
from lmkit.store import storage
from lmkit.tokenizers import load_tokenizer, train_tokenizer

TEXT = {
    "train": "the cat sat\n\non the mat\n" * 20 + "我喜欢学习\n",
    "valid": "the dog sat\n",
    "test": "on the\u00a0cat\nno newline",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for split, text in TEXT.items():
        (tmp_path / "text" / f"{split}.txt").write_bytes(text.encode())
    return tmp_path / "text"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust the stamps of files that were written just now."""
    monkeypatch.setattr(textfiles, "_SETTLED_NS", 0)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read from now on, one entry a pass."""
    reads: list[str] = []
    real = textfiles.text_blocks

    def text_blocks(part: textfiles.Part) -> Iterator[str]:
        reads.append(part.path.name)
        return real(part)

    monkeypatch.setattr(textfiles, "text_blocks", text_blocks)
    return reads


def prepared(folder: Path, tokenizer: TokenizerConfig | None = None, **options: object) -> PreparedData:
    return prepare(TextConfig(path=str(folder)), tokenizer or WordTokenizerConfig(), **options)  # type: ignore[arg-type]


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in (cache / "prepared").iterdir() if path.name.startswith(".")]


def test_counts_do_not_depend_on_the_tokenizer_and_agree_with_the_text(folder: Path) -> None:
    for tokenizer in (WordTokenizerConfig(), CharTokenizerConfig(), ByteTokenizerConfig()):
        data = prepared(folder, tokenizer)
        for name, split in data.splits.items():
            text = TEXT[name] if TEXT[name].endswith("\n") else TEXT[name] + "\n"
            assert split.num_words == len(text.split()) + text.count("\n")
            assert split.num_lines == text.count("\n")
            assert (split.num_chars, split.num_bytes) == (len(text), len(text.encode()))
            assert split.num_documents == 1
            assert len(split.tokens) == split.num_tokens == split.document_ends[-1]


def test_words_are_counted_and_unknown_ones_are_too(folder: Path) -> None:
    data = prepared(folder)
    valid = data.splits["valid"]
    assert valid.num_tokens == valid.num_words == 4
    assert valid.num_unk == 1
    assert data.tokenizer.decode(valid.tokens) == "the <unk> sat\n"


@pytest.mark.parametrize(
    ("tokenizer", "dtype"),
    [
        (WordTokenizerConfig(), "u1"),
        (ByteTokenizerConfig(), "u2"),
        (SentencePieceTokenizerConfig(vocab_size=300), "u2"),
    ],
)
def test_tokens_decode_to_the_text_and_have_the_smallest_type(
    folder: Path, tokenizer: TokenizerConfig, dtype: str
) -> None:
    data = prepared(folder, tokenizer)
    train = data.splits["train"]
    assert data.tokenizer.decode(train.tokens) == TEXT["train"]
    assert train.tokens.dtype == np.dtype(dtype)
    with pytest.raises(ValueError, match="read-only"):
        train.tokens[0] = 0


def test_every_document_ends_with_the_end_of_document_token(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / "text" / f"{i}.txt").write_bytes(b"ab\n" * (i + 1))
    config = TextConfig(path=str(tmp_path / "text"), valid_fraction=0.0, test_fraction=0.0)
    train = prepare(config, ByteTokenizerConfig()).splits["train"]
    assert train.document_ends.tolist() == [4, 11, 21]
    assert [train.tokens[end - 1] for end in train.document_ends] == [256] * 3


def test_an_existing_tokenizer_is_used_as_it_is(folder: Path) -> None:
    tokenizer = train_tokenizer(WordTokenizerConfig(), lambda: iter(["cat dog\n"]))
    data = prepare(TextConfig(path=str(folder)), tokenizer)
    assert data.tokenizer.digest == tokenizer.digest
    assert data.key != prepared(folder).key


@pytest.mark.parametrize("config", [WordTokenizerConfig(), CharTokenizerConfig()], ids=["word", "char"])
def test_what_a_configuration_prepared_is_found_by_the_tokenizer_that_came_of_it(
    folder: Path, cache: Path, config: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(folder, config)
    tokenizer = load_tokenizer(first.path / "tokenizer")
    found = prepare(TextConfig(path=str(folder)), tokenizer)
    assert found.path == first.path
    assert [path.name for path in (cache / "prepared").iterdir()] == [first.key]
    monkeypatch.setenv("LMKIT_CACHE", str(cache / "another"))
    alone = prepare(TextConfig(path=str(folder)), tokenizer)
    assert alone.path != found.path
    assert alone.key == found.key != first.key, "the digest of a run's data is the same wherever they were found"
    assert all(np.array_equal(alone.splits[split].tokens, found.splits[split].tokens) for split in alone.splits)


def test_the_text_of_data_is_known_by_any_key_of_theirs_while_they_are_in_the_cache(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(folder)
    found = prepare(TextConfig(path=str(folder)), load_tokenizer(first.path / "tokenizer"))
    assert first.key != found.key
    for key in (first.key, found.key):
        assert text_digest_of(key, "valid") == first.splits["valid"].text_digest
        assert text_digest_of(key, "another") is None
    for key in ("", "0" * 64, "../../prepared", "a\0b", "a" * 5000):
        assert text_digest_of(key, "valid") is None
    monkeypatch.setenv("LMKIT_CACHE", str(cache / "another"))
    assert text_digest_of(first.key, "valid") is None


@pytest.mark.parametrize("damage", ["nowhere", "nothing", "no text", "another text", "another tokenizer"])
def test_a_note_that_leads_elsewhere_is_not_followed(folder: Path, cache: Path, damage: str) -> None:
    first = prepared(folder)
    (note,) = (cache / "same").iterdir()
    content = {"nowhere": b"../none", "nothing": b"", "no text": b"\xff\0"}.get(damage)
    if damage == "another tokenizer":
        content = prepared(folder, CharTokenizerConfig()).key.encode()
    elif damage == "another text":
        (folder / "test.txt").write_text("on the cat\n", encoding="utf-8")
        content = prepared(folder).key.encode()
        (folder / "test.txt").write_bytes(TEXT["test"].encode())
    note.write_bytes(content or b"")
    found = prepare(TextConfig(path=str(folder)), load_tokenizer(first.path / "tokenizer"))
    assert found.path == cache / "prepared" / found.key
    assert found.splits["test"].text_digest == first.splits["test"].text_digest
    assert found.tokenizer.digest == first.tokenizer.digest


def test_the_key_depends_on_text_tokenizer_and_cleaning_only(folder: Path, tmp_path: Path) -> None:
    key = prepared(folder).key
    (tmp_path / "copy").mkdir()
    for path in folder.iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    assert prepared(tmp_path / "copy").key == key
    others = {
        prepared(folder, WordTokenizerConfig(vocab_size=5)).key,
        prepared(folder, CharTokenizerConfig()).key,
        prepare(TextConfig(path=str(folder), cleaning=CleaningConfig(min_chars=1)), WordTokenizerConfig()).key,
    }
    (folder / "test.txt").write_text("on the cat\n", encoding="utf-8")
    others.add(prepared(folder).key)
    assert len(others | {key}) == 5


def test_what_cleaning_did_is_told_of_the_files_that_are_asked_for(tmp_path: Path, cache: Path) -> None:
    told, cleaning = [], CleaningConfig(drop_duplicates=True)
    for copies in (3, 1, 3):  # the text that is left is always the same
        path = tmp_path / f"{copies}.jsonl"
        path.write_text("".join(f'{{"text": "text {i}"}}\n' for i in range(5)) * copies, encoding="utf-8")
        config = JsonlConfig(path=str(path), valid_fraction=0.0, test_fraction=0.0, cleaning=cleaning)
        report = prepare(config, ByteTokenizerConfig()).report
        step = report["cleaning"]["train"]["duplicate documents"]
        told.append((step["documents_before"], step["documents_after"]))
        assert path.name in report["source"]
    assert told == [(15, 5), (5, 5), (15, 5)]
    assert len(list((cache / "prepared").iterdir())) == 1


def test_unchanged_files_are_not_read_again(folder: Path, settled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(folder)
    reads = count_reads(monkeypatch)
    again = prepared(folder)
    assert again.key == first.key
    assert reads == []


def test_what_another_version_cleaned_is_read_again(
    folder: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(folder)
    reads = count_reads(monkeypatch)
    monkeypatch.setattr(prepared_data, "CLEANING_VERSION", 0)
    assert prepared(folder).key == first.key
    assert sorted(reads) == ["test.txt", "train.txt", "valid.txt"]


def test_a_file_changed_without_a_change_of_size_or_date_is_noticed(
    folder: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "valid.txt"
    first, stat = prepared(folder), path.stat()
    path.write_bytes(path.read_bytes().replace(b"dog", b"cat"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = prepared(folder)
    assert second.key != first.key
    assert second.splits["valid"].num_unk == 0


def test_the_stamp_of_a_file_that_was_just_written_is_not_trusted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textfiles, "_SETTLED_NS", 3_600_000_000_000)
    prepared(folder)
    reads = count_reads(monkeypatch)
    prepared(folder)
    assert sorted(reads) == ["test.txt", "train.txt", "valid.txt"]


@pytest.mark.parametrize("tokenizer", [WordTokenizerConfig(), SentencePieceTokenizerConfig(vocab_size=300)])
def test_a_text_that_does_not_fit_in_memory_gives_the_same_data_in_two_passes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: TokenizerConfig
) -> None:
    cleaning = CleaningConfig(drop_duplicates=True)
    kept = prepare(TextConfig(path=str(folder), cleaning=cleaning), tokenizer)
    reads = count_reads(monkeypatch)
    monkeypatch.setattr(survey, "KEPT_CHARS", 10)
    long = prepare(TextConfig(path=str(folder), cleaning=cleaning), tokenizer, force=True)
    assert long.key == kept.key
    assert all(np.array_equal(long.splits[name].tokens, kept.splits[name].tokens) for name in TEXT)
    assert long.report == kept.report
    assert set(long.report["cleaning"]) == set(TEXT)
    assert reads.count("valid.txt") == reads.count("test.txt") == 2
    assert reads.count("train.txt") == (2 if isinstance(tokenizer, WordTokenizerConfig) else 3)


@pytest.mark.parametrize(("texts", "stays"), [(["a" * 5000], True), (["a"] * 5000, False)])
def test_what_a_short_document_takes_besides_its_text_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], stays: bool
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts), encoding="utf-8")
    corpus = open_corpus(JsonlConfig(path=str(path), valid_fraction=0.0, test_fraction=0.0))
    monkeypatch.setattr(survey, "KEPT_CHARS", 20_000)
    assert (survey.Surveyor(corpus, lambda num_bytes: None).run(lambda lines: None).pieces is not None) == stays


def test_a_text_that_changes_between_the_passes_is_refused(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "KEPT_CHARS", 10)
    real = survey.Surveyor.run

    def run(self: survey.Surveyor, on_long_text: object) -> survey.Survey:
        found = real(self, on_long_text)  # type: ignore[arg-type]
        (folder / "test.txt").write_text("other\n", encoding="utf-8")
        return found

    monkeypatch.setattr(survey.Surveyor, "run", run)
    with pytest.raises(DataError, match="changed while it was read"):
        prepared(folder)
    assert list((cache / "prepared").iterdir()) == []


def lower_case(unk: str | None, letters: str) -> tokenizers.Tokenizer:
    """Letters of which capitals become small ones, and others ``unk``, or nothing."""
    vocab = {letter: i for i, letter in enumerate([*letters, *([unk] if unk else [])])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token=unk))
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFC(), tokenizers.normalizers.Lowercase()]
    )
    made.decoder = tokenizers.decoders.Fuse()
    return made


@pytest.mark.parametrize(
    ("unk", "letters", "text", "told"),
    [
        (None, "abcé \n", "b a Cab\n", "'baCab' (blanks left out) comes back as 'bacab'"),
        (None, "abcé \n", "abcdabc\n", "'abcdabc' (blanks left out) comes back as 'abcabc'"),
        (None, "abcé \n", "abc  abc e\u0301\n", None),
        (None, "abcé ", "abc\n", r"'\n' (blanks left out) comes back as ''"),
        ("?", "abcé ", "abcdabc\n", None),
    ],
)
def test_a_tokenizer_that_does_not_give_the_text_back_is_told_each_time(
    folder: Path, tmp_path: Path, unk: str | None, letters: str, text: str, told: str | None
) -> None:
    for split in TEXT:
        (folder / f"{split}.txt").write_text(f"{text}{split}" if split == "valid" else text, encoding="utf-8")
    lower_case(unk, letters).save(str(tmp_path / "tokenizer.json"))
    for _ in range(2):
        stream = io.StringIO()
        prepared(folder, HfTokenizerConfig(path=str(tmp_path)), console=Console(stream))
        warned = [line for line in stream.getvalue().splitlines() if "give the text back" in line]
        assert len(warned) == (told is not None)
        assert told is None or told in warned[0]


def test_force_prepares_again(folder: Path) -> None:
    first = prepared(folder)
    before = (first.path / "index.json").stat().st_ino
    again = prepared(folder, force=True)
    assert again.path == first.path
    assert (again.path / "index.json").stat().st_ino != before


def test_force_reads_a_text_that_was_changed_behind_its_stamp(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "stamp_files", lambda paths: [str(path) for path in paths])
    first = prepared(folder)
    (folder / "valid.txt").write_text("the cat sat\n", encoding="utf-8")
    assert prepared(folder).key == first.key
    again = prepared(folder, force=True)
    assert again.key != first.key
    assert again.splits["valid"].num_unk == 0
    assert prepared(folder).key == again.key


def test_what_another_process_prepared_meanwhile_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = prepared_data._Preparation._encode
    made: list[tuple[Path, int]] = []

    def encode(self: Any, *args: Any) -> Any:
        if not made:
            made.append((folder, 0))
            monkeypatch.chdir(folder)  # from elsewhere it is another request, which takes no turns with this one
            other = prepared(folder)
            made[0] = other.path, (other.path / "index.json").stat().st_ino
        return real(self, *args)

    monkeypatch.setattr(prepared_data._Preparation, "_encode", encode)
    data = prepared(folder)
    assert (data.path, (data.path / "index.json").stat().st_ino) == made[0]


# --- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["index.json", "train.tokens", "test.ends", "tokenizer/tokenizer.json"])
def test_damaged_data_is_refused_by_name_told_once_and_prepared_again(
    folder: Path, settled: None, name: str, damage: object
) -> None:
    first = prepared(folder)
    tokens = first.splits["train"].tokens.tolist()
    damage(first.path / name)  # type: ignore[operator]
    with pytest.raises(DataError) as caught:
        open_prepared(first.path)
    assert Path(name).name in str(caught.value)
    stream = io.StringIO()
    again = prepared(folder, console=Console(stream))
    assert again.splits["train"].tokens.tolist() == tokens
    assert stream.getvalue().count("preparing it again") == 1


def test_an_index_of_another_version_is_refused(folder: Path) -> None:
    data = prepared(folder)
    path = data.path / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"version": 99}), encoding="utf-8")
    with pytest.raises(DataError, match="version 99"):
        open_prepared(data.path)


def test_large_token_files_are_verified_on_request_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepared(folder)
    flip(data.path / "train.tokens")
    monkeypatch.setattr("lmkit.data.tokenfiles.VERIFIED_BYTES", 0)
    open_prepared(data.path)
    with pytest.raises(DataError, match="SHA-256"):
        open_prepared(data.path, verify=True)


def test_a_damaged_memory_of_a_survey_is_forgotten(folder: Path, cache: Path, settled: None) -> None:
    first = prepared(folder)
    (path,) = (cache / "surveys").iterdir()
    path.write_text(path.read_text(encoding="utf-8").replace('"num_lines": 1', '"num_lines": 7', 1), encoding="utf-8")
    assert prepared(folder).splits["valid"].num_lines == first.splits["valid"].num_lines


# --- interruption and company


def test_a_text_is_not_read_for_a_cache_that_cannot_be_made(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LMKIT_CACHE", str(tmp_path / "file" / "cache"))
    reads = count_reads(monkeypatch)
    with pytest.raises(ResourceError):
        prepared(folder)
    assert reads == []


def test_a_full_disk_is_an_error_of_resources_and_leaves_nothing(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SplitWriter, "_write", full)
    with pytest.raises(ResourceError, match=r"No space left on device; .*LMKIT_CACHE"):
        prepared(folder)
    assert list((cache / "prepared").iterdir()) == []


@pytest.mark.parametrize("number", [3, 25])
def test_a_text_that_cannot_be_read_is_named_however_many_there_are(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(number):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"line {i}\n" * 50, encoding="utf-8")
    real = Path.open

    def opened(self: Path, *args: Any, **keys: Any) -> Any:
        if self.name == "1.txt":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return real(self, *args, **keys)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(DataError, match=r"^cannot read \S*1\.txt: Permission denied; check path and permissions$"):
        prepared(tmp_path / "texts")


def test_what_killed_preparations_left_is_removed(folder: Path, cache: Path) -> None:
    data = prepared(folder)
    for name in (".tmp-0123abcd-77-ffff", ".trash-key-77-ffff"):
        (cache / "prepared" / name).mkdir()
        (cache / "prepared" / name / "train.tokens").write_bytes(b"half")
    prepared(folder, CharTokenizerConfig())
    assert leftovers(cache) == []
    assert data.path.is_dir()


def test_what_another_process_sweeps_while_it_is_being_removed_is_no_error(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, remove = prepared(folder), storage.remove_tree

    def remove_together(path: Path) -> None:
        if path.name.startswith(storage.TRASH_PREFIX):
            remove(path)  # by the other one
        remove(path)

    monkeypatch.setattr(storage, "remove_tree", remove_together)
    assert prepared(folder, force=True).path == first.path
    assert leftovers(cache) == []


SCRIPT = """
import os, sys
from lmkit.config.data import TextConfig, WordTokenizerConfig
from lmkit.console import Console
from lmkit.data.prepared import prepare
from lmkit.data.tokenfiles import SplitWriter
kill = len(sys.argv) > 2
real = SplitWriter.add
def add(self, piece, ids):
    print("encoding", flush=True)
    if kill:
        os._exit(9)
    return real(self, piece, ids)
SplitWriter.add = add
print(prepare(TextConfig(path=sys.argv[1]), WordTokenizerConfig()).key)
"""


def test_a_killed_preparation_leaves_nothing_that_counts(folder: Path, cache: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder), "kill"], stdout=subprocess.PIPE, check=False)
    assert done.returncode == 9
    assert [name[:5] for name in leftovers(cache)] == [".tmp-"]
    data = prepared(folder)
    assert [path.name for path in (cache / "prepared").iterdir()] == [data.key]


KILLED_IN_A_NOTE = """
import os, sys
from lmkit.config.data import TextConfig, WordTokenizerConfig
from lmkit.data import textfiles
from lmkit.data.prepared import prepare
from lmkit.store import storage
textfiles._SETTLED_NS = 0
def replace(source, target):
    if target.parent.name == sys.argv[2]:
        os._exit(9)
    os.replace(source, target)
storage.replace = replace
prepare(TextConfig(path=sys.argv[1]), WordTokenizerConfig())
"""


@pytest.mark.parametrize("notes", ["surveys", "same"])
def test_what_a_preparation_leaves_that_is_killed_while_it_writes_a_note_is_removed(
    folder: Path, cache: Path, notes: str
) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED_IN_A_NOTE, str(folder), notes], check=False)
    assert done.returncode == 9
    assert [path.name[:5] for path in cache.rglob(".*")] == [".tmp-"]
    prepared(folder, CharTokenizerConfig())
    assert list(cache.rglob(".*")) == []


@pytest.mark.parametrize("linked", ["prepared", "surveys", "same"])
def test_each_folder_of_the_cache_may_be_a_link_to_another_disk(
    folder: Path, cache: Path, settled: None, linked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def within_a_disk(rename: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def renamed(source: Path, target: Path) -> None:
            if source.parent.resolve() != target.parent.resolve():
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            rename(source, target)

        return renamed

    for name in ("rename", "replace"):
        monkeypatch.setattr(storage, name, within_a_disk(getattr(storage, name)))
    cache.mkdir()
    (cache.parent / "other disk").mkdir()
    (cache / linked).symlink_to(cache.parent / "other disk")
    prepared(folder)
    for name in ("prepared", "surveys", "same"):
        assert len(list((cache / name).iterdir())) == 1


def test_processes_that_prepare_the_same_data_do_it_once(folder: Path, cache: Path) -> None:
    command_line = [sys.executable, "-c", SCRIPT, str(folder)]
    processes = [subprocess.Popen(command_line, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len({output.splitlines()[-1] for output in outputs}) == 1
    assert sum("encoding" in output for output in outputs) == 1
    assert len(list((cache / "prepared").iterdir())) == 1


def test_the_cache_moves_with_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LMKIT_CACHE", str(tmp_path / "elsewhere"))
    assert cache_dir() == tmp_path / "elsewhere"
    monkeypatch.delenv("LMKIT_CACHE")
    assert cache_dir().name == "lmkit"


# --- the command


def test_the_command_shows_the_counts_and_what_cleaning_did(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TextConfig(path=str(folder), cleaning=CleaningConfig(normalize_nfc=True))
    result = command.run(PrepareConfig(dataset=config, tokenizer=WordTokenizerConfig()))
    shown = capsys.readouterr().err
    assert result["splits"]["valid"]["num_tokens"] == 4
    assert json.loads(json.dumps(result)) == result
    for word in ("train", "valid", "test", "25.00%", "cleaning: NFC", "vocabulary", result["path"]):
        assert word in shown


def test_pydocs_is_prepared_by_the_command() -> None:
    result = command.run(PrepareConfig(dataset=PydocsConfig(), tokenizer=WordTokenizerConfig(vocab_size=5000)))
    assert "CPython" in result["source"]
    assert result["tokenizer"]["vocab_size"] == 5000


# --- the real corpora


@pytest.mark.corpora
@pytest.mark.skipif("LMKIT_DATA" not in os.environ, reason="LMKIT_DATA is not set")
@pytest.mark.parametrize(
    ("name", "types", "tokens"),
    [
        (BenchmarkName.ptb, 10_000, {"train": 929_589, "valid": 73_760, "test": 82_430}),
        (BenchmarkName.wikitext2, 33_278, {"train": 2_088_628, "valid": 217_646, "test": 245_569}),
    ],
)
def test_the_benchmark_sets_have_their_published_sizes(name: BenchmarkName, types: int, tokens: dict[str, int]) -> None:
    data = prepare(BenchmarkConfig(name=name), WordTokenizerConfig())
    assert data.tokenizer.vocab_size == types
    assert {split: values.num_tokens for split, values in data.splits.items()} == tokens
    assert {split: values.num_words for split, values in data.splits.items()} == tokens
