"""How ``lmkit runs`` puts things: columns, sizes and times as plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from datetime import datetime

from lmkit.console import format_count, format_number
from lmkit.store.browse import RunSummary

WIDTH = 110
NOTHING = "-"
"""Stands for a value that is not known."""


def columns(rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), indent: int = 0) -> list[str]:
    """Lines in which the cells of each column stand under each other; ``right``: columns aligned at their right end."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(" " * indent + "  ".join(cells).rstrip())
    return lines


def named_values(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Names on the left, values on the right, wrapped where they are long."""
    width = max((len(name) for name, _ in rows), default=0)
    lines = []
    for name, value in rows:
        first = f"  {name:{width}}  "
        wrapped = textwrap.wrap(
            value,
            WIDTH,
            initial_indent=first,
            subsequent_indent=" " * len(first),
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += wrapped or [first.rstrip()]
    return lines


def format_bytes(number: float) -> str:
    """``531 B``, ``12.3 MB``: decimal units."""
    if number < 1000:
        return f"{number:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        number /= 1000
        if number < 999.5 or unit == "TB":
            break
    return f"{number:.1f} {unit}"


def format_time(time: datetime | None) -> str:
    """Local time to the minute."""
    return NOTHING if time is None else f"{time.astimezone():%Y-%m-%d %H:%M}"


def parse_time(text: str) -> datetime | None:
    """The time in ISO 8601 that a run's files hold; None if it is not one."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def format_step(step: int | None) -> str:
    """``12,000``."""
    return NOTHING if step is None else f"{step:,}"


def format_loss(loss: float | None) -> str:
    """``4.1234``."""
    return NOTHING if loss is None else f"{loss:.4f}"


def format_model(summary: RunSummary) -> str:
    """``lstm 1.30M``: the kind of model and how large it is."""
    if summary.model is None:
        return NOTHING
    return summary.model if not summary.num_parameters else f"{summary.model} {format_count(summary.num_parameters)}"


def format_ppl(summary: RunSummary) -> str:
    """The best validation perplexity, and per what it is."""
    if summary.word_ppl is not None:
        return f"{format_number(summary.word_ppl)} per word"
    return NOTHING if summary.token_ppl is None else f"{format_number(summary.token_ppl)} per token"
