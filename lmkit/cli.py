"""The command line: what is asked for is answered or run, and errors become one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmkit.errors import ConfigError
from lmkit.reporting import (
    discard_stdout,
    interrupted_at_once,
    open_missing_streams,
    reader_is_gone,
    report,
    said_by_first,
    show,
)

if TYPE_CHECKING:
    from lmkit.arguments import Line

COMMANDS = {
    "prepare": "read, clean and tokenize a corpus once, into the cache",
    "pretrain": "train a model from scratch; prepares what is missing",
    "finetune": "teach a run more text or a task: instructions, preferences, labels, numbers",
    "eval-ppl": "perplexity of a run over every token of a split",
    "generate": "continue a prompt",
    "export": "write a run for other programs: transformers, llama.cpp, ONNX",
}
RUNS = "runs"
"""The command that has no presets: it looks at what the others have left."""
RUNS_TEXT = "list, show, compare, draw, report on, verify, pin and remove runs"
EXPLAIN = "explain"
EXPLAIN_TEXT = "what a key or group is, its default, and where it can be set"
OPTIONS = ("--help", "--version", "--completion")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and never raises for the user's mistakes."""
    open_missing_streams()
    args = list(sys.argv[1:] if argv is None else argv)
    command, debug = args[0] if args else "", False
    limit_spinning(command)
    try:
        with said_by_first():
            if _answered(args):
                code = 0
            elif command == RUNS:
                from lmkit.runs_line import execute, parse_runs

                config = parse_runs(args[1:])
                debug = config.debug
                execute(config)
                code = 0
            else:
                with interrupted_at_once():
                    from lmkit.arguments import parse

                    line = parse(command, args[1:])
                debug = line.values.get("debug", "").lower() in ("true", "yes", "on", "y", "1")
                code = _run(line)
        sys.stdout.flush()
        _leave_job(code)
        return code
    except SystemExit as error:
        _leave_job(error.code)
        raise
    except (Exception, KeyboardInterrupt) as error:
        nobody_reads = isinstance(error, BrokenPipeError) and reader_is_gone()
        discard_stdout()
        code = 0 if nobody_reads else report(error, command, debug=debug)
        _leave_job(code)
        return code


def _leave_job(code: object) -> None:
    """Where several processes train together, and this one leaves them in the middle, end it."""
    distributed = sys.modules.get("lmkit.distributed")  # imported by the commands that train
    if distributed is not None and isinstance(code, int):
        distributed.leave(code)


def limit_spinning(command: str) -> None:
    """Have GNU OpenMP's threads sleep soon while they wait for each other; must come before torch is imported.

    By default they spin for a long time, and where another program holds one of the cores, a spinning thread keeps the
    one that it waits for from running: training was 3 to 6 times slower beside a single busy process than so. In
    ``generate`` threads wait for each other some fifty times a token, so that they spin for longer, about a tenth of a
    millisecond: one text took 3.6 ms a token so and 6 to 14 with short spinning on two idle cores, and 13.5 instead of
    7.6 beside a busy process. Leaves settings of the user's own as they are.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000" if command == "generate" else "1000")


def _answered(args: Sequence[str]) -> bool:
    """Deal with what comes before any command: help, version, completion. Raises ConfigError for what is unknown."""
    first, rest = (args[0] if args else "--help"), args[1:]
    if first in (*COMMANDS, RUNS):
        return False
    if first in ("-h", "--help", "help") and rest and rest[0] in COMMANDS:
        from lmkit.arguments import Line

        _run(Line(rest[0], help=True))
    elif first in ("-h", "--help", "help") and rest[:1] == [RUNS]:
        from lmkit.runs_line import execute, parse_runs

        execute(parse_runs([*rest[1:2], "--help"]))
    elif first in ("-h", "--help", "help") and rest[:1] == [EXPLAIN]:
        from lmkit.explain import explain_words

        show(explain_words([]))
    elif first in ("-h", "--help", "help"):
        from lmkit.help import overview

        if rest and not rest[0].startswith("-"):
            raise _unknown_command(rest[0])
        show(overview({**COMMANDS, RUNS: RUNS_TEXT, EXPLAIN: EXPLAIN_TEXT}))
    elif first in ("-V", "--version"):
        from lmkit import __version__

        show(f"lmkit {__version__}")
    elif first == EXPLAIN:
        from lmkit.explain import explain_words

        show(explain_words(rest))
    elif first == "--completion":
        from lmkit.completion import script

        show(script(rest[0] if rest else ""), end="")
    elif first == "--complete":
        from lmkit.completion import candidates

        show(candidates(rest), end="")
    else:
        from lmkit.presets import nearest

        if first.startswith("-"):
            raise ConfigError(f"unknown option {first}", nearest(first, OPTIONS))
        if "=" in first:
            raise ConfigError(f"{first} stands before the command", "write lmkit COMMAND KEY=VALUE")
        raise _unknown_command(first)
    return True


def _unknown_command(word: str) -> ConfigError:
    from lmkit.presets import nearest

    return ConfigError(f"unknown command {word!r}", nearest(word, [*COMMANDS, RUNS, EXPLAIN]))


def _run(line: Line) -> int:
    if line.multirun and not line.help:
        from lmkit.sweep import sweep

        return sweep(line)
    with interrupted_at_once():
        from lmkit.composing import compose, to_dataclass, to_yaml

        config = compose(line, partial=line.help)
        made = None if line.help else to_dataclass(config)
    if line.help:
        from lmkit.help import command_help

        show(command_help(line.command, COMMANDS[line.command], config, line.groups))
    elif line.show_config:
        show(to_yaml(config), end="")
    else:
        run_command(line, made)
    return 0


def run_command(line: Line, config: Any) -> Any:
    """Import the command and run it, if the libraries that it needs are there."""
    with interrupted_at_once():
        from lmkit.requirements import check_installed

        check_installed()
        module = importlib.import_module(f"lmkit.commands.{line.command.replace('-', '_')}")
    if line.command != "generate":
        return module.run(config)
    config.stop += line.stop
    if None in line.prompts:  # kept in the list, which the other jobs of a multirun have too
        from lmkit.arguments import prompt_in

        try:
            piped = prompt_in(sys.stdin.buffer.read())
        except UnicodeDecodeError:
            raise ConfigError("--prompt -: standard input is not UTF-8 text", "convert it: iconv -t UTF-8") from None
        line.prompts[:] = [piped if text is None else text for text in line.prompts]
    return module.run(config, line.prompts or ([] if config.chat or config.interactive else [""]))
