"""What the pages of ``eval-ppl`` and ``runs report`` share: their frame, and how any text is made safe to stand in one.

It is escaped, and has a mark in place of what cannot be seen.
"""

from __future__ import annotations

import html
import json
import math
from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
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
FOOTER = "</main>\n<footer>Written by lmkit. One file that loads nothing else.</footer>"


def page_start(title: str, style: str, script: str = "") -> str:
    """A page up to the opening of its body, with a policy that allows this style and script and nothing else."""
    policy = f"default-src 'none'; style-src '{_source(style)}'"
    policy += f"; script-src '{_source(script)}'" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>"
    )


def _source(content: str) -> str:
    """How a Content-Security-Policy names an element by what is in it."""
    return "sha256-" + b64encode(sha256(content.encode()).digest()).decode()


def pairs(heading: str, id: str, rows: Iterable[tuple[str, str]]) -> str:
    """A section with a table of names and values; nothing if there are none."""
    cells = "\n".join(f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in rows)
    if not cells:
        return ""
    return f'<section><h2>{heading}</h2><table class="pairs" id="{id}"><tbody>\n{cells}\n</tbody></table></section>'


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
