"""Reading rows of named columns from files: what is right is read as written, what is wrong is named by its line."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path

import pytest

from lmkit.data import corpus
from lmkit.data.rows import read_records
from lmkit.errors import DataError

ROWS = [{"a": 'x, "y"\nz', "b": "1"}, {"a": "我们 ${x}", "b": "0.10"}]


def write(path: Path, data: bytes | str) -> str:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def read_rows(source: str, *split: str, columns: list[str]) -> list[dict[str, str]]:
    return [{column: record.text(column) for column in columns} for record in read_records(source, *split)]


def test_all_formats_give_the_same_rows(tmp_path: Path) -> None:
    files = {
        "r.jsonl": '\ufeff{"a": "x, \\"y\\"\\nz", "b": 1}\r\n\n{"a": "我们 ${x}", "b": 0.10, "more": [1]}',
        "r.json": '[{"a": "x, \\"y\\"\\nz", "b": "1"},\n {"a": "我们 ${x}", "b": 0.10}]',
        "r.csv": 'b,a\r\n1,"x, ""y""\nz"\r\n\r\n0.10,我们 ${x}\r\n',
    }
    for name, text in files.items():
        assert read_rows(write(tmp_path / name, text), columns=["a", "b"]) == ROWS, name
    packed = tmp_path / "R.CSV.GZ"
    packed.write_bytes(gzip.compress(files["r.csv"].encode()))
    assert read_rows(str(packed), columns=["a", "b"]) == ROWS


def test_quotes_mean_nothing_between_tabs(tmp_path: Path) -> None:
    path = write(tmp_path / "r.tsv", 'a\tb\n"open\tshut"\n')
    assert read_rows(path, columns=["b", "a"]) == [{"b": 'shut"', "a": '"open'}]


def test_lines_inside_a_text_end_alike_in_every_format(tmp_path: Path) -> None:
    files = {"r.csv": 'a\r\n"x\r\ny"\r\n', "r.jsonl": '{"a": "x\\r\\ny"}\r\n', "r.json": '[{"a": "x\\r\\ny"}]'}
    for name, text in files.items():
        assert read_rows(write(tmp_path / name, text), columns=["a"]) == [{"a": "x\ny"}], name


def test_a_text_may_be_long_in_every_format(tmp_path: Path) -> None:
    text = "word " * 40_000
    files = {"r.csv": f'a,b\n"{text}",1\n', "r.tsv": f"a\tb\n{text}\t1\n", "r.jsonl": json.dumps({"a": text, "b": 1})}
    for name, content in files.items():
        assert read_rows(write(tmp_path / name, content), columns=["a"]) == [{"a": text}], name


def test_true_and_false_are_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", json.dumps({"label": True}))
    assert read_rows(path, columns=["label"]) == [{"label": "true"}]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("r.jsonl", b'{"a": "x"}\n{"a": "caf\xe9"}\n', r"r\.jsonl is not UTF-8: .* in line 2"),
        ("r.jsonl", b'{"a": "x"}\n{"a": \n', r"r\.jsonl, line 2 is not JSON"),
        ("r.jsonl", b'{"a": "x"}\n["a"]\n', r"line 2 is not an object"),
        ("r.jsonl", b'{"a": "x"}\n\n{"b": "x"}\n', r"line 3 has no column 'a' but b"),
        ("r.jsonl", b'{"a": null}\n', r"line 1, column 'a' holds null"),
        ("r.jsonl", b'{"a": ["x"]}\n', r"line 1, column 'a' holds a list"),
        ("r.jsonl", b'{"a": NaN}\n', r"line 1 is not JSON: NaN"),
        ("r.jsonl", b'{"a": "\\u0000"}\n', r"line 1, column 'a' holds a NUL"),
        ("r.jsonl", b'{"a": "\\ud800"}\n', r"line 1, column 'a' holds half a character"),
        ("r.jsonl", b"[" * 100_000, r"line 1 is not JSON"),
        ("r.json", b'[{"a": "x"},\n{"a" "y"}]', r"r\.json, line 2 is not JSON"),
        ("r.json", b'{"a": "x"}', r"is not a list of objects"),
        ("r.json", b'[{"a": "x"}, 3]', r"entry 2 is not an object"),
        ("r.csv", b'a,b\n1,2\n"open,3\n4,5\n', r"r\.csv, line 3 cannot be read: a quote is not closed"),
        ("r.csv", b'a,b\n1,2\n"x"y,3\n', r"line 3 cannot be read"),
        ("r.csv", b"a,b\n1\n", r"line 2 has 1 fields, the first line 2"),
        ("r.csv", b"a,a\n1,2\n", r"line 1: a column name is empty or stands twice"),
        ("r.csv", b"a,b\n1\x00,2\n", r"NUL"),
        ("r.csv", b"a,b\n", r"holds no rows"),
        ("r.jsonl", b"", r"holds no rows"),
        ("r.json", b"[]", r"holds no rows"),
        ("r.txt", b"a", r"does not end in \.jsonl"),
        ("r.csv", b"PK\x03\x04", r"zip archive"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path / name, data), columns=["a"])


def test_rows_of_the_hub_have_the_names_of_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    asked: list[object] = []

    def load(*args: object) -> datasets.Dataset:
        asked.append(args[:4])
        return table

    monkeypatch.setattr(corpus, "load_hub_split", load)
    rows = read_rows("hub:owner/name:config", "validation", columns=["text", "label"])
    assert rows == [{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}]
    assert asked == [("owner/name", "config", None, "validation")]
    with pytest.raises(DataError, match="hub:owner/name train, row 0 has no column 'x' but text, label"):
        read_rows("hub:owner/name", columns=["x"])


def test_a_file_that_is_not_there_or_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.csv does not exist; .*hub:NAME"):
        read_rows(str(tmp_path / "missing.csv"), columns=["a"])
    with pytest.raises(DataError, match="is not a file"):
        read_records(str(tmp_path))
    with pytest.raises(DataError, match="names no dataset"):
        read_records("hub:")


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a message that fits whichever key names it."""
    path = write(tmp_path / "r.csv", "a\nx\n")

    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"r\.csv: Permission denied; check path and permissions$"):
        read_records(path)
