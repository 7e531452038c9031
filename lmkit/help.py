"""Help texts, made from the configuration dataclasses and the presets themselves."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from lmkit.presets import config_dir, default_of, description, groups_of, names_in

EXAMPLES = """\
  lmkit prepare dataset=ptb dataset.path=DIR
  lmkit pretrain model=small
  lmkit pretrain dataset=ptb model=lstm optimizer=sgd device=cpu train.budget=10m
  lmkit finetune run=runs/NAME dataset=text dataset.path=DIR
  lmkit eval-ppl split=test output=numbers.json
  lmkit generate --prompt "the company said" -n 50"""

EXIT_CODES = """\
  0 done                     5 run locked by another process
  2 usage or configuration   6 resources: disk, memory, device
  3 data or tokenizer        7 diverged
  4 run or checkpoint       75 stopped on request and saved; resume=true continues"""

GENERATE_HELP = """\
  -p, --prompt TEXT          text to continue; repeatable; - reads standard input; never parsed
  --prompt-file FILE         the same from a file
  -n, --max-new-tokens N     tokens to generate
  --num-samples N, --seed N, --stop TEXT, --temperature X, --top-k N, --top-p X, --min-p X, --repetition-penalty X"""


def overview(commands: Mapping[str, str]) -> str:
    """Text of ``lmkit --help``."""
    lines = ["Train, evaluate and sample language models.", "", "usage: lmkit COMMAND [GROUP=NAME] [KEY=VALUE] ...", ""]
    lines += [f"  {name:<10} {text}" for name, text in commands.items()]
    lines += ["", "examples:", EXAMPLES, "", "options:"]
    lines += [
        "  COMMAND --help             every group and key of a command, with defaults",
        "  COMMAND --cfg job          print the composed configuration and stop",
        "  COMMAND -m KEY=A,B ...     run once for each combination of values",
        "  --version                  print the version",
        "  --completion SHELL         print the tab completion for bash, zsh or fish",
    ]
    return "\n".join([*lines, "", "exit codes:", EXIT_CODES])


def command_help(command: str, text: str, config: Any) -> str:
    """Text of ``lmkit COMMAND --help``: what can be chosen, and every key with its type, value and meaning."""
    lines = [f"lmkit {command}: {text}", "", f"usage: lmkit {command} [GROUP=NAME] [KEY=VALUE] ..."]
    if command == "generate":
        lines += ["", GENERATE_HELP]
    groups = groups_of(command)
    if groups:
        lines += ["", "Groups (GROUP=NAME):"]
    for group in groups:
        lines.append(f"  {group} (default {default_of(command, group)})")
        lines += [f"    {name:<16} {description(config_dir() / group / f'{name}.yaml')}" for name in names_in(group)]
    lines += ["", "Keys (KEY=VALUE or --KEY VALUE), with the type and the value as composed:"]
    if "run" in config:
        lines += ["  run=DIR is short for run.path=DIR"]
    lines += _key_lines(config, "")
    return "\n".join(lines)


def _key_lines(config: Any, prefix: str) -> Iterator[str]:
    from omegaconf import DictConfig, OmegaConf

    cls: Any = OmegaConf.get_type(config)
    types = {f.name: str(f.type) for f in fields(cls)}
    docs = field_docs(cls)
    nested = []
    for name in config:
        node = config._get_node(name)
        if isinstance(node, DictConfig) and not (node._is_none() or node._is_missing()):
            nested.append(name)
            continue
        value = "(must be given)" if node._is_missing() else _shown(node)
        lines = textwrap.wrap(docs.get(name, ""), 100)
        yield f"  {prefix}{name}={value}   [{types[name]}]"
        yield from (f"      {line}" for line in lines)
    for name in nested:
        yield ""
        yield from _key_lines(config[name], f"{prefix}{name}.")


def _shown(node: Any) -> str:
    value = node._value()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[]" if not value else str([str(v) for v in value])
    return str(getattr(value, "name", value))


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The line of text under each field of a dataclass, its bases included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        previous: ast.stmt | None = None
        for node in body.body if isinstance(body, ast.ClassDef) else []:
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if is_text and isinstance(previous, ast.AnnAssign) and isinstance(previous.target, ast.Name):
                docs[previous.target.id] = " ".join(str(node.value.value).split())  # type: ignore[attr-defined]
            previous = node
    return docs
