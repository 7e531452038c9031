"""``lmkit runs``: from the words to an action, and its help. No configuration is composed, but for verify-resume."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from lmkit.arguments import parse
from lmkit.config.runs import ACTIONS, LEAST_STEPS, Action, RunsConfig
from lmkit.errors import ConfigError
from lmkit.help import EXIT_CODES, WIDTH
from lmkit.presets import nearest
from lmkit.reporting import show


def parse_runs(args: Sequence[str]) -> RunsConfig:
    """Take the words after ``lmkit runs`` apart. Raises ConfigError with everything that is wrong with them."""
    name, *words = args or ["--help"]
    if name in ("-h", "--help"):
        return RunsConfig(action="", help=True)
    if name not in ACTIONS:
        what, known = ("option", ["--help"]) if name.startswith("-") else ("action", list(ACTIONS))
        raise ConfigError(f"lmkit runs has no {what} {name!r}", nearest(name, known))
    config, problems = RunsConfig(action=name), []
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            config.help = True
        elif word in ("--debug", "debug=true"):
            config.debug = True
        elif name == "verify-resume":
            problems += _take_steps(config, word, words)
        elif word.startswith("to=") and ACTIONS[name].takes_file:
            config.to = word.removeprefix("to=")
            problems += [] if config.to else ["to= is empty: name a file"]
        elif word in ACTIONS[name].options:
            setattr(config, word.removeprefix("--"), True)
        elif word.startswith("-"):
            options = [*(option for option in ACTIONS[name].options if option[0] == "-"), "--help", "--debug"]
            problems.append(f"lmkit runs {name} has no option {word}: {nearest(word, options)}")
        else:
            config.words.append(word.removeprefix("run="))
    if not config.help:
        problems += _word_problems(name, ACTIONS[name], config.words)
        if problems:
            raise ConfigError("; ".join(problems))
    return config


def _take_steps(config: RunsConfig, word: str, words: list[str]) -> list[str]:
    """Note ``--steps N``, or a word of pretrain; returns what is wrong with it."""
    option, equals, value = word.partition("=")
    if option != "--steps":
        config.words.append(word)
        return []
    value = value if equals else words.pop(0) if words else ""
    if not (value.isdecimal() and int(value) >= LEAST_STEPS):
        return [f"--steps {value} must be a whole number >= {LEAST_STEPS}".replace("  ", " ")]
    config.steps = int(value)
    return []


def _word_problems(name: str, action: Action, words: Sequence[str]) -> list[str]:
    if len(words) < action.least:
        return [f"write lmkit runs {name} {action.words}: lmkit runs ls lists the runs"]
    if action.most is not None and len(words) > action.most:
        return [f"{words[action.most]!r} is too much: write lmkit runs {name} {action.words}"]
    return []


def runs_help(name: str) -> str:
    """Text of ``lmkit runs --help``, or of ``lmkit runs ACTION --help``."""
    if not name:
        lines = ["lmkit runs: look at runs, check them, and tidy them up", "", "usage: lmkit runs ACTION ...", ""]
        rows = [
            (f"{key} {action.words}" if key != "verify-resume" else key, action.summary)
            for key, action in ACTIONS.items()
        ]
        width = max(len(usage) for usage, _ in rows)
        lines += [f"  {usage:<{width}}  {summary}" for usage, summary in rows]
        lines += ["", "RUN is a run directory, or its name in runs/. lmkit runs ACTION --help tells more."]
        return "\n".join([*lines, "", "exit codes:", EXIT_CODES])
    action = ACTIONS[name]
    options = {**action.options, "-h, --help": "this help", "--debug": "show the traceback of an error"}
    words = f"{action.words} {' '.join(f'[{option}]' for option in action.options)}".rstrip()
    lines = [f"lmkit runs {name}: {action.summary}", "", f"usage: lmkit runs {name} {words}"]
    if action.details:
        lines += ["", *textwrap.wrap(action.details, WIDTH, break_on_hyphens=False)]
    return "\n".join([*lines, "", "options:", *(f"  {option:<13} {text}" for option, text in options.items())])


def execute(config: RunsConfig) -> None:
    """Show the help that was asked for, or do the action."""
    if config.help:
        show(runs_help(config.action))
    elif config.action == "verify-resume":
        _verify_resume(config)
    else:
        from lmkit.commands import runs

        runs.run(config)


def _verify_resume(config: RunsConfig) -> None:
    """Compose the words of the command as they are, so that a mistake is found before anything is trained."""
    from lmkit.commands import runs_resume
    from lmkit.composing import compose, to_dataclass

    named = config.words[:1] in (["pretrain"], ["finetune"])
    command, given = (config.words[0], config.words[1:]) if named else ("pretrain", config.words)
    line = parse(command, given)
    if line.multirun or line.show_config:
        raise ConfigError("verify-resume trains one configuration", "leave out -m and --cfg")
    line.groups["logger"] = "none"  # the copies send nothing anywhere
    own = {key: value for key, value in line.values.items() if not key.startswith("logger.")}
    line.values = own | runs_resume.fixed_values(config.steps)
    if command == "finetune":
        line.values |= {"predict": "null", "output": "null"}  # the copies write nothing into the user's folder
    else:
        line.values["plan"] = "false"  # which would train nothing
    made = to_dataclass(compose(line))
    words = [f"{key}={value}" for key, value in {**line.groups, **line.values}.items()]
    runs_resume.run(made, [command, *words], config.steps)
