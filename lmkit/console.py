"""What people see on a terminal or in a log: lines, warnings, tables, one live progress line.

Everything goes to one stream, standard error by default, so that standard output stays free for results. On a terminal
rich draws; anywhere else plain lines of ASCII come out, few enough for a log. A stream that was closed, is full or
cannot show a character never stops a run.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.live import Live
    from rich.text import Text

LIVE_INTERVAL_S = 0.25
PLAIN_INTERVAL_S = 10.0


class Console:
    """Writes for people. ``stream`` None means the standard error of the process, wherever it points then.

    A ``silent`` one shows nothing: that of all processes of a job but the first.
    """

    def __init__(self, stream: TextIO | None = None, *, silent: bool = False) -> None:
        self._out = _Stream(stream, silent=silent)
        self.is_terminal = self._out.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
        self._bars: list[Progress] = []
        self._rich_console: RichConsole | None = None
        self._live: Live | None = None

    def say(self, text: str = "") -> None:
        """One line."""
        self._print(text)

    def warn(self, text: str) -> None:
        """One line that stands out."""
        self._print(f"warning: {text}", style="yellow")

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Names on the left, values on the right; numbers are aligned at their right end, other values at the left."""
        lines = table_lines(title, rows)
        self._print("")
        self._print(lines[0], style="bold")
        for line in lines[1:]:
            self._print(line)

    def progress(self, total: int | None, label: str) -> Progress:
        """A context manager whose ``update`` shows how far a job of ``total`` units (None: unknown) has come.

        One inside another takes over the live line until it ends; in a log it is silent unless it takes long.
        """
        return Progress(self, total, label)

    def _print(self, text: str, style: str | None = None) -> None:
        if not self.is_terminal or (style is None and self._live is None):
            self._out.write(text + "\n")
            self._out.flush()
            return
        from rich.text import Text

        self._rich().print(Text(text, style=style or ""), soft_wrap=True)

    def _rich(self) -> RichConsole:
        if self._rich_console is None:
            from rich.console import Console as RichConsole

            self._rich_console = RichConsole(file=cast(IO[str], self._out), highlight=False, force_terminal=True)
        return self._rich_console

    def _push(self, bar: Progress) -> None:
        self._bars.append(bar)

    def _pop(self, bar: Progress) -> None:
        self._bars.remove(bar)
        if self._live is None:
            return
        if self._bars:
            self._draw(self._bars[-1].live_text())
        else:
            self._live.stop()
            self._live = None

    def _draw(self, text: Text) -> None:
        """Replace the live line."""
        if self._live is None:
            from rich.live import Live

            self._live = Live(console=self._rich(), auto_refresh=False, transient=True, redirect_stdout=False)
            self._live.start()
        self._live.update(text, refresh=True)


class Progress:
    """One progress line: label, bar, done/total, the caller's fields, time left. Made by ``Console.progress``."""

    BAR_WIDTH = 20

    def __init__(self, console: Console, total: int | None, label: str) -> None:
        self.total, self.label = total, label
        self._console = console
        self._done = 0
        self._fields: dict[str, str] = {}
        self._start_s = self._shown_s = time.monotonic()
        self._start_done: int | None = None
        self._shown_done: int | None = None
        self._nested = False

    def __enter__(self) -> Progress:
        self._nested = bool(self._console._bars)
        self._console._push(self)
        self._start_s = self._shown_s = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._console._pop(self)
        shown_any = self._shown_done is not None
        unseen = self._start_done is not None and self._shown_done != self._done
        if unseen and (shown_any or not self._nested) and not self._console.is_terminal:
            self._show_plain(time.monotonic())

    def update(self, done: int, **fields: str) -> None:
        """``done`` units are done; ``fields`` are shown as ``name value``. Most calls only remember this."""
        now = time.monotonic()
        self._done, self._fields = done, fields
        first = self._start_done is None
        if self._start_done is None:
            self._start_done, self._start_s = done, now
        if self._console.is_terminal:
            if first or now - self._shown_s >= LIVE_INTERVAL_S:
                self._shown_s = now
                self._console._draw(self.live_text())
        elif (first and not self._nested) or now - self._shown_s >= PLAIN_INTERVAL_S:
            self._show_plain(now)

    def _show_plain(self, now: float) -> None:
        self._shown_s, self._shown_done = now, self._done
        parts = [self.label, self._amount(), *(f"{name} {value}" for name, value in self._all_fields().items())]
        self._console.say("  ".join(part for part in parts if part))

    def live_text(self) -> Text:
        """The line for a terminal; cropped, never wrapped."""
        from rich.text import Text

        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(f"{self.label} ", style="bold")
        if self.total:
            share = min(max(self._done / self.total, 0.0), 1.0)
            full, rest = ("#", "-") if self._console._out.ascii_only else ("━", "━")
            width = min(self.BAR_WIDTH, self._console._rich().width // 8)
            num_full = round(share * width)
            line.append(full * num_full, style="green")
            line.append(rest * (width - num_full) + " ", style="bright_black")
        line.append(self._amount())
        for name, value in self._all_fields().items():
            line.append(f"  {name} ", style="bright_black")
            line.append(value, style="cyan")
        return line

    def _amount(self) -> str:
        if not self.total:
            return format_count(self._done)
        return f"{format_count(self._done)}/{format_count(self.total)} {100 * self._done // self.total}%"

    def _all_fields(self) -> dict[str, str]:
        if "eta" in self._fields or not self.total or self._start_done is None:
            return self._fields
        gained = self._done - self._start_done
        if gained <= 0 or self._done >= self.total:
            return self._fields
        left_s = (time.monotonic() - self._start_s) / gained * (self.total - self._done)
        return {"eta": format_duration(math.ceil(left_s)), **self._fields}


class _Stream(io.TextIOBase):
    """A text stream that replaces what it cannot encode, and falls silent for good when it cannot write."""

    def __init__(self, stream: TextIO | None, *, silent: bool) -> None:
        self._target: TextIO | None = None if silent else sys.stderr if stream is None else stream
        self._encoding = (getattr(self._target, "encoding", None) or "utf-8").lower()
        self.ascii_only = not self._encoding.replace("-", "").startswith("utf")

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        try:
            return self._target is not None and self._target.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        if self._target is None:
            raise OSError("the stream is closed")
        return self._target.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        safe = text.encode(self._encoding, "replace").decode(self._encoding, "replace")
        self._guarded(lambda target: target.write(safe))
        return len(text)

    def flush(self) -> None:
        self._guarded(lambda target: target.flush())

    def _guarded(self, action: Callable[[TextIO], Any]) -> None:
        if self._target is None:
            return
        try:
            action(self._target)
        except (OSError, ValueError):
            _discard_pending(self._target)
            self._target = None


def _discard_pending(stream: TextIO) -> None:
    """Point a broken standard error at nothing, so that the flush at exit does not fail (exit code 120)."""
    if stream not in (sys.stderr, sys.__stderr__):
        return
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


def table_lines(title: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    """The lines of ``Console.table``: title, rule, one line a row, rule."""
    name_width = max((len(name) for name, _ in rows), default=0)
    number_width = max((len(value) for _, value in rows if _is_number(value)), default=0)
    body = []
    for name, value in rows:
        shown = value.rjust(number_width) if _is_number(value) else value
        body.append(f"  {name.ljust(name_width)}  {shown}".rstrip())
    rule = "-" * min(max(map(len, [title, *body])) + 2, 80)
    return [title, rule, *body, rule]


def _is_number(value: str) -> bool:
    """Whether ``value`` begins like a number and is at most a number with a unit: ``12.3``, ``-``, ``1,234 tok/s``."""
    text = value.lstrip("+-~<> ")
    return len(value) <= 20 and (value == "-" or text[:1].isdigit() or text in ("nan", "inf"))


def plural(number: int, noun: str) -> str:
    """``1 step``, ``2 steps``, ``1,234 steps``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_count(number: float) -> str:
    """``1,234``, from 100,000 on in three or four digits with k, M, B or T: ``123.5k``, ``1.21M``."""
    if abs(number) < 99_999.5:
        return f"{number:,.0f}"
    for factor, unit in ((1e3, "k"), (1e6, "M"), (1e9, "B"), (1e12, "T")):
        scaled = number / factor
        if abs(scaled) < 999.5 or unit == "T":
            break
    return f"{scaled:.1f}{unit}" if unit == "k" else f"{scaled:.2f}{unit}"


def format_duration(seconds: float) -> str:
    """``0.25 s``, ``42 s``, ``3m 05s``, ``2h 07m``, ``3d 04h``; ``?`` if it is not finite."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def format_number(number: float) -> str:
    """Four or five digits that matter: ``148.41``, ``0.0123``, ``1.2e-05``, ``12,345``."""
    if isinstance(number, int):
        return f"{number:,}"
    if not math.isfinite(number):
        return str(number)
    size = abs(number)
    if size >= 1e9 or 0 < size < 1e-3:
        return f"{number:.3g}"
    if size >= 1000:
        return f"{number:,.1f}"
    return f"{number:.2f}" if size >= 10 else f"{number:.4f}"
