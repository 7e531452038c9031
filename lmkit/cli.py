"""The command line: the only place that knows Hydra and OmegaConf. Below it there are dataclasses.

``group=name`` words choose presets and are composed by Hydra. ``key=value`` words are set afterwards, so that they win
over every preset and recipe, and are converted by the type of the key alone: a path or a text needs no quoting and is
never parsed as Hydra's override grammar, and nothing in it is interpolated.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmkit.errors import ConfigError, LmkitError, ResourceError

if TYPE_CHECKING:
    from omegaconf import DictConfig

COMMANDS = {
    "prepare": "read, clean and tokenize a corpus once, into the cache",
    "pretrain": "train a model from scratch; prepares what is missing",
    "finetune": "continue from the weights of a run on other data",
    "eval-ppl": "perplexity of a run over every token of a split",
    "generate": "continue a prompt",
}
PATH_KEYS = ("run.dir", "run.path", "run.root", "dataset.path", "tokenizer.path", "output")
ALIASES = {"run": "run.path"}
GENERATE_OPTIONS = {
    "-n": "max_new_tokens",
    "--temperature": "sampling.temperature",
    "--top-k": "sampling.top_k",
    "--top-p": "sampling.top_p",
    "--min-p": "sampling.min_p",
    "--repetition-penalty": "sampling.repetition_penalty",
}


@dataclass
class Line:
    """A command line taken apart."""

    command: str
    groups: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    help: bool = False
    show_config: bool = False
    multirun: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and never raises for the user's mistakes."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = any(a.lstrip("-").replace(" ", "") in ("debug=true", "debug=True", "debug=1") for a in args)
    try:
        return _main(args)
    except LmkitError as error:
        return _fail(str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        return _fail("interrupted", 130, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError as error:
        return _fail(
            f"out of memory ({error}); lower train.batch_size or train.seq_len", ResourceError.exit_code, debug
        )
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}", ResourceError.exit_code, debug)
    except Exception as error:
        text = " ".join(str(error).split())
        return _fail(f"{type(error).__name__}: {text} (a bug in lmkit; debug=true shows where)", 1, debug)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug and code not in (0, 130):
        import traceback

        traceback.print_exc()
    line = " ".join(message.splitlines())
    stream = sys.stderr
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(f"error: {line}".encode(encoding, "replace").decode(encoding), file=stream)
    return code


def _main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        from lmkit.help import overview

        print(overview(COMMANDS))
        return 0
    if args[0] in ("-V", "--version"):
        from lmkit import __version__

        print(f"lmkit {__version__}")
        return 0
    if args[0] in ("--completion", "--complete"):
        from lmkit.completion import candidates, script

        print(script(args[1] if len(args) > 1 else "") if args[0] == "--completion" else candidates(args[1:]), end="")
        return 0
    if args[0] not in COMMANDS:
        from lmkit.presets import nearest

        kind = "option" if args[0].startswith("-") else "command"
        raise ConfigError(f"unknown {kind} {args[0]!r}", nearest(args[0], COMMANDS))
    line = parse(args[0], args[1:])
    if line.multirun:
        from lmkit.sweep import sweep

        return sweep(line)
    config = compose(line.command, line.groups, line.values, partial=line.help)
    if line.help:
        from lmkit.help import command_help

        print(command_help(line.command, COMMANDS[line.command], config))
        return 0
    if line.show_config:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(config), end="")
        return 0
    run_command(line, to_dataclass(config))
    return 0


def run_command(line: Line, config: Any) -> Any:
    """Import the command and run it."""
    module = importlib.import_module(f"lmkit.commands.{line.command.replace('-', '_')}")
    if line.command == "generate":
        config.stop += line.stop
        return module.run(config, [_read_stdin(text) for text in line.prompts] or [""])
    return module.run(config)


def _read_stdin(prompt: str) -> str:
    if prompt != "-":
        return prompt
    return sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n")


# Taking the command line apart


def parse(command: str, args: Sequence[str]) -> Line:
    """Take the words after the command apart. Raises ConfigError for options that do not exist."""
    from lmkit.presets import groups_of, nearest

    line, groups = Line(command), groups_of(command)
    words = list(args)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            line.help = True
        elif word in ("-m", "--multirun"):
            line.multirun = True
        elif word in ("-c", "--cfg"):
            what = words.pop(0) if words else ""
            if what != "job":
                raise ConfigError(f"--cfg {what or '?'} is unknown", "use --cfg job")
            line.show_config = True
        elif command == "generate" and _take_prompt(line, word, words):
            continue
        elif word.startswith("-"):
            name, equals, value = word.partition("=")
            key = GENERATE_OPTIONS.get(name) if command == "generate" else None
            key = key or name.lstrip("-").replace("-", "_")
            if not name.startswith("--") and name not in GENERATE_OPTIONS:
                raise ConfigError(f"unknown option {name!r}", nearest(name, ["--help", "--cfg", "-m", "-n"]))
            if not equals:
                if not words:
                    raise ConfigError(f"{name} needs a value", f"for example {name} VALUE")
                value = words.pop(0)
            _put(line, groups, key, value, word)
        else:
            key, equals, value = word.partition("=")
            if not equals:
                raise ConfigError(f"{word!r} is neither group=name nor key=value nor an option", "see --help")
            _put(line, groups, key, value, word)
    return line


def _take_prompt(line: Line, word: str, words: list[str]) -> bool:
    """Handle the options whose values are texts; True if ``word`` was one of them."""
    name, equals, value = word.partition("=")
    if name not in ("--prompt", "-p", "--prompt-file", "--stop"):
        return False
    if not equals:
        if not words:
            raise ConfigError(f"{name} needs a text", f"for example {name} 'the company said'")
        value = words.pop(0)
    if name == "--stop":
        line.stop.append(value)
    elif name == "--prompt-file":
        try:
            line.prompts.append(Path(value).expanduser().read_text(encoding="utf-8").removesuffix("\n"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(f"--prompt-file {value}: {reason}", "name a text file") from None
    else:
        line.prompts.append(value)
    return True


def _put(line: Line, groups: list[str], key: str, value: str, word: str) -> None:
    if key[:1] in ("+", "~") or key.startswith("hydra"):
        raise ConfigError(f"{word!r}: keys can be set, not added or removed", "write key=value")
    key = ALIASES.get(key, key)
    (line.groups if key in groups else line.values)[key] = value


# Composing the configuration


def compose(command: str, groups: dict[str, str], values: dict[str, str], *, partial: bool = False) -> DictConfig:
    """The configuration of a command: root, presets, recipe, then ``values``.

    Raises ConfigError that names every wrong group, preset, key and value of the line. ``partial``: values that must
    be given may be missing (for --help).
    """
    problems = _check_groups(command, groups)
    if problems:
        raise ConfigError("; ".join(problems))
    config = _hydra_compose(command, _with_default_tokenizer(command, groups))
    problems = [problem for key, value in values.items() if (problem := _set(config, command, key, value)) is not None]
    if problems:
        raise ConfigError("; ".join(problems))
    if not partial:
        from omegaconf import OmegaConf

        missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(f"{' and '.join(missing)} must be given", f"for example {missing[0]}=VALUE")
    return config


def _check_groups(command: str, groups: dict[str, str]) -> list[str]:
    from lmkit.presets import default_of, names_in, nearest

    problems = []
    for group, name in groups.items():
        optional = default_of(command, group) == "null"
        if name not in names_in(group) and not (optional and name == "null"):
            problems.append(f"{group}={name} is unknown: {nearest(name, names_in(group))}")
    return problems


def _with_default_tokenizer(command: str, groups: dict[str, str]) -> dict[str, str]:
    from lmkit.presets import WORD_LEVEL, groups_of

    if "tokenizer" in groups_of(command) and "tokenizer" not in groups and groups.get("dataset") in WORD_LEVEL:
        return {**groups, "tokenizer": "word"}
    return groups


def _hydra_compose(command: str, groups: dict[str, str]) -> DictConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from lmkit.presets import config_dir

    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
        return hydra_compose(command, [f"{group}={name}" for group, name in groups.items()])


def register_schemas() -> None:
    """Give Hydra the dataclasses, as schema/<group>/<name> and schema/root/<command>."""
    from hydra.core.config_store import ConfigStore

    from lmkit.config import ROOTS, SCHEMAS

    store = ConfigStore.instance()
    for group, table in SCHEMAS.items():
        for name, cls in table.items():
            store.store(group=f"schema/{group}", name=name, node=cls)
    for command, cls in ROOTS.items():
        store.store(group="schema/root", name=command, node=cls)


def _set(config: DictConfig, command: str, key: str, value: str) -> str | None:
    """Set one key; the problem as text if that cannot be done."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from lmkit.presets import groups_of, nearest

    known = list(leaves(config))
    if key not in known:
        group = key.partition(".")[0]
        if group in config and "." in key and OmegaConf.is_missing(config, group) | (config.get(group) is None):
            return f"{key} needs a {group}: add {group}=NAME"
        inside = [k for k in known if k.startswith(f"{key}.")]
        if inside:
            return f"{key}={value} cannot be set as a whole: set {', '.join(inside[:3])} ..."
        options = ["prompt", "prompt_file", "num_samples", "stop"] if command == "generate" else []
        return f"unknown key {key!r}: {nearest(key, [*known, *groups_of(command), *options])}"
    if "${" in value:
        return f"{key}={value}: '${{' is not allowed in a value"
    try:
        OmegaConf.update(config, key, _converted(config, key, value))
    except (OmegaConfBaseException, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        return f"{key}={value}: {reason}"
    return None


def _converted(config: DictConfig, key: str, text: str) -> Any:
    """What a text means for a key: null, a path with its ``~``, a list, or what the key's type makes of it."""
    from omegaconf import ListConfig, OmegaConf

    parent, _, name = key.rpartition(".")
    node = (OmegaConf.select(config, parent) if parent else config)._get_node(name)
    if text in ("null", "None"):
        return None
    if isinstance(node, ListConfig):
        return [part.strip() for part in text.strip("[]").split(",") if part.strip()]
    if key in PATH_KEYS:
        return os.path.expanduser(text)
    return text


def leaves(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of all keys that hold a value (rather than further keys)."""
    from omegaconf import DictConfig

    found = []
    for name in config:
        node = config._get_node(name)
        if isinstance(node, DictConfig) and not (node._is_none() or node._is_missing()):
            found += leaves(node, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
    return found


def to_dataclass(config: DictConfig) -> Any:
    """The typed configuration; runs the dataclasses' own checks. Raises ConfigError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        made = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    if not is_dataclass(made):
        raise TypeError(f"the configuration became a {type(made).__name__}")
    return made


__all__ = ["COMMANDS", "Line", "compose", "leaves", "main", "parse", "register_schemas", "to_dataclass"]
