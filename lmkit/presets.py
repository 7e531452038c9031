"""The YAML presets that ship with lmkit: which groups and names there are, and their one-line descriptions."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

WORD_LEVEL = ("ptb", "wikitext2", "wikitext103")
"""Datasets whose default tokenizer is ``word``; that of all others is ``sentencepiece``."""


def config_dir() -> Path:
    """The folder of the presets: inside the installed package, or beside it in a source tree."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


@functools.cache
def _text(name: str) -> str:
    return (config_dir() / f"{name}.yaml").read_text(encoding="utf-8")


def groups_of(command: str) -> list[str]:
    """Groups that a command's configuration is composed of, in the order of its defaults list."""
    return re.findall(r"^  - (\w+): ", _text(command), re.MULTILINE)


def default_of(command: str, group: str) -> str:
    """The preset of a group that a command takes by default; ``null`` for none."""
    defaults: dict[str, str] = dict(re.findall(r"^  - (\w+): (\w+)", _text(command), re.MULTILINE))
    return defaults[group]


@functools.cache
def names_in(group: str) -> list[str]:
    """Preset names of a group."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def preset_name(group: str, text: str) -> str:
    """The preset that a text names, which may have dashes for its underscores; the text itself if it names none."""
    plain = text.replace("-", "_")
    return plain if plain in names_in(group) else text


def description(group: str, name: str) -> str:
    """The comment at the top of a preset."""
    lines = [line for line in _text(f"{group}/{name}").splitlines() if "@package" not in line]
    return lines[0].removeprefix("#").strip() if lines[0].startswith("#") else ""


def schema_name(group: str, name: str) -> str | None:
    """Name of the schema that a preset gives values to; None for a recipe, which has none of its own."""
    found = re.search(rf"^  - /schema/{group}@_here_: (\w+)$", _text(f"{group}/{name}"), re.MULTILINE)
    return found[1] if found else None


def chosen(command: str, groups: Mapping[str, str]) -> dict[str, str]:
    """The preset of every group of a command: the default, then the recipe's choice, then that of ``groups``.

    Where neither the recipe nor ``groups`` names a tokenizer, the dataset decides.
    """
    presets = {group: default_of(command, group) for group in groups_of(command)}
    recipe = groups.get("recipe", "null")
    named = {**(recipe_choices(recipe) if recipe in names_in("recipe") else {}), **groups}
    presets.update(named)
    if "tokenizer" in presets and "tokenizer" not in named and presets["dataset"] in WORD_LEVEL:
        presets["tokenizer"] = "word"
    return presets


def recipe_choices(recipe: str) -> dict[str, str]:
    """Group -> preset that a recipe chooses."""
    return dict(re.findall(r"^  - override /(\w+): (\w+)", _text(f"recipe/{recipe}"), re.MULTILINE))


def nearest(word: str, known: Iterable[str]) -> str:
    """``did you mean a or b?``, or the list of what is known where nothing is near and the list is short.

    Options are compared by their names, and shown as they are written.
    """
    spelt = {_plain(k): k for k in sorted(known)}
    word = _plain(word)
    near = [*difflib.get_close_matches(word, spelt, n=3, cutoff=0.6)]
    if near:
        best = _likeness(word, near[0])
        near = [k for k in near if _likeness(word, k) > best - 0.1]
    last = word.rpartition(".")[2]
    near += [k for k in spelt if k.rpartition(".")[2] == last and k not in near][: 3 - len(near)]
    if near:
        return f"did you mean {' or '.join(spelt[k] for k in near)}?"
    return f"choose from {', '.join(spelt.values())}" if len(spelt) <= 16 else "see --help"


def _plain(name: str) -> str:
    return name.removeprefix("--").replace("-", "_") if name.startswith("--") else name


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()
