"""The keys of a command, read off its dataclasses: names, types and help. Nothing is composed."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from lmkit.config import ROOTS, SCHEMAS
from lmkit.presets import chosen, groups_of, names_in, schema_name


def keys_of(command: str, groups: Mapping[str, str]) -> dict[str, Any]:
    """Dotted key -> type, for the presets that the command takes once ``groups`` are chosen."""
    presets = chosen(command, groups)
    return {key: hint for key, hint, _ in _walk(ROOTS[command], "", lambda group: _schemas(group, [presets[group]]))}


@functools.cache
def every_key(command: str) -> Mapping[str, Any]:
    """Dotted key -> type, with whatever presets."""
    return {key: hint for key, hint, _ in _walk(ROOTS[command], "", lambda group: _schemas(group, names_in(group)))}


def owners_of(command: str, key: str) -> list[type]:
    """The dataclasses that a key is a field of: several, where presets of a group each have it."""
    walked = _walk(ROOTS[command], "", lambda group: _schemas(group, names_in(group)))
    return list(dict.fromkeys(owner for name, _, owner in walked if name == key))


def flags_of(command: str) -> set[str]:
    """Keys that are true or false, with whatever presets."""
    return {key for key, hint in every_key(command).items() if hint is bool}


def presets_with(command: str, key: str) -> list[str]:
    """``group=name`` for every preset that has a key."""
    group, _, name = key.partition(".")
    if group not in groups_of(command) or group not in SCHEMAS:
        return []
    return [f"{group}={preset}" for preset in names_in(group) if name in dict(_fields(_schemas(group, [preset])))]


def _schemas(group: str, presets: Sequence[str]) -> list[type]:
    names = [schema_name(group, preset) for preset in presets if preset in names_in(group)]
    return [SCHEMAS[group][name] for name in dict.fromkeys(names) if name is not None]


def _fields(classes: Sequence[type]) -> Iterator[tuple[str, Any]]:
    for cls in classes:
        yield from ((name, hint) for name, hint, _ in _walk(cls, "", lambda group: []))


def _walk(cls: type, prefix: str, members: Callable[[str], Sequence[type]]) -> Iterator[tuple[str, Any, type]]:
    """Dotted key, type, and the dataclass that it is a field of."""
    for name, hint in _hints(cls).items():
        inner = next((part for part in _parts(hint) if dataclasses.is_dataclass(part)), None)
        if inner is None:
            yield f"{prefix}{name}", hint, cls
        elif name in SCHEMAS and not prefix:
            for member in members(name):
                yield from _walk(member, f"{name}.", members)
        else:
            yield from _walk(typing.cast(type, inner), f"{prefix}{name}.", members)


_hints = functools.cache(typing.get_type_hints)


def _parts(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def choices(hint: Any) -> list[str]:
    """The values that a type allows, where they can be listed."""
    for part in _parts(hint):
        if isinstance(part, type) and issubclass(part, Enum):
            return list(part.__members__)
        if part is bool:
            return ["true", "false"]
    return []


def type_text(hint: Any) -> str:
    """A type for people: ``int or null``, ``true or false``, ``relu, gelu or silu``."""
    null = " or null" if type(None) in _parts(hint) else ""
    if names := choices(hint):
        return " or ".join([", ".join(names[:-1]), names[-1]] if not null else [", ".join(names), "null"])
    kind = next(part for part in _parts(hint) if part is not type(None))
    if typing.get_origin(kind) is list:
        return f"list of {type_text(typing.get_args(kind)[0])}{null}"
    return ("text" if kind is str else kind.__name__) + null


@functools.cache
def field_docs(cls: type) -> Mapping[str, str]:
    """The line of text under each field of a dataclass, its bases included."""
    import ast
    import inspect
    import textwrap

    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        previous: ast.stmt | None = None
        for node in body.body if isinstance(body, ast.ClassDef) else []:
            text = node.value.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) else None
            if text is not None and isinstance(previous, ast.AnnAssign) and isinstance(previous.target, ast.Name):
                docs[previous.target.id] = " ".join(str(text).split())
            previous = node
    return docs
