"""Threads that wait for each other sleep, sooner or later by command, unless the user says otherwise."""

from __future__ import annotations

import os

import pytest

from lmkit.cli import main


@pytest.mark.parametrize(
    ("command", "given", "expected"),
    [
        ("pretrain", {}, "1000"),
        ("generate", {}, "10000"),
        ("generate", {"GOMP_SPINCOUNT": "5"}, "5"),
        ("pretrain", {"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_spinning_is_cut_short_where_the_environment_does_not_speak_of_it(
    command: str,
    given: dict[str, str],
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        # set first, so that it is put back afterwards also where main sets it
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main([command, "--help"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == expected
