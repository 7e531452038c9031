"""Help texts, made from the configuration dataclasses and the presets themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

WIDTH = 110
NOT_GIVEN = "(must be given)"
"""Stands for a value that has no default."""

EXAMPLES = """\
  lmkit prepare dataset=ptb dataset.path=DIR
  lmkit pretrain model=small
  lmkit pretrain dataset=ptb model=lstm optimizer=sgd device=cpu train.budget=10m
  lmkit finetune run=runs/NAME dataset=text dataset.path=DIR
  lmkit eval-ppl split=test output=numbers.json
  lmkit generate --prompt "the company said" -n 50
  lmkit runs ls
  lmkit explain train.budget"""

EXIT_CODES = """\
  0 done                     5 run locked by another process
  1 a bug in lmkit           6 resources: disk, memory, device
  2 usage or configuration   7 diverged
  3 data or tokenizer       75 stopped on request and saved; resume=true continues
  4 run or checkpoint      130 interrupted"""

ENVIRONMENT = """\
  LMKIT_DATA    folder that holds the benchmark sets: ptb/, wikitext-2/ and so on
  LMKIT_CACHE   folder of prepared data, instead of lmkit in the user's cache"""

GENERATE_OPTIONS = """\
  -p, --prompt TEXT          text to continue, taken as it is; repeatable; - reads standard input
  --prompt-file FILE         the same from a file
  -n, --max-new-tokens N     tokens to generate for each sample
  --num-samples N            samples for each prompt
  --seed N                   the same seed gives the same text
  --stop TEXT                end a sample before this text; repeatable
  --temperature X, --top-k N, --top-p X, --min-p X, --repetition-penalty X
                             how the next token is drawn; see the sampling keys below"""

OPTIONS = """\
  -h, --help                 this help{example}
  --cfg job                  print the composed configuration as YAML, and stop
  -m, --multirun             run once for each combination of comma-separated values, as in
                             -m {sweep}
                             (KEY=[A,B] is one value that holds a comma)"""

SWEEPS = {
    "prepare": "tokenizer=char,byte",
    "pretrain": "model=tiny,small seed=1,2 run.dir=DIR (each run in a folder of DIR)",
    "finetune": "run=RUN optimizer=adamw,sgd seed=1,2 run.dir=DIR (each in a folder of DIR)",
    "eval-ppl": "run=runs/A,runs/B",
    "generate": "sampling.temperature=0.5,1",
    "export": "run=runs/A,runs/B to=DIR",
}


def overview(commands: Mapping[str, str]) -> str:
    """Text of ``lmkit --help``."""
    lines = ["Train, evaluate and sample language models.", "", "usage: lmkit COMMAND [GROUP=NAME] [KEY=VALUE] ...", ""]
    lines += [f"  {name:<10} {text}" for name, text in commands.items()]
    lines += ["", "finetune, eval-ppl, generate and export use the newest finished run unless run=DIR names another."]
    lines += ["", "examples:", EXAMPLES, "", "options:"]
    lines += [
        "  COMMAND --help             every group and key of a command, with defaults",
        "  COMMAND --cfg job          print the composed configuration and stop",
        "  COMMAND -m KEY=A,B ...     run once for each combination of values",
        "  --version                  print the version",
        "  --completion SHELL         print the tab completion of bash, zsh or fish: in .bashrc",
        '                             eval "$(lmkit --completion bash)", in .zshrc the same with zsh; for fish',
        "                             lmkit --completion fish > ~/.config/fish/completions/lmkit.fish",
    ]
    return "\n".join([*lines, "", "environment:", ENVIRONMENT, "", "exit codes:", EXIT_CODES])


def command_help(command: str, text: str, config: Any, groups: Mapping[str, str]) -> str:
    """Text of ``lmkit COMMAND --help``: what can be chosen, and every key with its type, value and meaning."""
    import textwrap

    from lmkit.keys import keys_of
    from lmkit.presets import chosen, default_of, description, groups_of, names_in

    names = groups_of(command)
    usage = "[GROUP=NAME] [KEY=VALUE] ..." if names else "[KEY=VALUE] ..."
    usage = "[--prompt TEXT] [KEY=VALUE] ..." if command == "generate" else usage
    other = "model=lstm" if "model" in names else "dataset=hub" if "dataset" in names else ""
    example = f"; {other} --help shows the keys of that choice" if other else ""
    lines = [f"lmkit {command}: {text}", "", f"usage: lmkit {command} {usage}", "", "options:"]
    lines += [GENERATE_OPTIONS] if command == "generate" else []
    lines += [OPTIONS.format(example=example, sweep=SWEEPS[command])]
    lines += ["", "groups (GROUP=NAME):"] if names else []
    for group in names:
        default = default_of(command, group)
        lines.append(f"  {group} (default: {'none' if default == 'null' else default})")
        width = max(16, *(len(name) for name in names_in(group)))
        for name in names_in(group):
            indent = " " * (width + 6)
            lines += textwrap.wrap(f"    {name:<{width}}  {description(group, name)}", WIDTH, subsequent_indent=indent)
    lines += ["", "keys (KEY=VALUE or --KEY VALUE), with the value they have now and their type:"]
    if "run" in config and "path" in config.run:
        lines += ["  run=DIR is short for run.path=DIR"]
    presets = chosen(command, groups)
    lines += _key_lines(config, "", keys_of(command, groups), presets)
    return "\n".join(lines)


def _key_lines(config: Any, prefix: str, types: Mapping[str, Any], presets: Mapping[str, str]) -> Iterator[str]:
    import textwrap

    from omegaconf import DictConfig, OmegaConf

    from lmkit.config.text import format_value
    from lmkit.keys import field_docs, type_text
    from lmkit.presets import description

    cls: type | None = OmegaConf.get_type(config)
    docs = {} if cls is None else field_docs(cls)
    nested = []
    for name in config:
        node = config._get_node(name)
        if f"{prefix}{name}" not in types:
            nested.append(name)
            continue
        value = NOT_GIVEN if node._is_missing() else format_value(node._value())
        yield f"  {prefix}{name}={value}   [{type_text(types[f'{prefix}{name}'])}]"
        yield from (f"      {line}" for line in textwrap.wrap(docs[name].replace("``", ""), WIDTH - 6))
    for name in nested:
        node = config._get_node(name)
        is_open = isinstance(node, DictConfig) and not (node._is_none() or node._is_missing())
        if is_open and not len(config[name]):
            continue
        title = f"{prefix}{name}: {docs[name].replace('``', '')}"
        if not prefix and presets.get(name, "null") != "null":
            title = f"{name}={presets[name]}: {description(name, presets[name])}"
        yield ""
        yield from textwrap.wrap(f"  {title}", WIDTH, subsequent_indent="      ")
        if is_open:
            yield from _key_lines(config[name], f"{prefix}{name}.", types, presets)
