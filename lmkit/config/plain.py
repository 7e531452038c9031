"""Configuration as plain JSON data and back, strictly. Nothing in the data selects code: names map through SCHEMAS."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

from lmkit.config import ROOTS, SCHEMAS
from lmkit.config.model import ModelConfig
from lmkit.errors import ConfigError

T = TypeVar("T")

NEWER = "if a newer lmkit has written it, update lmkit"
"""What to do about stored data that this version does not know."""
_KIND_OF = {cls: name for table in SCHEMAS.values() for name, cls in table.items()}


def kind_of(config: Any) -> str:
    """Schema name of a member of a group, e.g. ``transformer``."""
    return _KIND_OF[type(config)]


def to_plain(config: Any) -> dict[str, Any]:
    """Return ``config`` as JSON data; a member of a group carries its schema name under ``kind``."""
    plain: dict[str, Any] = {}
    if type(config) in _KIND_OF:
        plain["kind"] = _KIND_OF[type(config)]
    for f in dataclasses.fields(config):
        plain[f.name] = _value_to_plain(getattr(config, f.name))
    return plain


def _value_to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_plain(value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list | tuple):
        return [_value_to_plain(item) for item in value]
    return value


def from_plain(cls: type[T], data: Any, *, where: str = "config") -> T:
    """Build ``cls`` (or the member of its group that ``kind`` names) from JSON data.

    Raises ConfigError for an unknown kind or key and for a value of the wrong type, naming the place.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be an object, found {type(data).__name__}")
    data = dict(data)
    actual: type = cls
    candidates = {name: c for table in SCHEMAS.values() for name, c in table.items() if issubclass(c, cls)}
    if "kind" not in data and candidates and cls not in _KIND_OF:
        raise ConfigError(f"{where} lacks its kind", f"known: {', '.join(sorted(candidates))}")
    if "kind" in data:
        kind = data.pop("kind")
        if not isinstance(kind, str) or kind not in candidates:
            raise ConfigError(f"{where}.kind={kind!r} is unknown", f"known: {', '.join(sorted(candidates))}; {NEWER}")
        actual = candidates[kind]
    hints = typing.get_type_hints(actual)
    refuse_unknown(actual, data, where)
    missing = [f.name for f in dataclasses.fields(actual) if f.name not in data and _is_required(f)]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")
    values = {name: _value_from_plain(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    return typing.cast(T, actual(**values))


def refuse_unknown(cls: type, data: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for keys of stored data that are no fields of a dataclass."""
    unknown = sorted(set(data) - {f.name for f in dataclasses.fields(cls)})
    if unknown:
        raise ConfigError(f"{where} has unknown keys: {', '.join(unknown)}", NEWER)


def with_defaults(stored: dict[str, Any]) -> dict[str, Any]:
    """A run's stored configuration, with the fields that an older lmkit did not know yet at their defaults."""
    root = ROOTS[str(stored.get("command"))]
    hints: dict[str, Any] = typing.get_type_hints(root) | {"model": ModelConfig}
    filled = _with_missing(root, stored)
    for name, value in stored.items():
        if not isinstance(value, dict):
            continue
        actual = SCHEMAS.get(name, {}).get(value["kind"]) if "kind" in value else hints.get(name)
        if isinstance(actual, type) and dataclasses.is_dataclass(actual):
            filled[name] = _with_missing(actual, value)
    return filled


def _with_missing(cls: type, data: dict[str, Any]) -> dict[str, Any]:
    filled = dict(data)
    for field in dataclasses.fields(cls):
        if field.name not in data and not _is_required(field):
            made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            filled[field.name] = _value_to_plain(made)
    return filled


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value_from_plain(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None
        (hint,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
        origin = typing.get_origin(hint)
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list, found {type(value).__name__}")
        return [_value_from_plain(typing.get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast(type, hint), value, where=where)
    if isinstance(hint, type) and issubclass(hint, Enum):
        if not isinstance(value, str) or value not in hint.__members__:
            raise ConfigError(f"{where}={value!r} is unknown", f"known: {', '.join(hint.__members__)}; {NEWER}")
        return hint[value]
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023:
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where}={value!r} must be {hint.__name__}, found {type(value).__name__}")
    return value
