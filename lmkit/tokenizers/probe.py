"""A foreign tokenizer file is loaded and tried in a child process first, where a crash or an endless loop harms nobody.

sentencepiece and tokenizers are native libraries: what a crafted file makes of them may be an abort, a wild read, all
the memory there is, or a regular expression that never ends, none of which is an exception here. The child has limits
of time and memory; the file is loaded in this process only after the child has come to a good end.
What has come to one is remembered in the user's cache folder, by its digest and the version of the library, so that it
is tried once by each.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import lmkit
from lmkit.errors import DataError, ResourceError
from lmkit.store.cache import cache_dir
from lmkit.tokenizers.base import Tokenizer, digest_of, one_line

CPU_SECONDS = 20
WALL_SECONDS = 60.0
MEMORY_BYTES = 3 << 30
"""Address space of the child, where the system can limit it (not on Windows and macOS)."""

SAMPLE = "".join(map(chr, (*range(1, 0xD800), *range(0xE000, 0x10000)))) + "".join(
    chr(code) * 200 for code in range(0x20, 0x7F)
)
"""About 250 kB: every character of the basic plane, then runs, which make a careless regular expression slow."""

_REFUSED = 3


def try_in_child(cls: type[Tokenizer], content: bytes) -> None:
    """Raises DataError if a tokenizer of this class cannot be made of ``content`` and used within the limits, and
    ResourceError if no process can be started.

    Content that was found good before by the same version of the library is not tried again; where the cache folder
    cannot be written it is.
    """
    note = _note(cls, digest_of(cls.kind, content))
    if os.path.isfile(note):
        return
    command = [sys.executable, "-P", "-c", f"from {__name__} import child; child()", cls.kind]
    command += [str(CPU_SECONDS), str(MEMORY_BYTES)]
    try:
        done = subprocess.run(
            command, input=content, capture_output=True, env=environment(), timeout=WALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"it takes more than {WALL_SECONDS:.0f} s to load and try") from None
    except OSError as error:
        raise ResourceError(
            f"no process can be started to try the tokenizer: {error.strerror or error}", "end other processes"
        ) from None
    if done.returncode == _REFUSED:
        raise DataError(done.stdout.decode("utf-8", "replace"))
    if done.returncode != 0:
        raise DataError(
            f"the library that reads it crashed, or needed more than {CPU_SECONDS} s or {MEMORY_BYTES >> 30} GB"
            f" (exit code {done.returncode} of the child that tried it)"
        )
    _make(note)


def environment() -> dict[str, str]:
    """Of a child process: where this one found lmkit, the child finds it, too."""
    paths = [str(Path(lmkit.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def vouch(tokenizer: Tokenizer) -> None:
    """Remember a tokenizer that was made here, and not read, as good: it need never be tried."""
    if tokenizer.side_file is not None:
        _make(_note(type(tokenizer), tokenizer.digest))


def _note(cls: type[Tokenizer], digest: str) -> Path:
    """The empty file that says that the library, as it is installed, has made a good end of content of this digest."""
    return cache_dir() / "tried" / f"{digest}-{cls.library}-{_version(cls.library)}"


def _version(library: str | None) -> str:
    """The version of a distribution, from its metadata: the library is not imported."""
    from importlib import metadata  # takes longer to import than all of the rest here

    try:
        return metadata.version(library or "")
    except (metadata.PackageNotFoundError, ValueError):
        return "unknown"


def _make(note: Path) -> None:
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def child() -> None:
    """What runs in the child: standard input holds the content, the exit code says whether it can be used."""
    from lmkit.tokenizers import KINDS

    kind, cpu_seconds, memory_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    content = sys.stdin.buffer.read()
    _limit(cpu_seconds, memory_bytes)
    try:
        tokenizer = KINDS[kind].from_content(content)
        with contextlib.suppress(DataError):  # e.g. no <unk>, which a text may never need
            tokenizer.decode(tokenizer.encode(SAMPLE))
    except (DataError, ValueError, MemoryError) as error:
        sys.stdout.buffer.write(one_line(error).encode("utf-8", "replace"))
        sys.exit(_REFUSED)


def _limit(cpu_seconds: int, memory_bytes: int) -> None:
    if sys.platform == "win32":
        return
    import resource

    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
