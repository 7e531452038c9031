"""Exit codes and messages of what goes wrong while a command runs."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmkit import cli, errors

CODES = {
    errors.ConfigError: 2,
    errors.DataError: 3,
    errors.CheckpointError: 4,
    errors.RunLockedError: 5,
    errors.ResourceError: 6,
    errors.DivergedError: 7,
    errors.StoppedError: 75,
}


class OutOfMemoryError(RuntimeError):
    """Named like torch's, which must not be imported here."""


def test_every_error_for_people_has_its_documented_code() -> None:
    assert set(errors.LmkitError.__subclasses__()) == set(CODES)


@pytest.mark.parametrize(("kind", "code"), CODES.items(), ids=lambda x: getattr(x, "__name__", str(x)))
def test_an_error_ends_the_command_with_one_line_and_its_code(
    lmkit: Any, kind: type[errors.LmkitError], code: int
) -> None:
    lmkit.error = kind("file  x is wrong", "mend it")
    assert lmkit("pretrain") == code
    assert lmkit.err == "error: file  x is wrong; mend it\n"
    assert lmkit.out == ""


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (MemoryError(), 6, "out of memory; lower train.batch_size"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 6, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 6, "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), 6, "out of memory"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x"), 6, "No space left on device: runs/x"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("shapes (3, 4)\n and 5"), 1, "RuntimeError: shapes (3, 4)  and 5 (a bug in lmkit; debug=true"),
        (ValueError(), 1, "ValueError (a bug in lmkit"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else None,
)
def test_other_errors_are_one_line_too(lmkit: Any, error: BaseException, code: int, part: str) -> None:
    lmkit.error = error
    assert lmkit("pretrain") == code
    assert part in lmkit.err
    assert lmkit.err.startswith("error: ")
    assert lmkit.err.count("\n") == 1


def test_the_advice_on_memory_is_about_the_command(lmkit: Any) -> None:
    lmkit.error = MemoryError()
    lmkit("eval-ppl")
    assert "lower batch_size" in lmkit.err
    lmkit("finetune")
    assert "train.seq_len (task.max_tokens where the task is classify or regress)" in lmkit.err
    lmkit("prepare")
    assert lmkit.err == "error: out of memory\n"


@pytest.mark.parametrize("words", [["debug=true"], ["--debug"], ["--debug=true"], ["--debug", "true"], ["debug=1"]])
def test_a_traceback_is_shown_on_request_only(lmkit: Any, words: list[str]) -> None:
    for lmkit.error in (RuntimeError("oops"), errors.DataError("no data")):
        lmkit("generate", "--prompt", "debug=true", "debug=false")
        assert "Traceback" not in lmkit.err
        lmkit("generate", *words)
        assert "Traceback" in lmkit.err
        assert lmkit.err.splitlines()[-1].startswith("error: ")


def test_success_is_silent(lmkit: Any) -> None:
    assert lmkit("pretrain") == 0
    assert (lmkit.out, lmkit.err) == ("", "")


def test_a_closed_pipe_is_no_error() -> None:
    code = "import sys; from lmkit.cli import main; sys.exit(main(['pretrain', '--help']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        code = "import sys; from lmkit.cli import main; sys.exit(main(['--help']))"
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 6
    assert done.stderr == "error: No space left on device\n"


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("words", [["pretrain"], ["pretrain", "debug=true"], ["pretrain", "-m", "seed=1,2"]])
def test_a_full_disk_behind_standard_error_changes_no_exit_code_and_ends_no_multirun(
    lmkit: Any, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    lmkit.error = errors.DataError("no data")
    monkeypatch.setattr(sys, "stderr", Full())
    assert cli.main(words) == 3
    assert len(lmkit.configs) == (2 if "-m" in words else 1)


@pytest.mark.parametrize(
    "words", [["--help"], ["pretrain", "--cfg", "job"], ["pretrain", "-x"], ["generate", "-p", "-"]]
)
def test_closed_standard_streams_are_no_error(lmkit: Any, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    for stream in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, stream, None)
    assert cli.main(words) == (2 if "-x" in words else 0)
    assert lmkit.prompts == ([[""]] if "generate" in words else [])
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()


def test_a_terminal_without_unicode_gets_question_marks() -> None:
    words = [["pretrain", "--cfg", "job", "run.root=我"], ["pretrain", "-m", "--cfg", "job", "run.root=我"]]
    code = f"from lmkit.cli import main; print([main(w) for w in {[*words, ['pretrain', 'seed=我']]}])"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert done.stdout.count(b"root: ?") == 2
    assert b"[0, 0, 2]" in done.stdout
    assert b"seed=?" in done.stderr


SWALLOWED = """
import signal, sys
from lmkit import cli

class Swallowing:
    def find_spec(self, name, path, target=None):
        if name == "lmkit.commands.prepare":
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                pass

sys.meta_path.insert(0, Swallowing())
sys.exit(cli.main(["prepare", "dataset=text", "dataset.path=none"]))
"""


def test_an_interruption_that_a_library_swallows_while_it_is_imported_ends_the_command() -> None:
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (130, "error: interrupted\n", "")
