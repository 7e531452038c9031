"""Rows of named columns: from .jsonl, .json, .csv and .tsv files (also .gz and .zst) and from the Hugging Face hub.

The name decides the format. ``.jsonl``: one object a line; ``.json``: one list of objects; ``.csv``: a line of column
names, fields quoted with ``"`` where needed (RFC 4180); ``.tsv``: a line of names, fields between tabs, in which quotes
mean nothing. ``hub:NAME`` or ``hub:NAME:CONFIG`` is a dataset of the hub. Text is UTF-8; lines end as textfiles says.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lmkit.data import textfiles
from lmkit.errors import DataError

FORMATS = (".jsonl", ".json", ".csv", ".tsv")
HUB = "hub:"
_MAX_FIELD_CHARS = (1 << 31) - 1
"""Python takes 131,072 by itself, fewer than a long document has; more than this a C long may not hold."""


@dataclass(frozen=True)
class Record:
    """One row as it was read."""

    where: str
    """File and line (or entry) for people."""
    values: dict[str, Any]
    """Column -> text, or what JSON makes of it; numbers are kept as the text that was written."""

    def text(self, column: str) -> str:
        """The text of a column. Raises DataError, naming the place, if it is not there or is no plain value."""
        if column not in self.values:
            names = ", ".join(self.values)[:200] or "nothing"
            raise DataError(f"{self.where} has no column '{column}' but {names}", "name the columns of your data")
        return as_text(self.values[column], f"{self.where}, column '{column}'")


def as_text(value: Any, where: str) -> str:
    """A plain value as text, CRLF as "\\n", true, false and numbers as JSON has them. DataError for anything else."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        kind = {type(None): "null", dict: "an object", list: "a list"}.get(type(value), type(value).__name__)
        raise DataError(f"{where} holds {kind}, not text", "repair or remove the row")
    if "\0" in value:
        raise DataError(f"{where} holds a NUL character", "repair or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds half a character (a lone surrogate)", "repair the row") from error
    return value.replace("\r\n", "\n")


def read_records(source: str, split: str = "train") -> list[Record]:
    """Every row with all its columns; at least one. ``split``: of a dataset of the hub; files have none.

    Raises DataError, naming file and line, for whatever is not as it should be, or if there is no row.
    """
    if source.startswith(HUB):
        records = list(_hub_records(source, split))
    else:
        path = Path(os.path.expanduser(source)).absolute()
        records = list(_file_records(path))
        source = str(path)
    if not records:
        raise DataError(f"{source} holds no rows", "name a file with rows in it")
    return records


def _file_records(path: Path) -> Iterator[Record]:
    if not os.path.exists(path):
        raise DataError(f"{path} does not exist", "name a file, or a dataset of the hub as hub:NAME")
    if not path.is_file():
        raise DataError(f"{path} is not a file", "name a file")
    plain = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    suffix = next((suffix for suffix in FORMATS if plain.endswith(suffix)), None)
    if suffix is None:
        raise DataError(f"{path} does not end in {', '.join(FORMATS)}", "rename it to what it is")
    if suffix == ".jsonl":
        yield from _jsonl(path)
    elif suffix == ".json":
        yield from _json(path)
    else:
        yield from _table(path, tabs=suffix == ".tsv")


def _parse(text: str, path: Path, line: int) -> Any:
    """JSON in strict form. ``line``: where the text begins."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a number of JSON")

    try:
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=refuse)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} in column {error.colno}"
        raise DataError(f"{path}, line {line + error.lineno - 1} is not JSON: {problem}", "repair the line") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {line} is not JSON: {error}", "repair or remove the line") from error


def _jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(textfiles.text_lines(path), start=1):
        if not line.isspace():
            yield _object(_parse(line.rstrip(), path, number), f"{path}, line {number}")


def _json(path: Path) -> Iterator[Record]:
    text = "".join(textfiles.text_lines(path))
    if not text.strip():
        return
    rows = _parse(text, path, 1)
    if not isinstance(rows, list):
        raise DataError(f"{path} is not a list of objects", "name it .jsonl if it holds one object a line")
    for number, row in enumerate(rows, start=1):
        yield _object(row, f"{path}, entry {number}")


def _object(row: Any, where: str) -> Record:
    if not isinstance(row, dict):
        raise DataError(f"{where} is not an object with named columns", "repair or remove the line")
    return Record(where, row)


def _table(path: Path, *, tabs: bool) -> Iterator[Record]:
    csv.field_size_limit(_MAX_FIELD_CHARS)
    lines = textfiles.text_lines(path)
    if tabs:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    else:
        reader = csv.reader(lines, strict=True)
    names: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            reason = "a quote is not closed" if "end of data" in str(error) else str(error)
            raise DataError(f"{path}, line {line} cannot be read: {reason}", "repair the quoting, or use .jsonl") from (
                error
            )
        if fields is None:
            return
        if not fields:
            continue
        if names is None:
            names = fields
            if len(set(names)) < len(names) or "" in names:
                raise DataError(f"{path}, line {line}: a column name is empty or stands twice", "name every column")
        elif len(fields) != len(names):
            raise DataError(
                f"{path}, line {line} has {len(fields)} fields, the first line {len(names)}", "repair or remove it"
            )
        else:
            yield Record(f"{path}, line {line}", dict(zip(names, fields, strict=True)))


def _hub_records(source: str, split: str) -> Iterator[Record]:
    import datasets

    from lmkit.data.corpus import load_hub_split

    name, _, config = source.removeprefix(HUB).partition(":")
    if not name:
        raise DataError(f"{source} names no dataset", "write hub:NAME or hub:NAME:CONFIG")
    table = load_hub_split(name, config or None, None, split, "check the name, or read a file")
    labels = {column: f.names for column, f in table.features.items() if isinstance(f, datasets.ClassLabel)}
    for number, row in enumerate(table):
        for column, names in labels.items():
            if isinstance(row[column], int) and 0 <= row[column] < len(names):
                row[column] = names[row[column]]
        yield Record(f"{source} {split}, row {number}", dict(row))
