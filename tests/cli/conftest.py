"""Stubs for the commands, so that the tests here see what reaches them and nothing is trained."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from lmkit import cli


class Commands:
    """Runs ``lmkit`` in this process; ``configs`` and ``prompts`` are what the commands were called with."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.configs: list[Any] = []
        self.prompts: list[list[str]] = []
        self.error: BaseException | None = None
        self.out = self.err = ""

    def __call__(self, *args: str) -> int:
        """The exit code; what was printed is in ``out`` and ``err``."""
        self.configs.clear()
        self.prompts.clear()
        code = cli.main(list(args))
        self.out, self.err = self._capsys.readouterr()
        return code

    def config(self, *args: str) -> Any:
        """The configuration that the command gets."""
        assert self(*args) == 0, self.err
        assert self.err == ""
        (config,) = self.configs
        return config

    def refused(self, *args: str) -> str:
        """The message of a usage error: one line, exit code 2, nothing run, nothing on standard output."""
        assert self(*args) == 2, self.err
        assert not self.configs
        assert self.out == ""
        assert self.err.startswith("error: ")
        assert self.err.count("\n") == 1
        return self.err.removeprefix("error: ").removesuffix("\n")


@pytest.fixture
def lmkit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    commands = Commands(capsys)

    def run(config: Any, prompts: list[str] | None = None) -> None:
        commands.configs.append(config)
        if prompts is not None:
            commands.prompts.append(prompts)
        if commands.error is not None:
            raise commands.error

    for name in cli.COMMANDS:
        module = types.ModuleType(f"lmkit.commands.{name.replace('-', '_')}")
        module.__dict__["run"] = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return commands
