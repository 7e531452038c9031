"""Encoding text and counting words on all cores.

Python does either on one core, so the children are processes: fresh interpreters that are fed through their pipes, each
by a thread of its own, and answer in plain bytes. A child ends with its pipe, however this process ends. The first
``HERE_CHARS`` are dealt with in this process, since most texts are shorter and a child takes a moment to start.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, TypeVar

import numpy as np

from lmkit.data.cleaning import Piece
from lmkit.errors import DataError, ResourceError
from lmkit.tokenizers import KINDS, SentencePieceTokenizer, Tokenizer, basic
from lmkit.tokenizers.base import Ids, one_line
from lmkit.tokenizers.probe import environment

HERE_CHARS = 8 << 20
MAX_CHILDREN = 8
"""More of them would wait for the process that reads, counts and writes."""
_GROUP_CHARS, _GROUP_TEXTS = 1 << 20, 4096
_SIZE = np.dtype("<u8")
_IDS = np.dtype("<i4")
_COUNT = "count"
"""Task of a child that counts words, beside the kinds of tokenizers."""
_FAILED = 1 << 40
"""In place of the number of answers: one follows, which is an error."""

Item = tuple[str, Piece]
T = TypeVar("T")


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def encoded(tokenizer: Tokenizer, items: Iterable[Item]) -> Iterator[tuple[str, Piece, Ids]]:
    """The (split, piece) of a corpus in order, with the ids of each piece's text. Raises what ``encode`` raises."""
    items = iter(items)
    for split, piece in _first(items, lambda item: len(item[1].text), not tokenizer.encodes_slowly):
        yield split, piece, tokenizer.encode(piece.text)
    if (rest := next(items, None)) is None:
        return
    with _Children(tokenizer.kind, tokenizer.content()) as children:
        groups = _groups(items, rest, lambda item: len(item[1].text))
        for group, answers in children.ordered(groups, lambda item: item[1].text):
            for (split, piece), answer in zip(group, answers, strict=True):
                yield split, piece, np.frombuffer(answer, _IDS).astype(np.int64)


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word, between white space, is in the texts."""
    texts = iter(texts)
    counts = basic.count_words(_first(texts, len, False))
    if (rest := next(texts, None)) is None:
        return counts
    with _Children(_COUNT) as children:
        for _ in children.ordered(_groups(texts, rest, len), str):
            pass
        for words, numbers in children.finish():
            found = np.frombuffer(numbers, _SIZE).tolist()
            counts.update(dict(zip(words.decode("utf-8", "surrogatepass").split(), found, strict=True)))
    return counts


def _first(items: Iterator[T], size: Callable[[T], int], all_here: bool) -> Iterator[T]:
    """The items that are dealt with in this process."""
    alone = all_here or usable_cores() == 1
    seen = 0
    while (alone or seen < HERE_CHARS) and (item := next(items, None)) is not None:
        seen += size(item)
        yield item


def _groups(items: Iterator[T], first: T, size: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of items of about _GROUP_CHARS together, so that short documents do not each cost a message."""
    group, chars = [first], size(first)
    for item in items:
        if chars >= _GROUP_CHARS or len(group) == _GROUP_TEXTS:
            yield group
            group, chars = [], 0
        group.append(item)
        chars += size(item)
    yield group


class _Children:
    """As many child processes as there are cores, all with the same task."""

    def __init__(self, task: str, content: bytes = b"") -> None:
        """task: the kind of the tokenizer, and its content; or _COUNT."""
        self._number = min(usable_cores(), MAX_CHILDREN)
        self._command = [sys.executable, "-P", "-c", f"from {__name__} import child; child()", task]
        self._content = content
        self._processes: list[subprocess.Popen[bytes]] = []
        self._free: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

    def __enter__(self) -> _Children:
        with contextlib.ExitStack() as stack:
            for _ in range(self._number):
                self._processes.append(stack.enter_context(_running(self._command)))
                self._free.put(self._processes[-1])
            for process in self._processes:
                _exchange(process, 0, [self._content])
            self._threads = stack.enter_context(ThreadPoolExecutor(self._number, thread_name_prefix="encode"))
            stack.callback(self._kill)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _kill(self) -> None:
        """Threads that wait for an answer get the end of the pipe."""
        for process in self._processes:
            process.kill()

    def ordered(
        self, groups: Iterable[list[T]], text: Callable[[T], str]
    ) -> Iterator[tuple[list[T], list[memoryview]]]:
        """Each group with the answers to its texts, in order; a few groups are under way at any time."""
        waiting: deque[tuple[list[T], Future[list[memoryview]]]] = deque()
        for group in groups:
            waiting.append((group, self._threads.submit(self._ask, [text(item) for item in group])))
            if len(waiting) > 2 * self._number:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()

    def finish(self) -> Iterator[tuple[bytes, bytes]]:
        """What each child answers at the end. Nothing else may be under way."""
        for process in self._processes:
            words, numbers = _exchange(process, 0, [])
            yield bytes(words), bytes(numbers)

    def _ask(self, texts: list[str]) -> list[memoryview]:
        process = self._free.get()
        try:
            return _exchange(process, len(texts), [text.encode("utf-8", "surrogatepass") for text in texts])
        finally:
            self._free.put(process)


@contextlib.contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
            start_new_session=True,  # signals of the terminal are for the process that asks
        )
    except OSError as error:
        raise ResourceError(
            f"no process can be started to encode the text: {error.strerror or error}", "end other processes"
        ) from None
    try:
        yield process
    finally:
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        process.wait()


def _exchange(process: subprocess.Popen[bytes], number: int, parts: list[bytes]) -> list[memoryview]:
    """What a child answers to a message. Raises the DataError that it met, or ResourceError if it has died."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        _send(process.stdin, number, parts)
        number, answers = _receive(process.stdout)
    except (OSError, EOFError):
        code = process.wait()
        remedy = "memory may have run out: end other processes" if code < 0 else "run it again"
        raise ResourceError(f"a process that encodes the text died (exit code {code})", remedy) from None
    if number == _FAILED:
        problem, remedy = json.loads(bytes(answers[0]))
        raise DataError(problem, remedy)
    return answers


def _send(stream: IO[bytes], number: int, parts: list[bytes]) -> None:
    """A message: a number, how many parts there are, their sizes, the parts."""
    stream.write(np.array([number, len(parts), *map(len, parts)], _SIZE).tobytes())
    for part in parts:
        stream.write(part)
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[int, list[memoryview]]:
    """The inverse of ``_send``. Raises EOFError where the message does not come to its end."""
    number, num_parts = np.frombuffer(_read(stream, 2 * _SIZE.itemsize), _SIZE).tolist()
    ends = np.cumsum(np.frombuffer(_read(stream, num_parts * _SIZE.itemsize), _SIZE)).tolist()
    data = _read(stream, ends[-1] if ends else 0)
    return number, [data[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _read(stream: IO[bytes], size: int) -> memoryview:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError
    return memoryview(data)


def child() -> None:
    """What runs in a child: answers the messages of its standard input until that ends."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):  # the process that asks decides what they mean
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    source, target = sys.stdin.buffer, sys.stdout.buffer
    answer: _Answer | None = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            number, parts = _receive(source)
            answers: list[bytes] = []
            try:
                if answer is None:
                    answer = _answering(sys.argv[1], bytes(parts[0]))
                else:
                    answers = answer([bytes(part).decode("utf-8", "surrogatepass") for part in parts])
            except DataError as error:
                number, answers = _FAILED, [json.dumps([error.problem, error.remedy]).encode()]
            except Exception as error:
                number, answers = _FAILED, [json.dumps([f"a text cannot be encoded: {one_line(error)}", None]).encode()]
            _send(target, number, answers)


_Answer = Callable[[list[str]], list[bytes]]


def _answering(task: str, content: bytes) -> _Answer:
    """What a child does with texts: the ids of each; or, where words are counted, the counts when there are no more."""
    if task != _COUNT:
        tokenizer = KINDS[task].from_content(content)
        if isinstance(tokenizer, SentencePieceTokenizer):
            tokenizer.num_threads = 1
        return lambda texts: [tokenizer.encode(text).astype(_IDS).tobytes() for text in texts]
    counts: Counter[str] = Counter()

    def count(texts: list[str]) -> list[bytes]:
        counts.update(basic.count_words(texts))
        if texts:
            return []
        words = "\n".join(counts).encode("utf-8", "surrogatepass")
        return [words, np.array(list(counts.values()), _SIZE).tobytes()]

    return count
