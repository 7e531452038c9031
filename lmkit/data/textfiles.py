"""Text files as streams of blocks: found, decompressed, checked and decoded in bounded memory.

A file is UTF-8, plain or compressed with gzip or zstd. A byte-order mark at its start is removed and CRLF becomes
"\\n", on every platform alike; a lone CR and other Unicode line breaks (U+2028 ...) are kept, since lines end at "\\n"
only. Anything else (another encoding, another file type, a truncated archive) is a DataError that names the place.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lmkit.errors import DataError

BLOCK_BYTES = 1 << 20
"""Size of the blocks that are read, bytes."""
MAX_LINE_BYTES = 8 << 20
"""A longer line is handed on in several blocks, cut at white space where there is any."""
MAX_RATIO = 200
"""Text does not compress better than this; what does is an archive bomb."""
FREE_BYTES = 64 << 20
"""Only what decompresses to more than this is held to MAX_RATIO."""

_SETTLED_NS = 3_000_000_000
_COMPRESSIONS = (".gz", ".zst")
_TAR_MAGIC = slice(257, 262)
_MAGIC = {
    b"\x1f\x8b": "gzip data",
    b"\x28\xb5\x2f\xfd": "zstd data",
    **{bytes([0x50 + i]) + b"\x2a\x4d\x18": "zstd data" for i in range(16)},  # a frame to skip, as pzstd writes first
    b"\xfd7zXZ\x00": "xz data",
    b"BZh": "bzip2 data",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a parquet file",
    b"ARROW1": "an arrow file",
    b"%PDF-": "a PDF document",
    b"\x00\x00\xfe\xff": "UTF-32 text",
    b"\xff\xfe\x00\x00": "UTF-32 text",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Part:
    """Bytes ``start`` to ``end`` (None: the end) of a file after decompression; at both begins a line, as a rule."""

    path: Path
    start: int = 0
    end: int | None = None


def find_files(folder: Path, suffix: str) -> list[Path]:
    """All files below ``folder`` that ``ends_in`` takes, sorted by relative path.

    Links are followed, but no folder is read twice, nor one that ``folder`` lies in. What is hidden is passed over.
    Raises DataError for a folder that cannot be read.
    """
    found = []
    start = Path(os.path.realpath(folder))
    seen = {start, *start.parents}
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        visible, folders[:] = sorted(name for name in folders if not name.startswith(".")), []
        for name in visible:
            real = Path(os.path.realpath(Path(place, name)))
            if real not in seen:
                seen.add(real)
                folders.append(name)
        for path in (Path(place, name) for name in names if ends_in(name, suffix)):
            with readable(path):
                if path.is_file():
                    found.append(path)
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def ends_in(name: str, suffix: str) -> bool:
    """Whether a file's name ends in ``suffix``, plain or compressed, in capitals or not, and is not hidden."""
    endings = (suffix, *(suffix + compression for compression in _COMPRESSIONS))
    return name.lower().endswith(endings) and not name.startswith(".")


def is_compressed(path: Path) -> bool:
    """Whether the name says that the file is compressed."""
    return path.suffix.lower() in _COMPRESSIONS


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Within it an OSError is a DataError that names the path."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}", "check path and permissions") from error


def _refuse(error: OSError) -> None:
    """What is done about a folder that os.walk cannot read."""
    with readable(Path(error.filename)):
        raise error


def stamp_files(paths: Iterable[Path]) -> list[list[int | str]] | None:
    """What changes when a file changes: path, size, modification and change time in ns, inode of each.

    None if a file changed in the last seconds (or by its date will change), since a further change might then leave the
    same stamp.
    """
    stamps: list[list[int | str]] = []
    for path in paths:
        with readable(path):
            stat = path.stat()
        if max(stat.st_mtime_ns, stat.st_ctime_ns) > time.time_ns() - _SETTLED_NS:
            return None
        stamps.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
    return stamps


def text_blocks(part: Part) -> Iterator[str]:
    """The text of a part in blocks of whole lines of about ``BLOCK_BYTES``.

    Raises DataError for invalid UTF-8 (with line and byte offset), a wrong file type, a damaged archive, and a file
    that changes while it is read.
    """
    offset, rest = part.start, b""
    for chunk in chunks(part):
        data = rest + chunk
        cut = data.rfind(b"\n") + 1
        if cut == 0:
            cut = _cut_in_line(data) if len(data) > MAX_LINE_BYTES else 0
        if cut:
            yield _decode(part.path, data[:cut], offset)
        offset, rest = offset + cut, data[cut:]
    if rest:
        yield _decode(part.path, rest, offset)


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a file, however long, each with its "\\n" but perhaps the last. Errors as in ``text_blocks``."""
    rest: list[str] = []
    for block in text_blocks(Part(path)):
        lines = block.split("\n")
        for line in lines[:-1]:
            yield "".join([*rest, line, "\n"])
            rest = []
        if lines[-1]:
            rest.append(lines[-1])
    if rest:
        yield "".join(rest)


def chunks(part: Part) -> Iterator[bytes]:
    """The decompressed bytes of a part in chunks; checks the magic bytes first and the file's stamp last."""
    path = part.path
    with readable(path), path.open("rb") as file:
        before = os.fstat(file.fileno())
        _check_magic(path, file.read(512))
        start = 0 if is_compressed(path) else part.start
        file.seek(start)
        stream = _decompressed(path, file)
        if is_compressed(path):
            yield from _in_blocks(_span(_plausible(path, before.st_size, stream), start, part))
        else:
            yield from _span(stream, start, part)
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"{path} changed while it was read", "run again when the file is complete")


def _span(chunks: Iterator[bytes], position: int, part: Part) -> Iterator[bytes]:
    """Cut a stream whose first byte lies at ``position`` to the bytes of the part."""
    for chunk in chunks:
        begin = max(0, part.start - position)
        end = len(chunk) if part.end is None else min(len(chunk), part.end - position)
        if begin < end:
            yield chunk[begin:end]
        position += len(chunk)
        if part.end is not None and position >= part.end:
            return


def _in_blocks(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes, BLOCK_BYTES at a time as from a plain file: where a text is cut may change its tokens."""
    rest = bytearray()
    for chunk in chunks:
        rest += chunk
        while len(rest) >= BLOCK_BYTES:
            yield bytes(rest[:BLOCK_BYTES])
            del rest[:BLOCK_BYTES]
    if rest:
        yield bytes(rest)


def _decompressed(path: Path, file: BinaryIO) -> Iterator[bytes]:
    ending = path.suffix.lower()
    if ending == ".gz":
        with gzip.GzipFile(fileobj=file) as stream:
            try:
                while chunk := stream.read(BLOCK_BYTES):
                    yield chunk
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise DataError(f"{path} is a damaged gzip file: {error}", "fetch the file again") from error
    elif ending == ".zst":
        yield from _decompressed_zstd(path, file)
    else:
        while chunk := file.read(BLOCK_BYTES):
            yield chunk


def _decompressed_zstd(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Frame by frame, so that a truncated last frame is noticed; 4 KiB of input at a time bound the output."""
    import zstandard

    frame = None
    while compressed := file.read(4096):
        while compressed:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                chunk = frame.decompress(compressed)
            except zstandard.ZstdError as error:
                if "too much memory" in str(error):
                    raise DataError(
                        f"{path} needs more than 128 MB of memory to decompress (zstd --long)",
                        f"compress it again: zstd -dc --long=31 {path.name} | zstd > NEW.zst",
                    ) from error
                raise DataError(f"{path} is a damaged zstd file: {error}", "fetch the file again") from error
            if chunk:
                yield chunk
            compressed = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise DataError(f"{path} is a damaged zstd file: it ends inside a frame", "fetch the file again")


def _plausible(path: Path, num_bytes: int, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The chunks of a compressed file of ``num_bytes``, as long as they can be text."""
    total = 0
    for chunk in chunks:
        if total == 0 and (kind := _kind_of(chunk)):
            raise DataError(f"{path} holds {kind}, not UTF-8 text", "unpack it first")
        total += len(chunk)
        if total > max(FREE_BYTES, MAX_RATIO * num_bytes):
            raise DataError(
                f"{path} decompresses to more than {MAX_RATIO} times its size, as no text does",
                "unpack it first if it is what you want",
            )
        yield chunk


def _kind_of(head: bytes) -> str | None:
    """What a file is by its first bytes, if it is known not to be plain text."""
    if head[_TAR_MAGIC] == b"ustar":
        return "a tar archive"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if len(head) >= 8 and any(head) and not (any(head[::2]) and any(head[1::2])):
        return "UTF-16 text"
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


def _check_magic(path: Path, head: bytes) -> None:
    """The first bytes must be those of the type that the name promises."""
    found = _kind_of(head)
    wanted = {".gz": "gzip data", ".zst": "zstd data"}.get(path.suffix.lower())
    if found == wanted:
        return
    if found in ("gzip data", "zstd data") and wanted is None:
        ending = ".gz" if found == "gzip data" else ".zst"
        raise DataError(f"{path} is {found}, not plain text", f"rename it to {path.name}{ending}")
    if wanted is not None:
        if not head:
            raise DataError(f"{path} is empty, not {wanted}", "fetch the file again")
        raise DataError(f"{path} is not {wanted}", f"rename it without {path.suffix} if it is plain text")
    if found == "an HTML page":
        raise DataError(f"{path} is {found}, not plain text", "take the text out of it, or use dataset=jsonl")
    raise DataError(f"{path} is {found}, not UTF-8 text", "convert it to UTF-8 text first")


def _cut_in_line(data: bytes) -> int:
    """Where to cut a line that is too long: after its last blank, else between two characters."""
    cut = data.rfind(b" ") + 1
    if cut:
        return cut
    cut = len(data)
    while cut > 1 and (data[cut - 1] == 0x0D or data[cut - 1] >= 0x80):
        cut -= 1
        if data[cut] >= 0xC0:
            break
    return cut


def _decode(path: Path, data: bytes, offset: int) -> str:
    skip = len(_BOM) if offset == 0 and data.startswith(_BOM) else 0
    try:
        text = data[skip:].decode("utf-8")
    except UnicodeDecodeError as error:
        place = offset + skip + error.start
        line = 1 + sum(chunk.count(b"\n") for chunk in chunks(Part(path, 0, place)))
        where = "byte offset (decompressed)" if is_compressed(path) else "byte offset"
        raise DataError(
            f"{path} is not UTF-8: {error.reason} 0x{data[skip + error.start]:02x} in line {line}, {where} {place}",
            "convert it to UTF-8 first",
        ) from error
    return text.replace("\r\n", "\n") if "\r" in text else text
