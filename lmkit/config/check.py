"""Gate two of the configuration: relations and ranges, all problems reported in one message."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, fields
from types import TracebackType
from typing import Any

from lmkit.config.text import format_value
from lmkit.errors import ConfigError


class Problems:
    """Collects failed checks and raises one ConfigError that lists them all.

    >>> with Problems() as check:
    ...     check(lr > 0, "optimizer.lr", lr, "must be > 0")
    """

    def __init__(self) -> None:
        self.found: list[str] = []

    def __call__(self, ok: bool, key: str, value: object, rule: str) -> None:
        """Note that ``key`` with ``value`` breaks ``rule`` unless ``ok``. NaN fails every comparison, as it should."""
        if not ok:
            self.found.append(f"{key}={format_value(value)} {rule}")

    def unused(self, section: str, config: Any, names: Sequence[str], rule: str) -> None:
        """Note each of these keys of a section that is not at its default, since it would do nothing."""
        known = {field.name: field for field in fields(config)}
        for name in names:
            value, field = getattr(config, name), known[name]
            default = field.default if field.default_factory is MISSING else field.default_factory()
            self(value == default, f"{section}.{name}", value, rule)

    def at_least(self, least: int, section: str, config: Any, *names: str, or_null: bool = False) -> None:
        """Note each of these keys of a section ("": of the command itself) that is below ``least``."""
        rule = f"must be >= {least}{' or null' if or_null else ''}"
        for name in names:
            value, key = getattr(config, name), f"{section}.{name}".removeprefix(".")
            self((or_null and value is None) or value >= least, key, value, rule)

    def below_one(self, section: str, config: Any, *names: str) -> None:
        """Note each of these keys of a section that is not at least 0 and below 1."""
        for name in names:
            value = getattr(config, name)
            self(0 <= value < 1, f"{section}.{name}", value, "must be at least 0 and below 1")

    def positive(self, section: str, config: Any, *names: str) -> None:
        """Note each of these keys of a section that is not above 0 and finite."""
        for name in names:
            value = getattr(config, name)
            self(0 < value < math.inf, f"{section}.{name}", value, "must be > 0 and finite")

    def not_negative(self, section: str, config: Any, *names: str) -> None:
        """Note each of these keys of a section that is not at least 0 and finite."""
        for name in names:
            value = getattr(config, name)
            self(0 <= value < math.inf, f"{section}.{name}", value, "must be >= 0 and finite")

    def __enter__(self) -> Problems:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.found:
            raise ConfigError("; ".join(self.found))


def check_cutoffs(check: Problems, key: str, cutoffs: list[int]) -> None:
    """Cutoffs of an adaptive softmax: positive and rising."""
    rising = all(a < b for a, b in zip([0, *cutoffs], cutoffs, strict=False))
    check(rising, key, cutoffs, "must be positive and rising, e.g. [2000, 10000]")
