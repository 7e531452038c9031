"""``lmkit explain KEY``: what a key or a group is, where it can be set, and what it is where nothing is said.

Everything is read off the dataclasses and the presets; nothing is composed.
"""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmkit.arguments import ALIASES
from lmkit.composing import MISSING, values_in
from lmkit.config import ROOTS, SCHEMAS
from lmkit.config.text import flatten, format_value
from lmkit.errors import ConfigError
from lmkit.help import NOT_GIVEN, WIDTH
from lmkit.keys import every_key, field_docs, owners_of, presets_with, type_text
from lmkit.presets import (
    default_of,
    description,
    groups_of,
    names_in,
    nearest,
    preset_name,
    recipe_choices,
    schema_name,
)

_MISSING = object()


def explain(word: str, command: str | None = None) -> str:
    """Text about a key, a group, a preset (``group=name``) or a part (``train``), in all commands or in one.

    Raises ConfigError with what may have been meant.
    """
    if command is not None and command not in ROOTS:
        raise ConfigError(f"unknown command {command!r}", nearest(command, ROOTS))
    commands = list(ROOTS) if command is None else [command]
    name, equals, value = word.partition("=")
    name = ALIASES.get(name, name) if equals else name  # run=DIR is a key; run alone is a part, which has more
    having = [c for c in commands if name in groups_of(c)]
    if having and equals:
        return _preset_text(name, preset_name(name, value), having)
    if having:
        keyed = [c for c in commands if c not in having and name in every_key(c)]  # adapter, which is a folder there
        return "\n\n".join([_group_text(name, having), *([_key_text(name, keyed)] if keyed else [])])
    having = [c for c in commands if name in every_key(c)]
    if having:
        return _key_text(name, having)
    inside = {key: c for c in reversed(commands) for key in every_key(c) if key.startswith(f"{name}.")}
    if inside:
        return _part_text(name, inside, [c for c in commands if any(k.startswith(f"{name}.") for k in every_key(c))])
    where = "" if command is None else f" of {command}"
    known = {key for c in commands for key in (*every_key(c), *groups_of(c))}
    raise ConfigError(f"{name!r} is no key or group{where}", nearest(name, known))


def _key_text(key: str, commands: Sequence[str]) -> str:
    """Type, meaning, default, commands, and who sets it."""
    hint = next(every_key(c)[key] for c in commands)
    lines = [f"{key}   [{type_text(hint)}]"]
    docs = [_doc(owner, key) for c in commands for owner in owners_of(c, key)]
    for doc in dict.fromkeys(docs):
        lines += textwrap.wrap(doc, WIDTH, initial_indent="  ", subsequent_indent="  ")
    lines += [f"  {short}=VALUE is short for it" for short, long in ALIASES.items() if long == key]
    lines += ["", f"commands: {', '.join(commands)}"]
    presets = presets_with(commands[0], key)
    if presets:
        values = {preset: _preset_value(key, preset) for preset in presets}
        if len(set(values.values())) == 1:
            lines.append(f"default: {next(iter(values.values()))}")
            lines += _listed("presets that have it: ", presets)
        else:
            width = max(map(len, presets))
            lines += ["default:", *(f"  {preset:<{width}}  {shown}" for preset, shown in values.items())]
    else:
        defaults = {c: _root_value(c, key) for c in commands}
        if len(set(defaults.values())) == 1:
            lines.append(f"default: {defaults[commands[0]]}")
        else:
            lines.append(f"default: {', '.join(f'{value} ({c})' for c, value in defaults.items())}")
    recipes = list(_recipes_with(key)) if any("recipe" in groups_of(c) for c in commands) else []
    return "\n".join([*lines, *_listed("set by: ", recipes)])


def _group_text(group: str, commands: Sequence[str]) -> str:
    """Choices, defaults and keys."""
    doc = next((field_docs(ROOTS[c]).get(group, "") for c in commands), "")
    lines = [f"{group}   [a group: {group}=NAME]", *([f"  {doc}"] if doc else []), ""]
    defaults = {c: default_of(c, group).replace("null", "none") for c in commands}
    lines += [f"default: {', '.join(f'{name} ({c})' for c, name in defaults.items())}", "", "choices:"]
    width = max(map(len, names_in(group)), default=0)
    for name in names_in(group):
        indent = " " * (width + 4)
        lines += textwrap.wrap(f"  {name:<{width}}  {description(group, name)}", WIDTH, subsequent_indent=indent)
    keys = sorted({key for c in commands for key in every_key(c) if key.startswith(f"{group}.")})
    return "\n".join([*lines, *([""] if keys else []), *_listed("keys: ", keys)])


def _preset_text(group: str, name: str, commands: Sequence[str]) -> str:
    """What one preset is, with the values of its keys; of a recipe, what it chooses and sets."""
    if name not in names_in(group):
        raise ConfigError(f"{group}={name} is unknown", nearest(name, names_in(group)))
    lines = [f"{group}={name}", f"  {description(group, name)}", "", f"commands: {', '.join(commands)}", ""]
    if schema_name(group, name) is None:
        chosen = recipe_choices(name) if group == "recipe" else {}
        pairs = [*chosen.items(), *flatten(values_in(f"{group}/{name}"))]
        return "\n".join([*lines, *(f"  {key}={_shown(value)}" for key, value in pairs)])
    keys = [k for k in every_key(commands[0]) if k.startswith(f"{group}.")]
    keys = [k for k in keys if f"{group}={name}" in presets_with(commands[0], k)]
    return "\n".join([*lines, *(f"  {key}={_preset_value(key, f'{group}={name}')}" for key in keys)])


def _part_text(part: str, keys: Mapping[str, str], commands: Sequence[str]) -> str:
    """What a part of the configuration is, in each command, and its keys, one a line, with their text."""
    lines = [f"{part}   [a part of the configuration of {', '.join(commands)}]"]
    docs = {c: field_docs(ROOTS[c]).get(part, "").replace("``", "") for c in commands}
    shared = len(set(docs.values())) == 1
    said = [docs[commands[0]]] if shared else [f"{c}: {doc}" for c, doc in docs.items()]
    short = ALIASES.get(part, "")
    said += [f"{part}=VALUE is short for {short}=VALUE{_of_some(short, commands)}"] if short in keys else []
    for text in filter(None, said):
        lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
    lines.append("")
    width = max(map(len, keys))
    for key in sorted(keys):
        doc = next((_doc(owner, key) for owner in owners_of(keys[key], key)), "") + _of_some(key, commands)
        lines += textwrap.wrap(f"  {key:<{width}}  {doc}", WIDTH, subsequent_indent=" " * (width + 4))
    return "\n".join(lines)


def _of_some(key: str, commands: Sequence[str]) -> str:
    """The commands that have a key, in brackets, where not all of these have it."""
    having = [c for c in commands if key in every_key(c)]
    return "" if len(having) == len(commands) else f" ({', '.join(having)})"


def _listed(title: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return textwrap.wrap(title + ", ".join(names), WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _doc(owner: type, key: str) -> str:
    return field_docs(owner).get(key.rpartition(".")[2], "").replace("``", "")


# Values


def _inside(data: Any, path: Sequence[str]) -> Any:
    for part in path:
        if not isinstance(data, dict) or part not in data:
            return _MISSING
        data = data[part]
    return data


def _preset_value(key: str, preset: str) -> str:
    """What a key is in a preset: as written there, else its class's default."""
    group, _, name = preset.partition("=")
    path = key.split(".")[1:]
    value = _inside(values_in(f"{group}/{name}"), path)
    if value is _MISSING:
        value = _default(SCHEMAS[group][schema_name(group, name) or ""], path)
    return _shown(value)


def _root_value(command: str, key: str) -> str:
    value = _inside(values_in(command), key.split("."))
    return _shown(_default(ROOTS[command], key.split(".")) if value is _MISSING else value)


def _default(cls: type, path: Sequence[str]) -> Any:
    """The default of a field, looked for in the dataclasses inside ``cls`` along a path."""
    field = next((f for f in dataclasses.fields(cls) if f.name == path[0]), None)
    if field is None:
        return _MISSING
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        hint = typing.get_type_hints(cls)[path[0]]
        inner = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        return _default(hint, path[1:]) if len(path) > 1 and inner else _MISSING
    for part in path[1:]:
        value = getattr(value, part)
    return value


def _recipes_with(key: str) -> Iterator[str]:
    for name in names_in("recipe"):
        value = _inside(values_in(f"recipe/{name}"), key.split("."))
        if value is not _MISSING:
            yield f"recipe={name} ({_shown(value)})"


def _shown(value: Any) -> str:
    return NOT_GIVEN if value in (_MISSING, MISSING) else format_value(value)


def explain_words(words: Sequence[str]) -> str:
    """The words after ``lmkit explain``. Raises ConfigError."""
    if not words or words[0] in ("-h", "--help"):
        return "\n".join(
            [
                "lmkit explain: what a key or group is, its default, and which commands and presets have it",
                "",
                "usage: lmkit explain KEY [COMMAND]",
                "",
                "  lmkit explain train.budget        a key",
                "  lmkit explain optimizer           a group and its choices",
                "  lmkit explain optimizer=muon      a preset and its values",
                "  lmkit explain train pretrain      all keys of a part, of one command",
                "  lmkit explain run                 the same of all commands",
            ]
        )
    if len(words) > 2:
        raise ConfigError(f"{words[2]!r} is too much", "write lmkit explain KEY [COMMAND]")
    return explain(*words)
