"""``-m``: one job for each combination of comma-separated values, in order, in this process."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING

from lmkit.errors import ConfigError, LmkitError

if TYPE_CHECKING:
    from lmkit.cli import Line


def combinations(line: Line) -> list[tuple[dict[str, str], dict[str, str]]]:
    """(groups, values) of every job; a value with commas stands for several, the last one varies fastest."""
    choices = {**line.groups, **line.values}
    lists = [_split(value) for value in choices.values()]
    jobs = []
    for picked in itertools.product(*lists):
        chosen = dict(zip(choices, picked, strict=True))
        groups = {key: value for key, value in chosen.items() if key in line.groups}
        jobs.append((groups, {key: value for key, value in chosen.items() if key in line.values}))
    return jobs


def _split(value: str) -> list[str]:
    if value[:1] == "[" and value[-1:] == "]":
        return [value]
    return [part.strip() for part in value.split(",")]


def sweep(line: Line) -> int:
    """Run every job, also after one has failed; returns the worst exit code.

    All jobs are composed before the first one runs, so that a typo costs nothing. A ``run.dir`` gets a subdirectory
    for each job.
    """
    from lmkit.cli import compose, run_command, to_dataclass

    jobs = combinations(line)
    if "run.dir" in line.values and len(jobs) > 1:
        for number, (_, values) in enumerate(jobs):
            values["run.dir"] = f"{values['run.dir']}/{number}"
    configs = [to_dataclass(compose(line.command, groups, values)) for groups, values in jobs]
    if not configs:
        raise ConfigError("-m has nothing to run")
    worst = 0
    for number, ((groups, values), config) in enumerate(zip(jobs, configs, strict=True)):
        words = " ".join(f"{key}={value}" for key, value in {**groups, **values}.items())
        print(f"job {number + 1} of {len(jobs)}: {words}", file=sys.stderr)
        try:
            run_command(line, config)
        except LmkitError as error:
            print(f"error: job {number + 1}: {error}", file=sys.stderr)
            worst = max(worst, error.exit_code)
    return worst
