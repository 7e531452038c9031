"""Files read in pieces, by the cache and past it."""

import ctypes
import errno
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmkit.store import reading, storage

PIECE = 8192
SIZES = (1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 9 * PIECE - 4095, 20 * PIECE + 17)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", PIECE)


def write(path: Path, num_bytes: int) -> bytes:
    data = os.urandom(num_bytes)
    storage.write_file(path, data)
    return data


def whole(file: Any, num_bytes: int, use: reading.Use, *, once: bool) -> Any:
    return reading.side_by_side([reading.read_whole(file, num_bytes, use, once=once)])[0]


def count(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """A list that grows with each call of a function of the module."""
    calls: list[Any] = []
    function: Callable[..., Any] = getattr(reading, name)

    def counted(*args: Any) -> Any:
        calls.append(args)
        return function(*args)

    monkeypatch.setattr(reading, name, counted)
    return calls


def needs_direct(path: Path) -> None:
    """Skip where the file system has no direct reading, or keeps all in memory."""
    if sys.platform != "linux":
        pytest.skip("O_DIRECT is Linux's")
    forget(path)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
        cached = is_cached(path)
    except OSError:
        pytest.skip("no O_DIRECT on this file system")
    if cached:
        pytest.skip("this file system forgets nothing")


def forget(path: Path) -> None:
    with storage.open_regular(path) as file:
        storage.drop_cache(file)


def is_cached(path: Path, start: int = 0) -> bool:
    """Whether a page is in memory, by mincore(2): unlike a read that does not wait, it brings nothing in."""
    page = start // mmap.PAGESIZE
    with storage.open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        held = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        address = ctypes.c_char.from_buffer(view)
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(address)), ctypes.c_size_t(len(view)), held)
        del address
        assert not failed
        return bool(held[page] & 1)


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("num_bytes", SIZES)
def test_all_bytes_arrive_in_order(tmp_path: Path, num_bytes: int, once: bool, cold: bool) -> None:
    data = write(tmp_path / "f", num_bytes)
    if cold:
        forget(tmp_path / "f")
    seen: list[bytes] = []
    with storage.open_regular(tmp_path / "f") as file:
        memory = whole(file, num_bytes, lambda piece: seen.append(bytes(piece)), once=once)
    assert memory.numpy().tobytes() == data
    assert b"".join(seen) == data
    through: list[bytes] = []
    with storage.open_regular(tmp_path / "f") as file:
        num_read = reading.read_through(file, num_bytes, lambda piece: through.append(bytes(piece)), from_disk=cold)
    assert num_read == num_bytes
    assert b"".join(through) == data


@pytest.mark.parametrize("once", [False, True])
def test_no_more_is_read_than_was_asked_for(tmp_path: Path, once: bool) -> None:
    data = write(tmp_path / "f", 9 * PIECE)
    forget(tmp_path / "f")
    with storage.open_regular(tmp_path / "f") as file:
        assert bytes(whole(file, 4 * PIECE + 9, len, once=once).numpy()) == data[: 4 * PIECE + 9]
        file.seek(0)
        assert reading.read_through(file, 4 * PIECE + 9, len, from_disk=once) == 4 * PIECE + 9


@pytest.mark.parametrize("num_bytes", [0, 1, PIECE + 1])
def test_a_look_at_the_beginning_leaves_the_file_there(tmp_path: Path, num_bytes: int) -> None:
    data = write(tmp_path / "f", 3 * PIECE)
    with storage.open_regular(tmp_path / "f") as file:
        assert reading.read_start(file, num_bytes) == data[:num_bytes]
        assert bytes(whole(file, len(data), len, once=False).numpy()) == data


@pytest.mark.parametrize("once", [False, True])
def test_an_empty_file_is_empty_memory(tmp_path: Path, once: bool) -> None:
    write(tmp_path / "f", 0)
    with storage.open_regular(tmp_path / "f") as file:
        assert len(whole(file, 0, len, once=once)) == 0
        assert reading.read_through(file, 0, len, from_disk=once) == 0


@pytest.mark.parametrize("once", [False, True])
def test_a_file_that_ends_early_gives_what_there_is(tmp_path: Path, once: bool) -> None:
    data = write(tmp_path / "f", 5 * PIECE + 100)
    forget(tmp_path / "f")
    with storage.open_regular(tmp_path / "f") as file:
        assert bytes(whole(file, 12 * PIECE, len, once=once).numpy()) == data
        file.seek(0)
        assert reading.read_through(file, 12 * PIECE, len, from_disk=once) == len(data)


@pytest.mark.parametrize("from_disk", [True, False])
@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_without_more_threads_the_disk_is_read_through_the_emptied_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int, from_disk: bool
) -> None:
    data = write(tmp_path / "f", 9 * PIECE + 5)
    needs_direct(tmp_path / "f")
    forget(tmp_path / "f")
    start, read_at = threading.Thread.start, reading._read_at
    started: list[threading.Thread] = []
    refused = threading.Event()
    dropped: list[Any] = []
    seen: list[bytes] = []

    def limited(thread: threading.Thread) -> None:
        if len(started) == num_threads:
            refused.set()
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    def slow(*args: Any) -> memoryview:
        refused.wait(60)  # so that none is idle when the next is wanted
        return read_at(*args)

    def use(piece: memoryview) -> None:
        seen.append(bytes(piece))

    monkeypatch.setattr(threading.Thread, "start", limited)
    monkeypatch.setattr(reading, "_read_at", slow)
    monkeypatch.setattr(reading, "drop_cache", dropped.append)
    with storage.open_regular(tmp_path / "f") as file:
        if from_disk:
            assert reading.read_through(file, len(data), use, from_disk=True) == len(data)
        else:
            assert bytes(whole(file, len(data), use, once=True).numpy()) == data
    assert b"".join(seen) == data
    assert dropped


def test_the_cache_is_passed_by_only_for_what_is_read_once_and_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "f", 9 * PIECE)
    needs_direct(tmp_path / "f")
    calls = count(monkeypatch, "_read_direct")

    def read(once: bool, cold: bool) -> int:
        (forget if cold else Path.read_bytes)(tmp_path / "f")
        before = len(calls)
        with storage.open_regular(tmp_path / "f") as file:
            whole(file, 9 * PIECE, len, once=once)
        return len(calls) - before

    assert read(once=True, cold=True) == 1
    assert read(once=True, cold=False) == 0
    assert read(once=False, cold=True) == 0
    forget(tmp_path / "f")
    with storage.open_regular(tmp_path / "f") as file:
        reading.read_start(file, 10)
        assert not reading._is_cached(file, 9 * PIECE)
    time.sleep(0.2)  # for what would be read ahead
    assert not is_cached(tmp_path / "f", PIECE)
    assert not is_cached(tmp_path / "f", 5 * PIECE + 4096)
    assert read(once=True, cold=True) == 1
    assert not any(is_cached(tmp_path / "f", number * PIECE) for number in range(9))


def test_the_disk_is_read_though_the_cache_holds_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "f", 9 * PIECE)
    needs_direct(tmp_path / "f")
    direct, dropped = count(monkeypatch, "_read_direct"), count(monkeypatch, "drop_cache")
    for from_disk in (False, True):
        with storage.open_regular(tmp_path / "f") as file:
            reading.read_through(file, 9 * PIECE, len, from_disk=from_disk)
        assert (len(direct), len(dropped)) == (int(from_disk), 0)
    monkeypatch.setattr(reading, "_open_direct", lambda file: None)
    with storage.open_regular(tmp_path / "f") as file:
        reading.read_through(file, 9 * PIECE, len, from_disk=True)
    assert (len(direct), len(dropped)) == (1, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="O_DIRECT is Linux's")
@pytest.mark.parametrize("refusal", ["open", "read", "short"])
def test_where_direct_reading_is_refused_the_cache_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    data = write(tmp_path / "f", 9 * PIECE + 5)
    needs_direct(tmp_path / "f")
    forget(tmp_path / "f")
    real_open, real_read = os.open, os.preadv
    direct: set[int] = set()

    def fake_open(path: Any, flags: int, *args: Any) -> int:
        if flags & os.O_DIRECT and refusal == "open":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        descriptor = real_open(path, flags, *args)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def fake_read(descriptor: int, rooms: Any, start: int, *args: int) -> int:
        if descriptor in direct and refusal == "read":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if descriptor in direct:
            return real_read(descriptor, [rooms[0][:4096]], start, *args)
        return real_read(descriptor, rooms, start, *args)

    monkeypatch.setattr(os, "open", fake_open)
    monkeypatch.setattr(os, "preadv", fake_read)
    with storage.open_regular(tmp_path / "f") as file:
        assert bytes(whole(file, len(data), len, once=True).numpy()) == data
    assert bool(direct) == (refusal != "open")


def test_a_system_that_does_not_say_what_is_cached_reads_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "f", 9 * PIECE)
    forget(tmp_path / "f")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    calls = count(monkeypatch, "_read_direct")
    with storage.open_regular(tmp_path / "f") as file:
        assert bytes(whole(file, len(data), len, once=True).numpy()) == data
    assert calls == []


@pytest.mark.skipif(sys.platform != "linux", reason="O_DIRECT is Linux's")
def test_errors_pass_and_nothing_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "f", 9 * PIECE)
    needs_direct(tmp_path / "f")

    def refuse(piece: memoryview) -> None:
        raise ValueError("stop")

    def fail(*args: Any) -> memoryview:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = sorted(os.listdir("/proc/self/fd"))
    forget(tmp_path / "f")
    with storage.open_regular(tmp_path / "f") as file, pytest.raises(ValueError, match="stop"):
        whole(file, 9 * PIECE, refuse, once=True)
    with storage.open_regular(tmp_path / "f") as file, pytest.raises(ValueError, match="stop"):
        reading.read_through(file, 9 * PIECE, refuse, from_disk=True)
    assert sorted(os.listdir("/proc/self/fd")) == before
    monkeypatch.setattr(reading, "_read_at", fail)
    with storage.open_regular(tmp_path / "f") as file, pytest.raises(OSError, match="Input/output error"):
        reading.read_through(file, 9 * PIECE, len, from_disk=True)
    assert sorted(os.listdir("/proc/self/fd")) == before


def parts(name: str, number: int, done: list[str]) -> reading.Job[str]:
    try:
        for part in range(number):
            done.append(name)
            yield (part + 1) / number
        return name.upper()
    finally:
        done.append(f"end of {name}")


def test_jobs_side_by_side_are_equally_far() -> None:
    done: list[str] = []
    jobs = [parts("a", 2, done), parts("b", 4, done), parts("none", 0, done)]
    assert reading.side_by_side(jobs) == ["A", "B", "NONE"]
    assert done == ["a", "b", "end of none", "b", "a", "b", "b", "end of a", "end of b"]


def test_an_error_in_one_job_ends_the_others_too() -> None:
    def failing() -> reading.Job[str]:
        yield 0.1
        raise OSError("gone")

    done: list[str] = []
    with pytest.raises(OSError, match="gone"):
        reading.side_by_side([parts("a", 3, done), failing()])
    assert done == ["a", "end of a"]
