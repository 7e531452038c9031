"""Text, prepared data and the hub at their worst: a clear error with the place, or the same data as ever.

Numbers in names (row_95 ...) are the rows of the project's fault table.
"""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from children import environment, limit_memory
from harness import Lmkit, Start

from lmkit.data import corpus as corpora
from lmkit.data import survey, textfiles, tokenfiles
from lmkit.data.cleaning import Piece
from lmkit.data.survey import digest_of
from lmkit.data.tokenfiles import open_prepared
from lmkit.errors import DataError
from lmkit.evaluation.plan import Segments, unbroken
from lmkit.evaluation.scoring import Text
from lmkit.store.browse import read_journal
from lmkit.tasks.sentences import sentences_of
from lmkit.train import Trainer

# Text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"fine\nbad \xff byte\n", ["is not UTF-8", "line 2", "byte offset 9"]),
        (b"half a surrogate: \xed\xa0\x80\n", ["is not UTF-8", "line 1", "byte offset 18"]),
        (b"overlong slash \xc0\xaf\n", ["is not UTF-8", "byte offset 15"]),
        (b"cut \xe6\x88", ["is not UTF-8", "byte offset 4"]),
        ("some text\n".encode("utf-16"), ["is UTF-16 text"]),
        ("some text\n".encode("utf-16-le"), ["is UTF-16 text"]),
        ("some text\n".encode("utf-16-be"), ["is UTF-16 text"]),
        ("some text\n".encode("utf-32"), ["is UTF-32 text"]),
        ("schöner text\n".encode("latin-1"), ["is not UTF-8", "0xf6", "line 1", "byte offset 3"]),
    ],
    ids=range(9),
)
def test_row_95_text_that_is_not_utf8_is_refused_with_file_line_and_offset(
    lmkit: Lmkit, tmp_path: Path, data: bytes, words: list[str]
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    done = lmkit("prepare", "dataset=text", f"dataset.path={path}")
    assert done.code == 3, done.err
    assert all(word in done.error for word in [str(path), *words]), done.error


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfone\r\ntwo\r\n", "one\ntwo\n"),
        (b"one\rtwo\n", "one\rtwo\n"),
        (b"no end", "no end"),
        ("a\u2028b\u2029c\x85d\x0ce\n".encode(), "a\u2028b\u2029c\x85d\x0ce\n"),
        (b"nul \x00 stays\n", "nul \x00 stays\n"),
        (b"\xef\xbb\xbf", ""),
    ],
)
def test_row_95_marks_line_ends_and_control_characters_are_read_alike_everywhere(
    tmp_path: Path, data: bytes, text: str
) -> None:
    for name, packed in (("a.txt", data), ("a.txt.gz", gzip.compress(data))):
        (tmp_path / name).write_bytes(packed)
        assert "".join(textfiles.text_blocks(textfiles.Part(tmp_path / name))) == text
        assert "".join(textfiles.text_lines(tmp_path / name)) == text


@pytest.mark.parametrize("content", ["", "\n\n\n", " \t \n", "one"])
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_row_96_a_corpus_without_enough_text_is_refused_with_counts(
    lmkit: Lmkit, tmp_path: Path, kind: str, content: str
) -> None:
    path = tmp_path / f"a.{'txt' if kind == 'text' else 'jsonl'}"
    text = json.dumps({"text": content}) + "\n" if kind == "jsonl" and content == "one" else content
    path.write_text(text, encoding="utf-8")
    done = lmkit("prepare", f"dataset={kind}", f"dataset.path={path}")
    assert done.code == 3, done.err
    assert str(path) in done.error
    assert "would be empty (train " in done.error
    assert "documents" in done.error


def test_rows_80_96_a_text_of_a_few_tokens_trains_to_its_end(lmkit: Lmkit, small: list[str], tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("a", encoding="utf-8")
    done = lmkit(*small, f"dataset.path={tmp_path}", f"run.dir={tmp_path}/run", "train.max_steps=3")
    assert done.code == 0, done.err


def read_whole(path: Path, num_bytes: int) -> None:
    """Read a text file through in a child, and end it."""
    read = sum(len(block) for block in textfiles.text_blocks(textfiles.Part(path)))
    os._exit(0 if read == num_bytes else 1)


def one_line_of(num_bytes: int, tmp_path: Path, start: Start) -> None:
    path = tmp_path / "long.txt"
    with path.open("wb") as file:
        file.truncate(num_bytes)  # a sparse file: NUL bytes without an end of line
    child = start("--version", setup=[limit_memory(150 << 20), partial(read_whole, path, num_bytes)])
    assert child.wait(120) == 0, child.text


def test_row_97_a_line_of_any_length_is_read_in_bounded_memory(tmp_path: Path, start: Start) -> None:
    one_line_of(100 << 20, tmp_path, start)


@pytest.mark.slow
def test_row_97_a_line_of_two_gigabytes(tmp_path: Path, start: Start) -> None:
    one_line_of(2 << 30, tmp_path, start)


@pytest.mark.slow
def test_row_97_a_long_line_is_prepared_in_bounded_memory(tmp_path: Path, start: Start) -> None:
    path = tmp_path / "long.txt"
    path.write_bytes(b"word " * (20 << 20))
    child = start(
        "prepare", "dataset=text", f"dataset.path={path}", "tokenizer=byte", setup=[limit_memory(500 << 20)]
    )  # fmt: skip
    assert child.wait(200) == 0, child.text


@pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and names that Windows does not have")
def test_row_97_many_small_files_folders_and_odd_names(lmkit: Lmkit, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    for number in range(1000):
        part = folder / f"{number % 50}"
        part.mkdir(parents=True, exist_ok=True)
        (part / f"{number}.txt").write_text(f"text {number}\n", encoding="utf-8")
    for name in ("with blank.txt", "ümläut.txt", "new\nline.txt", "-rf.txt", "$(touch x).txt", "%s{0}.txt"):
        (folder / name).write_text("odd name\n", encoding="utf-8")
    (folder / "loop").symlink_to(folder)
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    (folder / ".hidden.txt").write_text("hidden\n", encoding="utf-8")
    (folder / "folder.txt").mkdir()
    os.mkfifo(folder / "pipe.txt")
    done = lmkit("prepare", "dataset=text", f"dataset.path={folder}")
    assert done.code == 0, done.err
    assert "(1006 files" in done.err


def records(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def table(err: str) -> dict[str, str]:
    """The rows of what ``prepare`` shows."""
    rows = [re.split(r" {2,}", line.strip(), maxsplit=1) for line in err.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def sizes(err: str) -> dict[str, int]:
    """Split -> number of documents."""
    return {split: int(table(err)[split].split()[0]) for split in ("train", "valid", "test") if split in table(err)}


def test_row_98_copies_are_counted_and_dropped_only_if_asked(lmkit: Lmkit, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records(path, [f"document number {number % 40}" for number in range(120)])
    words = ["prepare", "dataset=jsonl", f"dataset.path={path}", "dataset.valid_fraction=0.2"]
    for _ in range(2):  # the second time nothing is read
        done = lmkit(*words)
        assert done.code == 0, done.err
        documents = sizes(done.err)
        assert sum(documents.values()) == 120
        copies = {split: 2 * number // 3 for split, number in documents.items()}  # all of a text are in one split
        assert table(done.err)["copies"] == "; ".join(
            f"{copies[split]} of {documents[split]} documents of {split} repeat an earlier one" for split in documents
        )
        assert "cleaning: duplicate documents" not in done.err
    done = lmkit(*words, "dataset.cleaning.drop_duplicates=true")
    assert done.code == 0, done.err
    assert sizes(done.err) == {split: number // 3 for split, number in documents.items()}
    assert table(done.err)["cleaning: duplicate documents"].startswith("80 of 120 documents dropped")
    assert table(done.err)["copies"].startswith("no document stands twice")


def test_row_98_documents_that_are_also_in_train_are_counted_by_every_command_and_never_dropped(
    lmkit: Lmkit, small: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    long = "a line of a long document\n" * 60_000  # read in several pieces
    texts = [f"document number {number}" for number in range(30)]
    records(folder / "train.jsonl", [*texts, long])
    records(folder / "valid.jsonl", [*texts[:4], "other", "other", texts[0] + "!"])
    records(folder / "test.jsonl", [long, long + "!", "another"])
    words = ["dataset=jsonl", f"dataset.path={folder}"]
    warnings = ["4 of 7 documents of valid stand in train, too", "1 of 3 documents of test stand in train, too"]
    copies = "1 of 7 documents of valid repeat an earlier one; 4 of 7 of valid stand in train, too; 1 of 3 of test"
    for _ in range(2):  # the second time nothing is read
        done = lmkit("prepare", *words, "tokenizer=byte")
        assert done.code == 0, done.err
        assert sizes(done.err) == {"train": 31, "valid": 7, "test": 3}
        assert table(done.err)["copies"].startswith(copies)
        assert all(done.err.count(warning) == 1 for warning in warnings), done.err
    done = lmkit("prepare", *words, "tokenizer=byte", "dataset.cleaning.drop_duplicates=true")
    assert done.code == 0, done.err
    assert sizes(done.err) == {"train": 31, "valid": 6, "test": 3}  # what is in train, too, stays
    assert table(done.err)["cleaning: duplicate documents"].startswith("1 of 41 documents dropped")
    assert table(done.err)["copies"].startswith("4 of 6 of valid stand in train, too; 1 of 3 of test")
    records(folder / "train.jsonl", texts)
    records(folder / "test.jsonl", ["another"])
    training = [word for word in small if not word.startswith("dataset")]
    done = lmkit(*training, *words, "train.max_steps=1", f"run.dir={tmp_path}/run")
    assert done.code == 0, done.err
    assert warnings[0] in done.err
    done = lmkit("eval-ppl", f"run={tmp_path}/run", "split=valid", "device=cpu")
    assert done.code == 0, done.err
    assert warnings[0] in done.err
    assert re.search(r"also stand in train: \d+ of \d+", done.out + done.err)


def test_row_98_each_copy_and_each_document_in_train_is_counted_once_whatever_its_pieces() -> None:
    found = survey.Repeats(("train", "valid"))
    documents = {"train": ["a", "b", "ab", "ab", ""], "valid": ["ab", "ab", "ba", "c", "c", "c", ""]}
    for split, texts in documents.items():
        for number, text in enumerate(texts):
            cuts = text if number % 2 else [text]  # a piece for each letter, or one for all
            for place, part in enumerate(cuts or [""]):
                found.add(split, Piece(part, place == len(cuts or [""]) - 1))
    assert found.finish() == {"train": {"copies": 1, "in_train": 0}, "valid": {"copies": 3, "in_train": 3}}
    assert survey.Repeats(("valid",)).finish() == {"valid": {"copies": 0, "in_train": 0}}


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", gzip.compress(b"text\n"), "is gzip data"),
        ("a.txt.gz", b"text\n", "is not gzip data"),
        ("a.jsonl", b"PAR1\x15\x04", "is a parquet file"),
        ("a.jsonl", gzip.compress(b'{"text": "a"}\n'), "is gzip data"),
        ("a.txt", b"\n <!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n", "is an HTML page"),
        ("a.jsonl", b"<html><body>login</body></html>\n", "is an HTML page"),
        ("a.txt.gz", gzip.compress(b"<HTML>rate limit</HTML>"), "holds an HTML page"),
        ("a.txt", b"%PDF-1.7\n", "is a PDF document"),
        ("a.txt", b"BZh91AY&SY", "is bzip2 data"),
        ("a.txt", b"\xfd7zXZ\x00\x00", "is xz data"),
        ("a.txt", b"ARROW1\x00\x00", "is an arrow file"),
    ],
    ids=range(11),
)
def test_row_99_a_file_of_another_type_is_known_by_its_first_bytes(
    lmkit: Lmkit, tmp_path: Path, name: str, data: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(data)
    kind = "jsonl" if "jsonl" in name else "text"
    done = lmkit("prepare", f"dataset={kind}", f"dataset.path={tmp_path / name}")
    assert done.code == 3, done.err
    assert f"{tmp_path / name} {words}" in done.error


# Prepared data


@pytest.fixture
def prepared(lmkit: Lmkit, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of prepared data of ``small`` in a cache of its own."""
    monkeypatch.setenv("LMKIT_CACHE", str(tmp_path / "cache"))
    assert lmkit("prepare", *small[1:4]).code == 0
    (folder,) = (tmp_path / "cache" / "prepared").iterdir()
    return folder


def forge_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change an index as an attacker or a bug would: with a right digest of itself."""
    path = folder / "index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    change(index)
    index.pop("self", None)
    index["self"] = digest_of(index)
    path.write_text(json.dumps(index), encoding="utf-8")


def train_entry(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["splits"]["train"].update(values)


def tokens_entry(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["splits"]["train"]["tokens"].update(values)


INDEX_ATTACKS: list[Callable[[dict[str, Any]], None]] = [
    train_entry(max_id=257),
    train_entry(max_id=-1),
    train_entry(max_id="1"),
    train_entry(num_tokens=10),
    train_entry(num_tokens=-2),
    train_entry(num_tokens=1e3),
    train_entry(num_documents=10**9),
    train_entry(tokens=None),
    tokens_entry(bytes=3),
    tokens_entry(file="../../../../etc/passwd"),
    tokens_entry(file="/etc/passwd"),
    tokens_entry(file="valid.tokens"),
    tokens_entry(file=""),
    tokens_entry(file=7),
    lambda index: index.update(dtype="<u1"),
    lambda index: index.update(dtype=">u2"),
    lambda index: index.update(dtype="<u4"),
    lambda index: index.update(dtype="|O"),
    lambda index: index.update(dtype="<f2"),
    lambda index: index.update(dtype="nonsense"),
    lambda index: index.update(splits=[]),
    lambda index: index["splits"].pop("train"),
    lambda index: index.update(splits={}),
    lambda index: index["tokenizer"].update(digest="0" * 64),
    lambda index: index.pop("report"),
]


@pytest.mark.parametrize("number", range(len(INDEX_ATTACKS)))
def test_row_101_an_index_that_does_not_fit_its_files_is_refused_and_prepared_again(
    prepared: Path, lmkit: Lmkit, small: list[str], number: int
) -> None:
    forge_index(prepared, INDEX_ATTACKS[number])
    with pytest.raises(DataError, match=prepared.name):
        open_prepared(prepared)
    done = lmkit("prepare", *small[1:4])
    assert done.code == 0, done.err
    assert "preparing it again" in done.err
    assert open_prepared(prepared, verify=True).splits["train"].num_tokens > 0


def test_row_101_token_ids_outside_the_vocabulary_are_noticed_when_the_data_is_opened(prepared: Path) -> None:
    path = prepared / "train.tokens"
    data = bytearray(path.read_bytes())
    data[100:102] = (300).to_bytes(2, "little")
    path.write_bytes(data)
    forge_index(prepared, tokens_entry(sha256=hashlib.sha256(data).hexdigest()))
    with pytest.raises(DataError, match=r"train\.tokens"):
        open_prepared(prepared)


def put_id(path: Path, number: int, position: int) -> None:
    """Write a token id of two bytes into a file of tokens, in its place."""
    with path.open("r+b") as file:
        file.seek(2 * position)
        file.write(number.to_bytes(2, "little"))


@pytest.fixture
def unverified(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prepared data that are not hashed when they are opened, as if they were large."""
    monkeypatch.setattr(tokenfiles, "VERIFIED_BYTES", 0)
    return prepared


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("model", ["lstm", "tiny", "kn5"])
def test_row_101_an_id_outside_the_vocabulary_in_a_large_file_is_named_in_training(
    unverified: Path, lmkit: Lmkit, small: list[str], tmp_path: Path, split: str, model: str
) -> None:
    put_id(unverified / f"{split}.tokens", 300, 100)
    words = [word for word in small if not word.startswith("model")]
    done = lmkit(*words, f"model={model}", f"run.dir={tmp_path}/run")
    assert done.code == 3, done.err
    file = unverified / f"{split}.tokens"
    assert f"{file}: token ids do not fit a vocabulary of 257: 300 at position 100;" in done.error


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("model", ["lstm", "tiny"])
def test_row_101_an_id_that_goes_bad_while_a_run_trains_is_found_in_its_batch(
    unverified: Path,
    lmkit: Lmkit,
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    model: str,
) -> None:
    made = Trainer.__post_init__

    def damaged(self: Trainer) -> None:  # all of the text was looked at by now
        made(self)
        put_id(unverified / "train.tokens", 65535, 40)

    monkeypatch.setattr(Trainer, "__post_init__", damaged)
    words = [word for word in small if not word.startswith("model")]
    words += [f"model={model}", f"train.workers={workers}", "train.max_steps=200", "eval.every_steps=500"]
    done = lmkit(*words, f"run.dir={tmp_path}/run")
    assert done.code == 3, done.err
    assert "train.tokens: token ids do not fit a vocabulary of 257: 65,535 at position 40;" in done.error
    last = read_journal(tmp_path / "run")[-1]
    assert (last["event"], last["code"], last["message"]) == ("error", 3, done.error)


@pytest.mark.parametrize("split", ["test", "train", "valid"])
def test_row_101_an_id_outside_the_vocabulary_in_a_large_file_is_named_in_evaluation(
    unverified: Path, lmkit: Lmkit, small: list[str], tmp_path: Path, split: str
) -> None:
    assert lmkit(*small, f"run.dir={tmp_path}/run").code == 0
    words = ["eval-ppl", f"run={tmp_path}/run", "device=cpu", "device.threads=1"]
    assert lmkit(*words).code == 0
    assert list(unverified.parent.iterdir()) == [unverified], "what pretrain prepared is what is scored"
    put_id(unverified / f"{split}.tokens", 300, 100)
    done = lmkit(*words, *(["temperature=valid"] if split == "valid" else []))
    assert done.code == 3, done.err
    assert f"{split}.tokens: token ids do not fit a vocabulary of 257: 300 at position 100;" in done.error


def test_row_101_an_id_that_goes_bad_while_a_text_is_scored_is_found_in_its_piece(unverified: Path) -> None:
    data = open_prepared(unverified)
    tokens = data.splits["valid"].tokens
    text = Text(tokens, data.tokenizer.vocab_size)
    assert text.targets(np.array([7, 8])).tolist() == tokens[7:9].tolist()
    put_id(unverified / "valid.tokens", 257, 8)
    with pytest.raises(DataError, match=r"valid\.tokens: .* vocabulary of 257: 257 at position 8"):
        text.targets(np.array([7, 8]))
    whole = unbroken(Segments.whole(len(tokens), data.tokenizer.eos_id))
    with pytest.raises(DataError, match="257 at position 8"):
        text.inputs(np.array([[9]]), whole)
    assert text.targets(np.array([7, 9])).tolist() == [tokens[7], tokens[9]]


def test_row_101_an_id_that_goes_bad_in_a_sentence_is_found_in_its_batch(unverified: Path) -> None:
    data = open_prepared(unverified)
    sentences = sentences_of(data.splits["train"], data.tokenizer)
    sentences.batch(np.array([0, 1]))
    put_id(unverified / "train.tokens", 300, int(sentences.begins_S[1]))
    sentences.batch(np.array([0, 2]))
    with pytest.raises(DataError, match=r"train\.tokens: .*: 300 at position"):
        sentences.batch(np.array([0, 1]))
    with pytest.raises(DataError, match=r"train\.tokens: .*: 300 at position"):
        sentences_of(data.splits["train"], data.tokenizer)


@pytest.mark.parametrize("damage", ["swap", "truncate", "extend", "flip", "zeros", "missing", "folder", "ends"])
def test_row_102_a_damaged_or_swapped_token_file_is_named_and_made_again(
    prepared: Path, lmkit: Lmkit, small: list[str], damage: str
) -> None:
    path = prepared / ("train.ends" if damage == "ends" else "train.tokens")
    good = path.read_bytes()
    if damage == "swap":
        other = prepared / "test.tokens"
        path.write_bytes(other.read_bytes())
        other.write_bytes(good)
    elif damage in ("missing", "folder"):
        path.unlink()
        if damage == "folder":
            path.mkdir()
    else:
        flipped = bytes([good[0] ^ 1]) + good[1:]
        path.write_bytes(
            {"truncate": good[:-1], "extend": good + b"\0", "zeros": bytes(len(good))}.get(damage, flipped)
        )
    with pytest.raises(DataError, match=r"(train|test)\.(tokens|ends)"):
        open_prepared(prepared)
    done = lmkit("prepare", *small[1:4])
    assert done.code == 0, done.err
    assert "preparing it again" in done.err
    assert path.read_bytes() == good


def test_row_103_a_file_that_grows_while_it_is_prepared_is_refused(
    lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a line of text\n" * 1000, encoding="utf-8")
    decode = textfiles._decode

    def grow(*args: Any) -> str:
        with path.open("a", encoding="utf-8") as file:
            file.write("one more\n")
        return decode(*args)

    monkeypatch.setattr(textfiles, "_decode", grow)
    done = lmkit("prepare", "dataset=text", f"dataset.path={path}")
    assert done.code == 3, done.err
    assert f"{path} changed while it was read" in done.error


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_row_104_a_preparation_that_is_stopped_at_any_time_leaves_nothing_that_counts(
    start: Start, lmkit: Lmkit, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal_name: str
) -> None:
    cache = tmp_path / "cache"
    big = tmp_path / "big.txt"
    big.write_text("a line of text that is not short\n" * 150_000, encoding="utf-8")
    words = ["prepare", "dataset=text", f"dataset.path={big}", "tokenizer=char"]
    for delay_s in (0.05, 0.25, 0.45):
        child = start(*words, setup=[environment(LMKIT_CACHE=str(cache))])
        time.sleep(delay_s)
        child.send(getattr(signal, signal_name))
        child.wait()
        done = [p for p in (cache / "prepared").glob("*") if not p.name.startswith(".")] if cache.exists() else []
        for folder in done:
            open_prepared(folder, verify=True)
    monkeypatch.setenv("LMKIT_CACHE", str(cache))
    assert lmkit(*words).code == 0
    assert len(list((cache / "prepared").iterdir())) == 1


# The hub


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that answers wrongly, in the way that ``mode`` says."""

    mode: ClassVar[str] = ""

    def do_GET(self) -> None:
        if self.mode == "hangs":
            time.sleep(300)
            return
        if self.mode == "cuts" and "/api/datasets/" in self.path and "/tree" not in self.path:
            self._answer(200, "application/json", b'{"id": "a/b", "sha": "' + b"0" * 40 + b'", "siblings": []}')
        elif self.mode == "cuts":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"half")
        elif self.mode == "429":
            self._answer(429, "text/plain", b"slow down")
        elif self.mode == "500":
            self._answer(500, "text/plain", b"oops")
        else:
            self._answer(200, "text/html", b"<html><body>Please log in to the proxy</body></html>")

    do_HEAD = do_GET

    def _answer(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    made.daemon_threads = True
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


@pytest.mark.parametrize("mode", ["offline", "refuses", "hangs", "429", "500", "proxy"])
def test_row_105_a_hub_that_does_not_answer_rightly_is_a_fast_error_with_the_way_around(
    server: http.server.ThreadingHTTPServer, lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    datasets = pytest.importorskip("datasets")
    import huggingface_hub

    port = 1 if mode == "refuses" else server.server_address[1]
    address = f"http://127.0.0.1:{port}"
    for module, name in (
        (huggingface_hub.constants, "ENDPOINT"), (datasets.config, "HF_ENDPOINT"), (huggingface_hub.hf_api, "ENDPOINT")
    ):  # fmt: skip
        monkeypatch.setattr(module, name, address, raising=False)
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", mode == "offline")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(corpora, "_HUB_TIMEOUT_S", 1.0)
    monkeypatch.setattr(Hub, "mode", mode)
    begun = time.monotonic()
    done = lmkit("prepare", "dataset=wikitext2")
    assert done.code == 3, done.err
    for word in ("Salesforce/wikitext", "dataset.path=DIR", "LMKIT_DATA"):
        assert word in done.error
    assert time.monotonic() - begun < 120


def test_row_105_a_hub_that_cuts_every_file_off_is_an_error_in_the_end(
    server: http.server.ThreadingHTTPServer, ended: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "mode", "cuts")
    address = f"http://127.0.0.1:{server.server_address[1]}"
    done = ended(
        "prepare",
        "dataset=wikitext2",
        setup=[environment(HF_ENDPOINT=address, HF_HUB_OFFLINE=None, HF_HOME=str(tmp_path / "hub"))],
    )
    assert done.code == 3, done.err
    assert "dataset.path=DIR" in done.error
    assert done.err.count("Traceback") == 0


def test_row_106_a_hub_dataset_whose_content_changed_is_refused_on_resume(
    lmkit: Lmkit, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    texts = [f"document number {number} of the set\n" * 3 for number in range(60)]

    def load(*args: Any, **options: Any) -> Any:
        return datasets.Dataset.from_dict({"text": texts})

    monkeypatch.setattr(corpora, "load_hub_split", load)
    words = [word for word in small if not word.startswith("dataset")]
    words += ["dataset=hub", "dataset.name=a/b", "dataset.valid_fraction=0.2", "dataset.test_fraction=0.2"]
    assert lmkit(*words, f"run.dir={tmp_path}/run").code == 0
    texts[0] = texts[0].replace("document", "Document")
    done = lmkit(*words, f"run.dir={tmp_path}/run", "resume=true", "train.max_steps=14")
    assert done.code == 2, done.err
    assert "data: " in done.error
    assert " -> " in done.error
