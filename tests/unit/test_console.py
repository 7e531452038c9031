from __future__ import annotations

import contextlib
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lmkit import console as console_module
from lmkit.console import Console, format_count, format_duration, format_number, plural, table_lines


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


class Full(io.StringIO):
    """A stream that nothing can be written to."""

    def write(self, text: str) -> int:
        raise BrokenPipeError("nobody reads")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds that the console sees, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


def test_a_log_gets_the_first_line_the_last_and_one_now_and_then(clock: list[float]) -> None:
    out = io.StringIO()
    with Console(out).progress(100, "train") as progress:
        for step in range(1, 101):
            clock[0] += 0.25
            progress.update(step, loss=f"{step}.5")
    lines = out.getvalue().splitlines()
    assert lines == [
        "train  1/100 1%  loss 1.5",
        "train  41/100 41%  eta 15 s  loss 41.5",
        "train  81/100 81%  eta 5 s  loss 81.5",
        "train  100/100 100%  loss 100.5",
    ]


def test_a_failed_job_still_shows_how_far_it_came(clock: list[float]) -> None:
    out = io.StringIO()
    with contextlib.suppress(ValueError), Console(out).progress(None, "count") as progress:
        progress.update(1)
        progress.update(5)
        raise ValueError("boom")
    assert out.getvalue().splitlines() == ["count  1", "count  5"]


def test_a_short_job_inside_another_is_silent_in_a_log_and_a_long_one_is_not(clock: list[float]) -> None:
    out = io.StringIO()
    console = Console(out)
    with console.progress(10, "train") as outer:
        outer.update(1)
        for seconds in (0.1, 6.0):
            with console.progress(3, "valid") as inner:
                for i in range(1, 4):
                    clock[0] += seconds
                    inner.update(i)
    assert out.getvalue().splitlines() == ["train  1/10 10%", "valid  2/3 66%  eta 6 s", "valid  3/3 100%"]


def test_the_caller_may_give_its_own_time_left(clock: list[float]) -> None:
    out = io.StringIO()
    with Console(out).progress(10, "train") as progress:
        progress.update(0)
        clock[0] += 11
        progress.update(5, eta="soon")
    assert "eta soon" in out.getvalue()


def test_a_terminal_has_one_live_line_that_goes_away(terminal: Terminal, clock: list[float]) -> None:
    console = Console(terminal)
    with console.progress(2000, "train") as progress:
        for step in range(0, 2001, 100):
            clock[0] += 0.2
            progress.update(step, loss="4.1", **{"tok/s": "12k"})
            if step == 1000:
                console.say("valid loss 4.2")
    text = terminal.getvalue()
    assert "1,200/2,000 60%" in text
    assert "tok/s" in text
    assert text.count("valid loss 4.2") == 1
    assert text.count("2,000 5%") == 0, "updates that come too fast are not drawn"
    assert text.endswith("\x1b[?25h\r\x1b[1A\x1b[2K"), "cursor shown, line erased"


def test_a_live_line_is_cropped_to_the_terminal(
    terminal: Terminal, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    with Console(terminal).progress(10, "train") as progress:
        progress.update(5, loss="1" * 50)
    drawn = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", terminal.getvalue()).split("\r")[:-1]
    assert {len(line.rstrip()) for line in drawn} == {40}
    assert drawn[0].endswith("1…")


def test_a_job_inside_another_takes_the_live_line_and_gives_it_back(terminal: Terminal, clock: list[float]) -> None:
    console = Console(terminal)
    with console.progress(10, "outer") as outer:
        outer.update(1)
        with console.progress(5, "inner") as inner:
            inner.update(3)
        assert "inner" in terminal.getvalue()
        assert terminal.getvalue().rindex("outer") > terminal.getvalue().rindex("inner")


def test_colours_follow_no_color_and_dumb_terminals_get_plain_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    Console(terminal).warn("careful")
    assert "\x1b[33mwarning: careful" in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    Console(plain).warn("careful")
    assert plain.getvalue() == "warning: careful\n"
    monkeypatch.setenv("TERM", "dumb")
    assert not Console(plain).is_terminal


def test_markup_in_the_text_is_text(terminal: Terminal) -> None:
    console = Console(terminal)
    console.warn("[red]x[/red] [/] :smile:")
    assert "[red]x[/red] [/] :smile:" in terminal.getvalue()


def test_a_table_aligns_numbers_right_and_other_values_left() -> None:
    lines = table_lines(
        "Result", [("word perplexity", "141.46"), ("tokens", "82,430"), ("run", "runs/ptb-1"), ("x", "-")]
    )
    assert lines == [
        "Result",
        "-------------------------------",
        "  word perplexity  141.46",
        "  tokens           82,430",
        "  run              runs/ptb-1",
        "  x                     -",
        "-------------------------------",
    ]
    assert table_lines("Nothing", []) == ["Nothing", "---------", "---------"]


def test_a_table_is_the_same_on_a_terminal_and_in_a_log(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    log = io.StringIO()
    rows = [("run", "runs/" + "long" * 40), ("loss", "1.5")]
    Console(log).table("Result", rows)
    Console(terminal).table("Result", rows)
    assert terminal.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "") == log.getvalue()


def test_what_the_stream_cannot_show_is_replaced() -> None:
    raw = io.BytesIO()
    console = Console(io.TextIOWrapper(raw, encoding="ascii"))
    console.say("naïve 我 \ud800")
    assert raw.getvalue() == b"na?ve ? ?\n"


@pytest.mark.parametrize("closed", [True, False])
def test_a_closed_or_broken_stream_stops_nothing(closed: bool) -> None:
    stream = io.StringIO() if closed else Full()
    console = Console(stream)
    if closed:
        stream.close()
    console.say("a")
    console.table("b", [("c", "d")])
    with console.progress(2, "e") as progress:
        progress.update(1)


@pytest.mark.skipif(sys.platform == "win32", reason="needs sh")
@pytest.mark.parametrize("redirection", ["", "2>&-", "2>/dev/full", "2>broken pipe"])
def test_a_process_without_a_reader_ends_as_if_there_were_one(redirection: str) -> None:
    if "full" in redirection and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    code = """
import sys
from lmkit.console import Console
console = Console()
for i in range(20):
    console.say("\\u00e9" * 5000)
with console.progress(3, "x") as progress:
    progress.update(1)
sys.exit(5)
"""
    reader, writer = os.pipe()
    os.close(reader)
    shell = f'exec "$0" -c "$1" {redirection if "pipe" not in redirection else ""}'
    command = ["sh", "-c", shell, sys.executable, code]
    where = writer if "pipe" in redirection else subprocess.DEVNULL
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, env=environment, stderr=where, cwd=Path(__file__).parents[2])
    os.close(writer)
    assert done.returncode == 5


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (12345, "12,345"),
        (99_999, "99,999"),
        (100_000, "100.0k"),
        (999_949, "1.00M"),
        (1_210_000, "1.21M"),
        (4.2e9, "4.20B"),
        (5e15, "5000.00T"),
        (-123_456, "-123.5k"),
    ],
)
def test_counts_are_short(number: float, text: str) -> None:
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.254, "0.25 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1m 00s"),
        (185, "3m 05s"),
        (3600, "1h 00m"),
        (7620, "2h 07m"),
        (273_600, "3d 04h"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (82430, "82,430"),
        (148.414, "148.41"),
        (5.00004, "5.0000"),
        (0.0123, "0.0123"),
        (1.2e-5, "1.2e-05"),
        (12345.67, "12,345.7"),
        (0.0, "0.0000"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (2.5e9, "2.5e+09"),
    ],
)
def test_numbers_keep_the_digits_that_matter(number: float, text: str) -> None:
    assert format_number(number) == text


def test_one_of_a_thing_is_no_plural() -> None:
    assert [plural(number, "step") for number in (0, 1, 2, 1234)] == ["0 steps", "1 step", "2 steps", "1,234 steps"]
