"""``lmkit prepare``: read, clean and tokenize a corpus once, into the cache, and show what is in it."""

from __future__ import annotations

import time
from typing import Any

from lmkit.config.commands import PrepareConfig
from lmkit.console import Console, format_count, format_duration
from lmkit.data.prepared import PreparedData, prepare

_COLUMNS = ("documents", "lines", "words", "tokens", "bytes", "<unk>")


def run(config: PrepareConfig) -> dict[str, Any]:
    """Prepare, show a table and return the numbers as JSON data."""
    console = Console()
    start_s = time.monotonic()
    data = prepare(config.dataset, config.tokenizer, console, force=config.force)
    seconds = time.monotonic() - start_s
    console.table(f"{data.name}: {data.report['source']}", _rows(data, seconds))
    splits = {
        name: {key: value for key, value in vars(split).items() if key not in ("tokens", "document_ends")}
        for name, split in data.splits.items()
    }
    return {
        "path": str(data.path),
        "key": data.key,
        "dataset": data.name,
        "source": data.report["source"],
        "tokenizer": {
            "kind": data.tokenizer.kind,
            "vocab_size": data.tokenizer.vocab_size,
            "digest": data.tokenizer.digest,
        },
        "splits": splits,
        "cleaning": data.report["cleaning"],
        "repeats": data.report["repeats"],
        "seconds": seconds,
    }


def _rows(data: PreparedData, seconds: float) -> list[tuple[str, str]]:
    table: list[tuple[str, tuple[str, ...]]] = [("split", _COLUMNS)]
    for name, split in data.splits.items():
        counts = (split.num_documents, split.num_lines, split.num_words, split.num_tokens, split.num_bytes)
        table.append((name, (*(f"{count:,}" for count in counts), f"{split.num_unk / split.num_tokens:.2%}")))
    widths = [max(len(cells[i]) for _, cells in table) for i in range(len(_COLUMNS))]
    rows = [(name, "  ".join(map(str.rjust, cells, widths))) for name, cells in table]
    per_word = sum(s.num_tokens for s in data.splits.values()) / sum(s.num_words for s in data.splits.values())
    rows.append(
        ("vocabulary", f"{data.tokenizer.kind}, {data.tokenizer.vocab_size:,} types, {per_word:.2f} tokens a word")
    )
    rows.extend(_cleaning_rows(data))
    rows.append(("copies", _repeats(data)))
    rows.append(("stored in", str(data.path)))
    rows.append(("took", format_duration(seconds)))
    return rows


def _repeats(data: PreparedData) -> str:
    """How many documents repeat others, in the text that is left after cleaning."""
    said = []
    for split, found in data.report["repeats"].items():
        total = f"{data.splits[split].num_documents:,}"
        if found["copies"]:
            said.append(f"{found['copies']:,} of {total} documents of {split} repeat an earlier one")
        if found["in_train"]:
            said.append(f"{found['in_train']:,} of {total} of {split} stand in train, too")
    return "; ".join(said) or "no document stands twice in a split, or in train and in another one"


def _cleaning_rows(data: PreparedData) -> list[tuple[str, str]]:
    """What each cleaning step removed, over all splits; steps that changed nothing are shown too, except ``empty``."""
    totals: dict[str, list[int]] = {}
    for steps in data.report["cleaning"].values():
        for step, counts in steps.items():
            total = totals.setdefault(step, [0, 0, 0])
            total[0] += counts["documents_before"] - counts["documents_after"]
            total[1] += counts["documents_before"]
            total[2] += counts["chars_before"] - counts["chars_after"]
    return [
        (f"cleaning: {step}", f"{dropped:,} of {before:,} documents dropped, {format_count(chars)} characters fewer")
        for step, (dropped, before, chars) in totals.items()
        if dropped or chars or step != "empty documents"
    ]
