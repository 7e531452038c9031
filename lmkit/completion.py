"""Tab completion for bash, zsh and fish, without importing anything heavy."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from enum import Enum

from lmkit.errors import ConfigError
from lmkit.presets import groups_of, names_in

SCRIPTS = {
    "bash": """\
_lmkit() {
    local line="${COMP_LINE:0:COMP_POINT}" word
    word="${line##* }"
    local IFS=$'\\n'
    COMPREPLY=($(lmkit --complete $(printf '%s' "$line" | tr ' ' '\\n') ${word:+} ${word:-''} 2>/dev/null))
    if [[ "$word" == *[=:]* && "$COMP_WORDBREAKS" == *=* ]]; then COMPREPLY=("${COMPREPLY[@]#"${word%[=:]*}"?}"); fi
    [[ ${#COMPREPLY[@]} == 1 && "${COMPREPLY[0]}" == *= ]] && compopt -o nospace
}
complete -o default -F _lmkit lmkit
""",
    "zsh": """\
#compdef lmkit
_lmkit() {
    local -a found
    found=(${(f)"$(lmkit --complete "${words[@]:0:$CURRENT}" 2>/dev/null)"})
    compadd -S '' -a found || _files
}
compdef _lmkit lmkit
""",
    "fish": """\
function __lmkit_complete
    lmkit --complete (commandline -opc) (commandline -ct) 2>/dev/null
end
complete -c lmkit -f -a '(__lmkit_complete)'
""",
}


def script(shell: str) -> str:
    """The completion script of a shell. Raises ConfigError if it is not known."""
    if shell not in SCRIPTS:
        raise ConfigError(f"--completion {shell or '?'} is unknown", f"use {', '.join(SCRIPTS)}")
    return SCRIPTS[shell]


def candidates(words: Sequence[str]) -> str:
    """What may stand for the last of ``words`` (the program's name is the first), one a line."""
    from lmkit.cli import COMMANDS

    last = words[-1] if len(words) > 1 else ""
    if len(words) <= 2:
        found: list[str] = [*COMMANDS, "--help", "--version"]
    elif words[1] in COMMANDS:
        found = list(_arguments(words[1], words[2:-1]))
        if "=" in last:
            key = last.partition("=")[0]
            found = [f"{key}={value}" for value in _values(words[1], words[2:-1], key)]
    else:
        found = []
    return "".join(f"{word}\n" for word in found if word.startswith(last))


def _arguments(command: str, chosen: Sequence[str]) -> Iterator[str]:
    yield from ("--help", "--cfg", "-m")
    if command == "generate":
        yield from ("--prompt", "--prompt-file", "--max-new-tokens", "--num-samples", "--seed", "--stop")
    yield from (f"{group}=" for group in groups_of(command))
    yield "run="
    yield from (f"{key}=" for key in _keys(command, chosen))


def _keys(command: str, chosen: Sequence[str]) -> dict[str, object]:
    """Dotted keys of a command with their types; of a group, those of the chosen (or any) member."""
    from lmkit.config import ROOTS, SCHEMAS

    keys: dict[str, object] = {}

    def walk(cls: type, prefix: str) -> None:
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            hint = hints[f.name]
            inner = [a for a in (*typing.get_args(hint), hint) if dataclasses.is_dataclass(a)]
            if not inner:
                keys[f"{prefix}{f.name}"] = hint
            elif f.name in SCHEMAS and not prefix:
                for member in _members(f.name, chosen):
                    walk(member, f"{f.name}.")
            else:
                walk(typing.cast(type, inner[0]), f"{prefix}{f.name}.")

    walk(ROOTS[command], "")
    return keys


def _members(group: str, chosen: Sequence[str]) -> list[type]:
    from lmkit.config import SCHEMAS
    from lmkit.presets import config_dir

    name = next((word.partition("=")[2] for word in reversed(chosen) if word.startswith(f"{group}=")), None)
    path = config_dir() / group / f"{name}.yaml"
    if name is not None and path.is_file():
        text = path.read_text(encoding="utf-8")
        return [cls for schema, cls in SCHEMAS[group].items() if f"@_here_: {schema}\n" in text]
    return list(SCHEMAS[group].values())


def _values(command: str, chosen: Sequence[str], key: str) -> list[str]:
    if key in groups_of(command):
        return names_in(key)
    hint = _keys(command, chosen).get(key)
    for choice in (*typing.get_args(hint), hint):
        if isinstance(choice, type) and issubclass(choice, Enum):
            return list(choice.__members__)
        if choice is bool:
            return ["true", "false"]
    return []
