"""Text of any kind made safe to stand in a page: escaped, and with a mark in place of what cannot be seen."""

from __future__ import annotations

import html
import json
import math
from typing import Any

NEWLINE, TAB, BLANK, EMPTY = "\u21b5", "\u21e5", "\u2423", "\u25aa"
HIDDEN = [
    *range(0x7F, 0xA0),  # delete and the C1 controls
    *(0xAD, 0x61C, 0x180E, 0x200B, 0x200E, 0x200F, 0xFEFF),  # soft hyphen, direction marks, zero width, byte order mark
    *range(0x2028, 0x202F),  # separators of lines and paragraphs, embedding and override of the direction
    *(*range(0x2060, 0x2065), *range(0x2066, 0x206A)),  # word joiner, invisible operators, isolates
]
"""Characters that would hide, reorder or break the text; the joiners are left, since scripts and emoji need them."""
MARKS = {
    **{code: chr(0x2400 + code) for code in range(0x20)},
    **{code: f"[U+{code:04X}]" for code in HIDDEN},
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),  # lone surrogates, which no encoding has
    ord("\n"): NEWLINE,
    ord("\t"): TAB,
}
RUNNING_MARKS = MARKS | {ord("\n"): NEWLINE + "\n", ord("\t"): TAB + "\t"}


def visible(text: str) -> str:
    """A token on its own, on one line; not yet escaped. Nothing but blanks, or nothing at all, gets a mark too."""
    return text.translate(MARKS) if text.strip(" ") else BLANK * len(text) or EMPTY


def escape(text: str) -> str:
    """Text as HTML, on one line."""
    return html.escape(text.translate(MARKS))


def running(text: str) -> str:
    """A token in the running text, as HTML: its blanks, tabs and line ends as they are, the latter two after a mark."""
    return html.escape(text.translate(RUNNING_MARKS)) or EMPTY


def as_json(value: Any) -> str:
    """JSON in ASCII that may stand inside a script element; numbers that are not finite become texts."""
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def for_people(value: Any) -> str:
    """A value that JSON can hold, as people write it; not yet escaped."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return ", ".join(f"{key}: {for_people(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(for_people, value)) or "none"
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
