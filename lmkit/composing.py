"""From the words of a command line to its configuration: with ``launch``, the only place that knows Hydra.

``group=name`` words choose presets and are composed by Hydra. ``key=value`` words are set afterwards, so that they win
over every preset and recipe, and are converted by the type of the key alone: a path or a text needs no quoting and is
never parsed as Hydra's override grammar, and nothing in it is interpolated. What comes out is a dataclass.
"""

from __future__ import annotations

import functools
import math
import os
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from lmkit.arguments import NULL, Line
from lmkit.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

PATH_KEYS = (
    *("run.dir", "run.path", "run.root", "dataset.path", "tokenizer.path", "task.data", "task.valid"),
    *("adapter", "to", "output", "report", "word_probs", "predict"),
)
MISSING = "???"
"""What OmegaConf takes for a missing value, whoever wrote it."""
LONGEST_SHOWN = 200
"""Characters of a value that a message shows."""


def compose(line: Line, *, partial: bool = False) -> DictConfig:
    """The configuration of a command: root, presets, recipe, then the line's values.

    Raises ConfigError that names everything that is wrong with the line. ``partial``: values that must be given may be
    missing (for --help).
    """
    from lmkit.presets import chosen

    bad_groups = dict(_bad_groups(line))
    good = {group: name for group, name in line.groups.items() if group not in bad_groups}
    problems = [*line.problems, *bad_groups.values()]
    if clashes := [*_clashes(line.command, good), *_foreign_rate(line, good)]:
        raise ConfigError("; ".join([*problems, *clashes]))
    presets = chosen(line.command, good)
    derived = {group: presets[group] for group in ("tokenizer",) if group in presets}
    named = {group: name for group, name in {**derived, **good}.items() if name != "null"}
    config = _hydra_compose(line.command, tuple(named.items())).copy()
    problems += [
        problem
        for key, value in line.values.items()
        if key.partition(".")[0] not in bad_groups and (problem := _set(config, line, good, key, value)) is not None
    ]
    if not partial:
        problems = problems or [*_missing(config), *_beside_weights(config, line), *_beside_task(line)]
    if problems:
        raise ConfigError("; ".join(problems))
    return config


def _bad_groups(line: Line) -> Iterator[tuple[str, str]]:
    from lmkit.presets import default_of, names_in, nearest

    for group, name in line.groups.items():
        optional = default_of(line.command, group) == "null"
        if name not in names_in(group) and not (optional and name == "null"):
            yield group, f"{group}={_brief(name)} is unknown: {nearest(name, names_in(group))}"


def _clashes(command: str, groups: Mapping[str, str]) -> Iterator[str]:
    """Keys that the recipe sets and that a preset chosen on the command line does not have."""
    from lmkit.keys import keys_of

    if groups.get("recipe", "null") == "null":
        return
    known, recipe = keys_of(command, groups), values_in(f"recipe/{groups['recipe']}")
    for group, name in groups.items():
        lacking = [f"{group}.{key}" for key in recipe.get(group) or {} if f"{group}.{key}" not in known]
        if lacking:
            yield (
                f"recipe={groups['recipe']} sets {', '.join(lacking)}, which {group}={name} does not have: "
                f"leave out the recipe or {group}={name}"
            )


@functools.cache
def values_in(name: str) -> Mapping[str, Any]:
    """What a file of the presets sets, as ``recipe/ptb_vae`` or ``pretrain``: key or group -> value or values."""
    from omegaconf import OmegaConf

    from lmkit.presets import config_dir

    values = OmegaConf.to_container(OmegaConf.load(config_dir() / f"{name}.yaml"))
    return {str(k): v for k, v in values.items() if k != "defaults"} if isinstance(values, dict) else {}


def _foreign_rate(line: Line, groups: Mapping[str, str]) -> Iterator[str]:
    """A learning rate that the recipe sets for another kind of optimizer than the one that is chosen on the line.

    What Adam and its kin take is alike; what SGD takes is a thousand times as much.
    """
    from lmkit.config import SCHEMAS
    from lmkit.config.optimization import AdamConfig
    from lmkit.presets import recipe_choices, schema_name

    recipe, own = groups.get("recipe", "null"), groups.get("optimizer")
    if recipe == "null" or own is None or "optimizer.lr" in line.values:
        return
    if "lr" not in (values_in(f"recipe/{recipe}").get("optimizer") or {}):
        return
    theirs = recipe_choices(recipe).get("optimizer", own)
    kinds = [SCHEMAS["optimizer"][schema_name("optimizer", name) or ""] for name in (own, theirs)]
    if kinds[0] is not kinds[1] and not all(issubclass(kind, AdamConfig) for kind in kinds):
        yield f"recipe={recipe} sets optimizer.lr for optimizer={theirs}: set that of optimizer={own}, too"


@functools.cache
def _hydra_compose(command: str, groups: tuple[tuple[str, str], ...]) -> DictConfig:
    """Root, presets and recipe; kept, since the jobs of a multirun often differ in values only."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from lmkit.presets import config_dir

    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
        return hydra_compose(command, [f"{group}={name}" for group, name in groups])


@functools.cache
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


def _set(config: DictConfig, line: Line, groups: Mapping[str, str], key: str, value: str) -> str | None:
    """Set one key; the problem as text if that cannot be done."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from lmkit.keys import choices, keys_of, type_text
    from lmkit.presets import nearest

    hints = keys_of(line.command, groups)
    if key not in hints:
        return _unknown(line.command, groups, key, value)
    if "${" in value:
        return f"{key}={_brief(value)}: nothing is interpolated: '${{' is not allowed in a value"
    if key in PATH_KEYS and not value:
        return f"{key}= is empty: give a path{', or null' if type_text(hints[key]).endswith('null') else ''}"
    converted = _converted(key, value, hints[key])
    if MISSING in (converted if isinstance(converted, list) else [converted]):
        return f"{key}={_brief(value)}: {MISSING} stands for a value that must be given, and cannot be one"
    try:
        OmegaConf.update(config, key, converted)
    except (OmegaConfBaseException, ValueError):
        names = choices(hints[key])
        near = f": {nearest(value, names)}" if len(names) > 2 and not nearest(value, names).startswith("choose") else ""
        return f"{key}={_brief(value)} must be {type_text(hints[key])}{near}"
    return None


def _unknown(command: str, groups: Mapping[str, str], key: str, value: str) -> str:
    """What to say about a key that the composed configuration does not have."""
    from lmkit.arguments import option_names
    from lmkit.config import SCHEMAS
    from lmkit.keys import keys_of, presets_with
    from lmkit.presets import chosen, groups_of, nearest

    group = key.partition(".")[0]
    if group not in groups_of(command) and group in (*SCHEMAS, "recipe"):
        from_run = group in ("model", "tokenizer") and command != "prepare"
        why = f"{command} takes the {group} from the run" if from_run else f"{command} takes no {group}"
        return f"unknown key {_brief(key)!r}: {why}"
    presets = chosen(command, groups)
    if having := presets_with(command, key):
        if presets[group] == "null":
            return f"{key} needs a {group}: add {group}=NAME"
        return f"{key} is not a key of {group}={presets[group]} but of {', '.join(having)}"
    known = keys_of(command, groups)
    if key == "run.path" and "run.dir" in known:
        return f"{command} uses no existing run: run.dir=DIR says where the new run is made"
    if key == "run.dir" and "run.path" in known:
        return f"{command} makes no run: run=DIR names the run to use"
    if key in ("run.path", "run.dir"):
        return f"{command} neither uses nor makes a run: leave out {'run' if key == 'run.path' else key}"
    inside = [k for k in known if k.startswith(f"{key}.")]
    if inside:
        return f"{key}={_brief(value)} cannot be set as a whole: set {', '.join(inside[:3])}"
    return f"unknown key {_brief(key)!r}: {nearest(key, [*known, *groups_of(command), *option_names(command)])}"


def _converted(key: str, text: str, hint: Any) -> Any:
    """What a text means for a key: null, a path with its ``~``, a list, or what the key's type makes of it."""
    if text in NULL:
        return None
    if typing.get_origin(hint) is list:
        if text[:1] == "[" and text[-1:] == "]":
            return [part.strip() for part in text[1:-1].split(",") if part.strip()]
        return text.split(",") if text else []
    return os.path.expanduser(text) if key in PATH_KEYS else text


def _brief(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}... ({len(text)} characters)"


def _beside_weights(config: DictConfig, line: Line) -> Iterator[str]:
    """What does nothing, since ``init.weights`` brings model and tokenizer: a tokenizer that is chosen, and all keys
    of the model but those that set one of its regularisers.

    Here and not in the command, which cannot tell what was given from what a preset says.
    """
    from omegaconf import OmegaConf

    from lmkit.config.model import REGULARISERS, TransformerConfig

    if line.command != "pretrain" or not line.gives("init.weights"):
        return
    weights = _brief(line.values["init.weights"])
    for key, value in line.values.items():
        group, _, name = key.partition(".")
        plain = name not in REGULARISERS or OmegaConf.select(config, key) == getattr(TransformerConfig, name)
        if group == "model" and plain:
            yield (
                f"{key}={_brief(value)} has no use with init.weights={weights}, whose model it is, but for"
                f" {', '.join(REGULARISERS)} that are not at their defaults"
            )
    named = {"tokenizer": line.groups["tokenizer"]} if "tokenizer" in line.groups else {}
    for key, value in {**named, **line.values}.items():
        if key.partition(".")[0] == "tokenizer":
            yield f"{key}={_brief(value)} has no use with init.weights={weights}, which brings a tokenizer"


def _beside_task(line: Line) -> Iterator[str]:
    """What names a corpus where the task reads rows of its own, and the corpus of the run that it starts from is kept.

    Beside ``init.weights``, where there is no such run, it is the one that is kept.
    """
    task = line.groups.get("task", "lm")
    if line.command != "finetune" or task == "lm" or line.gives("init.weights"):
        return
    named = {"dataset": line.groups["dataset"]} if "dataset" in line.groups else {}
    for key, value in {**named, **line.values}.items():
        if key.partition(".")[0] == "dataset":
            yield f"{key}={_brief(value)} has no use with task={task}, which reads task.data: leave it out"


def _missing(config: DictConfig) -> list[str]:
    from omegaconf import OmegaConf

    return [f"{key} must be given: for example {key}=VALUE" for key in sorted(map(str, OmegaConf.missing_keys(config)))]


def to_yaml(config: DictConfig) -> str:
    """The configuration as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(config)


def to_dataclass(config: DictConfig) -> Any:
    """The typed configuration; runs the dataclasses' own checks. Raises ConfigError with everything they find."""
    from omegaconf import OmegaConf

    try:
        made = OmegaConf.to_object(config)
    except ConfigError:
        raise ConfigError("; ".join(_refused(config))) from None
    if not is_dataclass(made):
        raise TypeError(f"the configuration became a {type(made).__name__}")
    too_large = []
    for key, value in _numbers(made):  # of those that no check has refused
        if isinstance(value, int) and abs(value) >= 2**63:
            too_large.append(f"{key}={_brief(str(value))} must be below 2^63")
        elif isinstance(value, float) and not math.isfinite(value):  # a checkpoint, which is JSON, could not hold it
            too_large.append(f"{key}={value} must be finite")
    if too_large:
        raise ConfigError("; ".join(too_large))
    return made


def _numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a configuration with their keys."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _numbers(value, f"{prefix}{field.name}.")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float):
                yield f"{prefix}{field.name}", number


def _refused(config: DictConfig) -> list[str]:
    """What the checks say of every dataclass inside, and of this one with its refused members left at defaults."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    found, rest = [], config
    for name in config:
        node = config._get_node(name)
        if isinstance(node, DictConfig) and not (node._is_none() or node._is_missing()) and (inner := _refused(node)):
            found += inner
            rest = config.copy() if rest is config else rest
            rest[name] = OmegaConf.structured(OmegaConf.get_type(node))
    try:
        OmegaConf.to_object(rest)
    except ConfigError as error:
        found.insert(0, str(error))
    except OmegaConfBaseException:
        pass  # a default that must be given; what is wrong with the members has been found
    return found
