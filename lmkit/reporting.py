"""What a command line says in the end: the one line of an error and its exit code, whatever the streams can show."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from lmkit.console import Console
from lmkit.errors import LmkitError, ResourceError, is_out_of_memory, undetermined
from lmkit.store.storage import MORE_FILES

LESS_MEMORY = {
    "pretrain": "lower train.batch_size, train.micro_batch_size or train.seq_len",
    "finetune": "lower train.batch_size, train.micro_batch_size or train.seq_len (task.max_tokens where the task is"
    " classify or regress)",
    "eval-ppl": "lower batch_size or seq_len",
    "generate": "lower num_samples or max_new_tokens",
}
"""Command -> what makes it need less memory."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""
FIRST_S = 30.0
"""So long a process of several waits for the first one to say what is wrong before they have joined each other."""


@contextlib.contextmanager
def interrupted_at_once() -> Iterator[None]:
    """Context in which Ctrl-C ends the process on the spot; there is nothing yet to be saved or tidied up.

    It is for imports and what else may lose an exception: libraries that go on without what they were kept from
    importing abort, or fail later with an error that tells nothing of the interruption. Elsewhere than in the main
    thread, and where somebody has set another handler, nothing changes.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"error: interrupted\n")  # a stream may be in the middle of a line
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def said_by_first() -> Iterator[None]:
    """Context in which what is wrong in all processes, before they join each other, is said by the first of them.

    When that one has left, torchrun ends the others on its machine. One that is still there has met the error alone.
    """
    try:
        yield
    except LmkitError as error:
        distributed = sys.modules.get("lmkit.distributed")  # imported by the commands that train
        joined = distributed is not None and distributed.has_joined(error)
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0" and not joined:
            time.sleep(FIRST_S)
        raise


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun has started, or on its own."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"


def report(error: BaseException, command: str, *, debug: bool, where: str = "") -> int:
    """Print an error as one line, with a traceback before it if ``debug``; returns its exit code.

    Standard error may be closed or full, as after a lost connection: the exit code is right all the same.
    """
    message, code = _described(error, command)
    console = Console()
    if debug and not isinstance(error, KeyboardInterrupt):
        import traceback

        console.say("".join(traceback.format_exception(error)).rstrip())
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.splitlines()))
    console.say(f"error: {where}{line}")
    return code


def _described(error: BaseException, command: str) -> tuple[str, int]:
    text = " ".join(str(error).splitlines())
    name = type(error).__name__
    if isinstance(error, LmkitError):
        if _lacks_descriptors(error) and MORE_FILES not in text:  # nothing is wrong with what could not be read
            return f"{' '.join(error.problem.splitlines())}; {MORE_FILES}", ResourceError.exit_code
        return text, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if is_out_of_memory(error):
        return "; ".join(filter(None, ["out of memory", LESS_MEMORY.get(command)])), ResourceError.exit_code
    if (refused := undetermined(error)) is not None:
        return str(refused), refused.exit_code
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        remedy = f"; {MORE_FILES}" if _lacks_descriptors(error) else ""
        return f"{error.strerror or text or name}{where}{remedy}", ResourceError.exit_code
    hint = "a bug in lmkit; debug=true shows where"
    return f"{name}: {text} ({hint})" if text else f"{name} ({hint})", 1


def _lacks_descriptors(error: BaseException | None) -> bool:
    """Whether an error comes from the limit of open files."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            return True
        error = error.__cause__ or error.__context__
    return False


def show(text: str, end: str = "\n") -> None:
    """Print to standard output; a character that its encoding lacks becomes a question mark."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    sys.stdout.write((text + end).encode(encoding, "replace").decode(encoding))


def open_missing_streams() -> None:
    """Where a standard stream was closed by the caller, read nothing from it and write to nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open to the end, as they are


def reader_is_gone() -> bool:
    """True if standard output is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on Windows, no descriptor in a test
        return True


def discard_stdout() -> None:
    """Throw away what standard output still holds if it cannot be written, so that Python does not try at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
