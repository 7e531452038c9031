"""Whether the libraries that lmkit needs are there, and not too old: said in one line instead of found out later."""

from __future__ import annotations

import functools
from importlib import metadata

from lmkit.errors import ConfigError


@functools.cache
def check_installed() -> None:
    """Raise ConfigError naming all required libraries that are missing or older than lmkit needs; looks once a process.

    The metadata that lmkit was installed with say which those are; without them (a checkout on PYTHONPATH) nothing is
    checked. A library that is newer than what was tested is left to the installer.
    """
    from packaging.requirements import Requirement  # takes 20 ms, which ``lmkit --help`` need not wait for

    try:
        required = [Requirement(line) for line in metadata.requires("lmkit") or []]
    except metadata.PackageNotFoundError:
        return
    problems, wanted = [], []
    for requirement in required:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = None
        least = [spec for spec in requirement.specifier if spec.operator == ">="]
        if found is None or not all(spec.contains(found, prereleases=True) for spec in least):
            here = "is not installed" if found is None else f"{found} is installed"
            problems.append(f"{requirement.name} {here}, lmkit needs {', '.join(map(str, least)) or 'it'}")
            wanted.append(f"'{requirement.name}{requirement.specifier}'")
    if problems:
        raise ConfigError("; ".join(problems), f"pip install {' '.join(wanted)}")
