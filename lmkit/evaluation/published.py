"""Published perplexities on the standard corpora, and where a number stands among those that are comparable with it.

Two perplexities can be compared only if they are of the same text, counted by the same protocol, and come from the same
kind of evaluation: dynamic evaluation alone is worth more than years of better static models. So a number is never
placed among others. The rows stand in published.csv next to this file, each with its source.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

from lmkit.errors import DataError

KINDS = ("static", "temperature", "mc-dropout", "cache", "dynamic", "ensemble", "pretrained")
"""What was done beyond static scoring: nothing, a temperature fitted on valid, probabilities averaged over dropout
masks, a cache of the text read so far, weights adapted to it, models averaged; or training on further data."""
PROTOCOLS = ("mikolov", "gpt2-paper")
"""Word-level text with <unk> and ends of line scored and counted; de-tokenized text, per word of the original."""

FILE = "published.csv"


@dataclass(frozen=True)
class PublishedResult:
    """One row: a model's perplexity on a corpus. Numbers that the source does not give are None."""

    dataset: str
    model: str
    params_millions: float | None
    valid: float | None
    test: float | None
    kind: str
    """One of KINDS."""
    protocol: str
    """One of PROTOCOLS."""
    source: str
    """Who published it, and where."""

    def ppl(self, split: str) -> float | None:
        """Perplexity on ``valid`` or ``test``; there is none for other splits."""
        return {"valid": self.valid, "test": self.test}.get(split)


@dataclass(frozen=True)
class Standing:
    """The place of a number among the published ones of one dataset, split, protocol and kind."""

    dataset: str
    split: str
    protocol: str
    kind: str
    ppl: float
    rank: int
    """1 + how many published results are lower."""
    total: int
    """Published results, and this one."""
    better: tuple[PublishedResult, ...]
    """The results just below, the best first."""
    worse: tuple[PublishedResult, ...]
    """The results just above or equal, the best first."""

    def lines(self) -> list[str]:
        """For people: the place, then the neighbours with this number among them."""
        title = f"published {self.kind} results, {self.dataset} {self.split}, protocol {self.protocol}"
        own = f"> {self.ppl:7.2f}  this result"
        place = f"{title}: place {self.rank} of {self.total}, this one included"
        return [place, *map(self._line, self.better), own, *map(self._line, self.worse)]

    def _line(self, row: PublishedResult) -> str:
        size = "" if row.params_millions is None else f", {row.params_millions:g}M parameters"
        return f"  {row.ppl(self.split):7.2f}  {row.model}{size}: {row.source}"


def load() -> list[PublishedResult]:
    """All rows in the order of the file. Raises DataError, naming the line, if one is not as it must be."""
    text = resources.files("lmkit.evaluation").joinpath(FILE).read_text(encoding="utf-8")
    return parse(text.splitlines())


def parse(lines: Iterable[str]) -> list[PublishedResult]:
    """Rows of comma-separated lines, the names of the fields first."""
    reader = csv.reader(lines, strict=True)
    names = [field.name for field in fields(PublishedResult)]
    rows: dict[tuple[str, str, str, str], PublishedResult] = {}
    try:
        header = next(reader, [])
        _require(header == names, reader.line_num, f"the columns are {', '.join(header)}, not {', '.join(names)}")
        for cells in reader:
            row = _row(cells, reader.line_num)
            key = row.dataset, row.model, row.kind, row.protocol
            _require(key not in rows, reader.line_num, f"{row.model} is there twice")
            rows[key] = row
    except csv.Error as error:
        raise DataError(f"{FILE} line {reader.line_num}: {error}", "correct the line") from error
    return list(rows.values())


def _row(cells: list[str], line: int) -> PublishedResult:
    num_columns = len(fields(PublishedResult))
    _require(len(cells) == num_columns, line, f"{len(cells)} cells instead of {num_columns}")
    _require(all(cell == cell.strip() for cell in cells), line, "a cell begins or ends with white space")
    dataset, model, params, valid, test, kind, protocol, source = cells
    for name, text in (("dataset", dataset), ("model", model), ("source", source)):
        _require(text != "", line, f"{name} is empty")
    _require(kind in KINDS, line, f"kind {kind!r} is not one of {', '.join(KINDS)}")
    _require(protocol in PROTOCOLS, line, f"protocol {protocol!r} is not one of {', '.join(PROTOCOLS)}")
    row = PublishedResult(
        dataset,
        model,
        _number("params_millions", params, line, above=0),
        _number("valid", valid, line, above=1),
        _number("test", test, line, above=1),
        kind,
        protocol,
        source,
    )
    _require(row.valid is not None or row.test is not None, line, "neither valid nor test is given")
    return row


def _number(name: str, text: str, line: int, *, above: float) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    _require(above < value < math.inf, line, f"{name} {text!r} is not a number above {above:g}")
    return value


def _require(holds: bool, line: int, problem: str) -> None:
    if not holds:
        raise DataError(f"{FILE} line {line}: {problem}", "correct the line")


def published_kind(kind: str, config: Mapping[str, Any], dataset: str) -> str:
    """Under which kind a run's number stands among published ones; ``config``: what the run has stored of itself.

    A run that has learnt anything but ``dataset`` alone (other text, or a model to begin with, whatever that had read)
    is a pretrained one: its number is not that of a model which saw nothing else. What the base of a base had read, and
    what a run had read before it went on with other data, is not known.
    """
    corpora = [config.get("dataset"), *([] if config.get("base") is None else [config.get("corpus")])]
    known = [(corpus or {}).get("name") for corpus in corpora if (corpus or {}).get("kind") == "benchmark"]
    task, init = config.get("task") or {}, config.get("init") or {}
    alone = init.get("weights") is None and not config.get("base_had_base") and config.get("data_order") is None
    if alone and known == [dataset] * len(corpora) and task.get("kind", "lm") == "lm":
        return kind
    return "pretrained" if kind == "static" else f"pretrained + {kind}"


def standing(dataset: str, protocol: str, kind: str, split: str, ppl: float, neighbours: int = 3) -> Standing | None:
    """Where ``ppl`` stands among the rows of exactly this dataset, protocol and kind that have a number for ``split``.

    None if there is no such row. ``neighbours``: how many rows to name on each side. Raises ValueError for a ppl that
    is not a number.
    """
    if math.isnan(ppl):
        raise ValueError("a perplexity that is not a number has no place")
    found = []
    for row in load():
        published = row.ppl(split)
        if published is not None and (row.dataset, row.protocol, row.kind) == (dataset, protocol, kind):
            found.append((published, row))
    if not found:
        return None
    found.sort(key=lambda pair: pair[0])
    better = [row for published, row in found if published < ppl]
    worse = [row for published, row in found if published >= ppl]
    return Standing(
        dataset=dataset,
        split=split,
        protocol=protocol,
        kind=kind,
        ppl=ppl,
        rank=len(better) + 1,
        total=len(found) + 1,
        better=tuple(better[max(0, len(better) - neighbours) :]),
        worse=tuple(worse[:neighbours]),
    )
