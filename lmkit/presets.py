"""The YAML presets that ship with lmkit: which groups and names there are, and their one-line descriptions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

WORD_LEVEL = ("ptb", "wikitext2", "wikitext103")
"""Datasets whose default tokenizer is ``word``; that of all others is ``sentencepiece``."""


def config_dir() -> Path:
    """The folder of the presets: inside the installed package, or beside it in a source tree."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def groups_of(command: str) -> list[str]:
    """Groups that a command's configuration is composed of, in the order of its defaults list."""
    lines = (config_dir() / f"{command}.yaml").read_text(encoding="utf-8").splitlines()
    items = [line.strip()[2:] for line in lines if line.startswith("  - ")]
    return [item.partition(":")[0] for item in items if not item.startswith(("/", "_self_"))]


def default_of(command: str, group: str) -> str:
    """The preset of a group that a command takes by default; ``null`` for none."""
    text = (config_dir() / f"{command}.yaml").read_text(encoding="utf-8")
    return next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(f"  - {group}:"))


def names_in(group: str) -> list[str]:
    """Preset names of a group."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def description(path: Path) -> str:
    """The comment at the top of a preset."""
    comments = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            comments.append(line.lstrip("# "))
    return comments[0] if comments else ""


def nearest(word: str, known: Iterable[str]) -> str:
    """``did you mean a, b?``, or the list of what is known where nothing is near and the list is short."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    last = word.rpartition(".")[2]
    near += [k for k in known if k.rpartition(".")[2] == last and k not in near][: 3 - len(near)]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(known)}" if len(known) <= 16 else "see --help"
