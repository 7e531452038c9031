"""Errors that people see: one clear line each, and the documented exit code.

A message names the file, key or value that is wrong; ``remedy`` says what to do about it. The command line prints
``error: <problem>; <remedy>`` and exits with ``exit_code``; a traceback is shown only with ``debug=true``.
"""

from __future__ import annotations

import re


class LmkitError(Exception):
    """Base of every error that lmkit raises for people. Exit code 1 is left to bugs and is never raised on purpose."""

    exit_code = 1
    stopping = False
    """Whether a signal had asked to stop before, so that no further job is to begin."""

    def __init__(self, problem: str, remedy: str | None = None) -> None:
        super().__init__(problem if remedy is None else f"{problem}; {remedy}")
        self.problem = problem
        self.remedy = remedy


class ConfigError(LmkitError):
    """A wrong command, option, key or value (exit code 2)."""

    exit_code = 2


class DataError(LmkitError):
    """A corpus, prepared data or tokenizer that is missing, damaged or does not match (exit code 3)."""

    exit_code = 3


class CheckpointError(LmkitError):
    """A run or checkpoint that is missing, damaged or does not fit (exit code 4)."""

    exit_code = 4


class RunLockedError(LmkitError):
    """The run directory is in use by another process (exit code 5)."""

    exit_code = 5


class ResourceError(LmkitError):
    """Not enough disk or memory, a device that is not there, a missing optional package (exit code 6)."""

    exit_code = 6


LITTLE_MEMORY = 64 << 20
"""Bytes that a process which is not out of memory can have."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python had no memory for something, on the card or on the host; torch is not imported.

    Without memory a function of Python's own may fail and not say why, which is a SystemError.
    """
    if isinstance(error, SystemError):
        try:
            bytearray(LITTLE_MEMORY)
        except MemoryError:
            return True
    texts = (
        *("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC", "CUDNN_STATUS_ALLOC"),
        *("Storage size calculation overflowed", "array is too big"),  # more bytes than an address can tell
    )
    kind = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kind or any(text in str(error) for text in texts)


def undetermined(error: BaseException) -> ConfigError | None:
    """The error for people where torch refuses an operation under ``device.deterministic``; torch is not imported."""
    text = str(error)
    if not isinstance(error, RuntimeError) or "torch.use_deterministic_algorithms(True)" not in text:
        return None
    found = re.match(r"(\S+) does not have a deterministic implementation", text)
    return ConfigError(
        f"device.deterministic=true, but torch has no deterministic {found[1] if found else 'product'} there",
        "leave device.deterministic out, or use device=cpu",
    )


class DivergedError(LmkitError):
    """Loss, gradient or logits are not finite (exit code 7)."""

    exit_code = 7


class StoppedError(LmkitError):
    """Stopped on request after saving; running again with ``resume=true`` continues (exit code 75, EX_TEMPFAIL)."""

    exit_code = 75
