"""Taking a command line apart: groups, keys, options and prompts. Nothing is composed and nothing heavy loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lmkit.keys import every_key, flags_of
from lmkit.presets import groups_of, names_in, nearest, preset_name

PLUGINS = ("launcher", "sweeper")
"""Hydra's plugins of a multirun: ``launcher=NAME`` and ``launcher.KEY=VALUE``, also as ``hydra/launcher=NAME``."""
WITH_PLUGINS = ("pretrain", "finetune")
ALIASES = {"run": "run.path", "init": "init.weights"}
OPTIONS = ("--help", "--cfg", "--multirun")
TEXT_OPTIONS = ("--prompt", "-p", "--prompt-file", "--stop")
GENERATE_OPTIONS = {
    "-n": "max_new_tokens",
    "--temperature": "sampling.temperature",
    "--top-k": "sampling.top_k",
    "--top-p": "sampling.top_p",
    "--min-p": "sampling.min_p",
    "--repetition-penalty": "sampling.repetition_penalty",
}
BOOLEANS = ("true", "false", "yes", "no", "on", "off", "y", "n", "1", "0")
NULL = ("null", "None")
"""Words for no value."""


@dataclass
class Line:
    """A command line taken apart."""

    command: str
    groups: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    """Texts by dotted key, not yet converted."""
    prompts: list[str | None] = field(default_factory=list)
    """Texts to continue; None stands for standard input, which is read when the command runs."""
    stop: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What is wrong with it so far; reported together with what the configuration finds."""
    help: bool = False
    show_config: bool = False
    multirun: bool = False
    plugins: dict[str, str] = field(default_factory=dict)
    """How the jobs of a multirun are run, by Hydra's own names: ``hydra/launcher``, ``hydra.launcher.KEY``."""

    def gives(self, key: str) -> bool:
        """Whether it gives a key a value other than null."""
        return self.values.get(key, "null") not in ("", *NULL)


def parse(command: str, args: Sequence[str]) -> Line:
    """Take the words after the command apart. What is wrong with them is noted in ``problems``."""
    line, words = Line(command), list(args)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word in ("-h", "--help"):
            line.help = True
        elif word in ("-m", "--multirun"):
            line.multirun = True
        elif name in ("-c", "--cfg"):
            value = value if equals else words.pop(0) if words else ""
            line.show_config = value == "job"
            if not line.show_config:
                line.problems.append(f"--cfg {value} is unknown: write --cfg job".replace("  ", " "))
        elif command == "generate" and name in TEXT_OPTIONS:
            _take_text(line, name, value if equals else None, words)
        elif word.startswith("-"):
            _take_option(line, name, value if equals else None, words)
        elif equals:
            _put(line, name, value)
        else:
            line.problems.append(_stray(command, word))
    if line.plugins and not line.multirun:
        line.problems.append(f"{_plugin_text(line)} is for a multirun: add -m")
    elif line.plugins and command not in WITH_PLUGINS:
        line.problems.append(f"{_plugin_text(line)} works with {' and '.join(WITH_PLUGINS)}, not with {command}")
    return line


def _plugin_text(line: Line) -> str:
    key, value = next(iter(line.plugins.items()))
    return f"{key[len('hydra/') :]}={value}"


def _take_text(line: Line, name: str, value: str | None, words: list[str]) -> None:
    """An option of generate whose value is a text that nobody interprets, or the file that holds it."""
    if value is None:
        if not words:
            example = "prompt.txt" if name == "--prompt-file" else "'the company said'"
            line.problems.append(f"{name} needs a value: for example {name} {example}")
            return
        value = words.pop(0)
    try:
        text = value.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        line.problems.append(f"{name} {value.encode('utf-8', 'replace').decode()}: it is not UTF-8 text")
        return
    if name == "--stop" and not text:
        line.problems.append("--stop is empty, which ends nothing: give a text, or leave it out")
    elif name == "--stop":
        line.stop.append(text)
    elif name == "--prompt-file":
        try:
            line.prompts.append(prompt_in(Path(os.path.expanduser(value)).read_bytes()))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            line.problems.append(f"--prompt-file {value}: {reason}")
    else:
        line.prompts.append(None if text == "-" else text)


def prompt_in(content: bytes) -> str:
    """The prompt that a file or standard input holds, read as a corpus is (no mark at its start, "\\n" for CRLF), up to
    its last line end. Raises UnicodeDecodeError."""
    return content.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\n").removesuffix("\r")


def _take_option(line: Line, name: str, value: str | None, words: list[str]) -> None:
    """``--key value``, ``--key=value``, ``--flag``, or one of the short options of generate."""
    if line.command == "generate" and value is None and name.startswith("-n") and name[2:].isdecimal():
        name, value = "-n", name[2:]
    short = GENERATE_OPTIONS.get(name) if line.command == "generate" else None
    if short is None and not name.startswith("--"):
        known = [*OPTIONS, "-m", "-h", *(["-n", "-p"] if line.command == "generate" else [])]
        line.problems.append(f"unknown option {name}: {nearest(name, known)}")
        return
    key = short or name.removeprefix("--").replace("-", "_")
    if value is None:
        known = [*every_key(line.command), *groups_of(line.command), *ALIASES]
        if key in flags_of(line.command) and (not words or words[0].lower() not in BOOLEANS):
            value = "true"
        elif words and (key in known or not (words[0].startswith("-") or "=" in words[0])):
            value = words.pop(0)
        elif key in known:
            line.problems.append(f"{name} needs a value")
            return
        else:
            line.problems.append(f"unknown option {name}: {nearest(key, [*known, *option_names(line.command)])}")
            return
    _put(line, key, value)


def option_names(command: str) -> list[str]:
    """What may have been meant by an option that is not a key."""
    texts = [name for name in (*TEXT_OPTIONS, *GENERATE_OPTIONS) if name[1] == "-"]
    return [*OPTIONS, *(texts if command == "generate" else [])]


def _put(line: Line, key: str, value: str) -> None:
    plugin = key[len("hydra/") :] if key[: len("hydra/")] in ("hydra/", "hydra.") else key
    if plugin.replace("/", ".").partition(".")[0] in PLUGINS:
        slash = plugin in PLUGINS or "/" in plugin  # a choice of a plugin or of a part of it, no key
        line.plugins[f"hydra{'/' if slash else '.'}{plugin}"] = value
    elif key[:1] in ("+", "~") or key.partition(".")[0] == "hydra":
        line.problems.append(f"{key}: keys can be set, not added or removed: write key=value")
    elif key in groups_of(line.command):
        line.groups[key] = preset_name(key, value)
    else:
        line.values[ALIASES.get(key, key)] = value


def _stray(command: str, word: str) -> str:
    """What may have been meant by a word that is neither an option nor ``key=value``."""
    if word[:1] in ("+", "~"):
        return f"{word}: keys can be set, not added or removed: write key=value"
    if word in flags_of(command):
        return f"{word} has no value: write {word}=true"
    groups = [group for group in groups_of(command) if word in names_in(group)]
    if groups:
        return f"{word} has no key: did you mean {' or '.join(f'{group}={word}' for group in groups)}?"
    if word in groups_of(command):
        return f"{word} has no value: write {word}=NAME"
    if "run.path" in every_key(command) and os.path.isdir(word):
        return f"{word} has no key: did you mean run={word}?"
    if command == "generate":
        return f"{word!r} is neither key=value nor an option: write a prompt as --prompt TEXT"
    return f"{word!r} is neither key=value nor an option: see lmkit {command} --help"
