"""Tab completion for bash, zsh and fish, without importing anything heavy."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from lmkit.errors import ConfigError

SCRIPTS = {
    # bash splits words at the characters of COMP_WORDBREAKS, = among them, and replaces only the last part: the line is
    # taken apart by lmkit, and what stands before the = is cut off again here.
    "bash": """\
_lmkit() {
    local line="${COMP_LINE:0:COMP_POINT}" word cut="" candidate
    word="${line##*[[:space:]]}"
    if [[ "$COMP_WORDBREAKS" == *=* && "$word" == *=* ]]; then cut="${word%%=*}="; fi
    COMPREPLY=()
    while IFS= read -r candidate; do
        COMPREPLY+=("${candidate#"$cut"}")
    done < <("$1" --complete --line "$line" 2>/dev/null)
    if [[ ${#COMPREPLY[@]} == 1 && "${COMPREPLY[0]}" == *= ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -o default -F _lmkit lmkit
""",
    "zsh": """\
#compdef lmkit
_lmkit() {
    local -a found open
    found=(${(f)"$(${words[1]} --complete "${(@)words[1,CURRENT-1]}" "$PREFIX" 2>/dev/null)"})
    open=(${(M)found:#*=})
    found=(${found:#*=})
    if (( ${#open} + ${#found} )); then
        (( ${#open} )) && compadd -S '' -a open
        (( ${#found} )) && compadd -a found
    else
        compset -P '*='
        _files
    fi
}
if [ "$funcstack[1]" = "_lmkit" ]; then _lmkit "$@"; else compdef _lmkit lmkit; fi
""",
    "fish": """\
function __lmkit_complete
    set -l words (commandline -opc)
    $words[1] --complete $words (commandline -ct) 2>/dev/null
end
complete -c lmkit -f -n 'count (__lmkit_complete) >/dev/null' -a '(__lmkit_complete)'
""",
}


def script(shell: str) -> str:
    """The completion script of a shell. Raises ConfigError if it is not known."""
    if shell not in SCRIPTS:
        raise ConfigError(
            f"--completion {shell}".rstrip() + " is unknown", f"write --completion {' or '.join(SCRIPTS)}"
        )
    return SCRIPTS[shell]


def candidates(args: Sequence[str]) -> str:
    """What may stand for the last of the words (the program's name is the first), one a line.

    ``args`` are the words, or ``--line`` and the line up to the cursor.
    """
    from lmkit.cli import COMMANDS, EXPLAIN, OPTIONS, RUNS

    words = _split(args[1] if len(args) > 1 else "") if args[:1] == ["--line"] else list(args)
    last = words[-1] if len(words) > 1 else ""
    found: list[str] = []
    if not words:
        return ""
    if len(words) <= 2:
        found = [*COMMANDS, RUNS, EXPLAIN, *OPTIONS]
    elif words[1] in COMMANDS:
        found = _arguments(words[1], words[2:-1], last)
    elif words[1] == RUNS:
        found = _runs_words(words[2:-1], last)
    elif words[1] == EXPLAIN:
        found = _explained(words[2:-1], last)
    elif words[1] == "--completion":
        found = list(SCRIPTS)
    elif words[1] in ("help", "--help", "-h"):
        found = [*COMMANDS, RUNS, EXPLAIN]
    return "".join(f"{word}\n" for word in found if word.startswith(last))


def _split(line: str) -> list[str]:
    try:
        words = shlex.split(line)
    except ValueError:  # inside quotes: nothing to offer
        return []
    return [*words, ""] if line[-1:].isspace() or not words else words


def _arguments(command: str, before: Sequence[str], last: str) -> list[str]:
    from lmkit.arguments import GENERATE_OPTIONS, OPTIONS, TEXT_OPTIONS
    from lmkit.keys import keys_of
    from lmkit.presets import groups_of, names_in

    groups = _chosen(command, before)
    keys = keys_of(command, groups)
    previous = before[-1] if before else ""
    if previous in ("--cfg", "-c"):
        return ["job"]
    if command == "generate" and (previous in TEXT_OPTIONS or previous in GENERATE_OPTIONS):
        return []
    if previous.startswith("--") and previous not in OPTIONS and "=" not in previous:
        values = _values(command, keys, _key(previous))
        return values if values or _key(previous) in keys else []
    if "=" in last:
        name, _, text = last.partition("=")
        listed = text[: text.rfind(",") + 1] if {"-m", "--multirun"} & {*before} else ""
        return [f"{name}={listed}{value}" for value in _values(command, keys, _key(name))]
    if last.startswith("-"):
        texts = [name for name in (*TEXT_OPTIONS, *GENERATE_OPTIONS) if name.startswith("--")]
        return [*OPTIONS, *(texts if command == "generate" else []), *(f"--{key}" for key in keys)]
    named = [group for group in groups_of(command) if names_in(group)]
    return [f"{key}=" for key in (*named, *(["run"] if "run.path" in keys else []), *keys)]


def _explained(before: Sequence[str], last: str) -> list[str]:
    """What may follow ``lmkit explain``: a key, a group or a preset, and then a command that has it."""
    from lmkit.cli import COMMANDS
    from lmkit.keys import every_key
    from lmkit.presets import groups_of, names_in

    if before:
        return [*COMMANDS] if len(before) == 1 else []
    group, equals, _ = last.partition("=")
    if equals:
        return [f"{group}={name}" for name in names_in(group)]
    return list(dict.fromkeys(word for command in COMMANDS for word in (*groups_of(command), *every_key(command))))


def _runs_words(before: Sequence[str], last: str) -> list[str]:
    """What may follow ``lmkit runs``: an action, its options, the runs in runs/, the steps of a checkpoint."""
    from lmkit.config.runs import ACTIONS

    if not before:
        return [*ACTIONS, "--help"]
    name, *words = before
    if name not in ACTIONS or "--steps" in words[-1:]:
        return []
    action = ACTIONS[name]
    options = [option.partition(" ")[0] for option in action.options if option[0] == "-"]
    if name == "verify-resume":
        words = _without("--steps", words)
        command = words[0] if words[:1] in (["pretrain"], ["finetune"]) else "pretrain"
        rest = words[1:] if words[:1] == [command] else words
        first = [] if words or last.startswith("-") else ["pretrain", "finetune"]
        return [*(options if last.startswith("-") else first), *_arguments(command, rest, last)]
    if last.startswith("-"):
        return [*options, "--help"]
    given = [word for word in words if not word.startswith(("-", "to="))]
    if given and not last.startswith("to=") and action.takes_file:
        return ["to=", *(_run_names() if action.most is None else [])]
    if name in ("ls", "sweep") or (action.most is not None and len(given) >= action.most):
        return []
    return _steps_of(given[0]) if name in ("pin", "unpin", "replay") and given else _run_names()


def _run_names() -> list[str]:
    from lmkit.store.browse import run_names

    return run_names()


def _steps_of(run: str) -> list[str]:
    from lmkit.errors import CheckpointError
    from lmkit.store.browse import named_run
    from lmkit.store.listing import list_checkpoints
    from lmkit.store.manifest import step_of

    try:
        return [f"step={step_of(path.name)}" for path in list_checkpoints(named_run(run))]
    except CheckpointError:
        return []


def _key(word: str) -> str:
    return word.lstrip("-").replace("-", "_") if word.startswith("--") else word


def _chosen(command: str, words: Sequence[str]) -> dict[str, str]:
    """The presets that are named on the line so far, of several for a multirun the last. No prompt is read."""
    from lmkit.arguments import parse
    from lmkit.presets import names_in, preset_name

    groups = parse(command, _without("--prompt-file", words)).groups
    named = {group: preset_name(group, name.rpartition(",")[2]) for group, name in groups.items()}
    return {group: name for group, name in named.items() if name in names_in(group)}


def _without(option: str, words: Sequence[str]) -> list[str]:
    """The words but for an option and its value."""
    return [w for w, before in zip(words, ["", *words], strict=False) if option not in (w.partition("=")[0], before)]


def _values(command: str, keys: dict[str, object], key: str) -> list[str]:
    from lmkit.keys import choices
    from lmkit.presets import groups_of, names_in

    return names_in(key) if key in groups_of(command) else choices(keys.get(key))
