"""The few disk operations that durability is built from; whoever needs a crash-safe file or directory uses these.

A file counts as written when its bytes, and the directory entry that names it, have been synced. Temporary names start
with ``.tmp-`` and names of things being deleted with ``.trash-``: neither is ever read, and ``sweep`` removes what a
killed process left. Whatever changes the disk goes through the short functions, which the fault tests let fail or kill
the process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from lmkit.errors import ResourceError

TMP_PREFIX = ".tmp-"
TRASH_PREFIX = ".trash-"
OLD_PREFIX = ".old-"
_TRASH = re.compile(re.escape(TRASH_PREFIX) + r".+-\d+-[0-9a-f]{8}", re.DOTALL)
"""What ``scratch_name`` makes."""
MORE_FILES = "raise the limit of open files (ulimit -n)"
"""What to do where a process has no descriptors left."""
PIECE_BYTES = 4 << 20
"""Size of the pieces in which large files are written and hashed on the way."""


def make_directory(path: Path) -> None:
    """Make a directory that must not exist yet."""
    os.mkdir(path)


def make_directories(path: Path) -> None:
    """Make a directory, unless it is there, and those above it that are missing; all their names are synced."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for made in reversed(missing):
        try:
            make_directory(made)
        except FileExistsError:
            if not made.is_dir():  # made by another process meanwhile; and not a link to nowhere
                raise
        with contextlib.suppress(OSError):  # a parent that may be passed through but not read
            sync_directory(made.parent)


def create_file(path: Path) -> int:
    """Open a new file for writing and return its descriptor; an existing file or link is an error."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0), 0o666)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte of ``data``."""
    view = memoryview(data).cast("B")
    while len(view) > 0:
        view = view[os.write(descriptor, view) :]


def sync_file(descriptor: int) -> None:
    """Wait until the file's bytes are on the disk."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # fsync alone leaves the bytes in the drive's cache there
    else:
        os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Wait until the directory's entries are on the disk; Windows has no such call and needs none.

    A file system that can sync files only (some of networks and of virtual machines) says that the call is not valid.
    """
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Give a file or directory a new name that must be free. Atomic."""
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def replace(source: Path, target: Path) -> None:
    """Give a file a new name, which another file may have had until now. Atomic."""
    os.replace(source, target)


def remove_file(path: Path) -> None:
    """Remove a file or a link."""
    os.unlink(path)


def remove_directory(path: Path) -> None:
    """Remove an empty directory."""
    os.rmdir(path)


def scratch_name(prefix: str, name: str) -> str:
    """A name that no other process uses: prefix, the target's name, process id, nonce."""
    return f"{prefix}{name}-{os.getpid()}-{secrets.token_hex(4)}"


def write_file(path: Path, data: bytes) -> None:
    """Write and sync a new file; the caller syncs the directory."""
    descriptor = create_file(path)
    try:
        write_all(descriptor, data)
        sync_file(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes, temporary: Path | None = None) -> None:
    """Replace the content of ``path`` atomically: after a crash it holds the old bytes or the new ones.

    temporary: the name that it has until it is whole, on the same file system; None: one beside ``path``.
    """
    temporary = temporary or path.with_name(scratch_name(TMP_PREFIX, path.name))
    try:
        write_file(temporary, data)
        replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_directory(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a directory and all it holds without following links; a plain file or link is removed too.

    What another process removes meanwhile, or all of it, is no error.
    """
    with contextlib.suppress(FileNotFoundError):
        if path.is_symlink() or not path.is_dir():
            remove_file(path)
            return
        for entry in sorted(path.iterdir()):
            remove_tree(entry)
        remove_directory(path)


def put_away(path: Path) -> Path:
    """Give a directory that is to be removed a name that no reader looks at; the new path."""
    trash = path.with_name(scratch_name(TRASH_PREFIX, path.name))
    rename(path, trash)
    sync_directory(path.parent)
    return trash


def discard(path: Path) -> None:
    """Delete a directory so that no reader ever sees half of it: first a rename out of sight, then the removal."""
    remove_tree(put_away(path))


def empty_trash(folder: Path) -> None:
    """Remove what a ``discard`` in a folder that is not lmkit's own has not come to the end of, as far as possible."""
    with contextlib.suppress(OSError):
        for entry in sorted(p for p in folder.iterdir() if _TRASH.fullmatch(p.name)):
            with contextlib.suppress(OSError):
                remove_tree(entry)


def remove_unfinished(target: Path) -> None:
    """Remove what processes that are gone have left of a ``target`` that they did not come to the end of, as far as
    possible; the folder that it is in is not lmkit's own."""
    import psutil

    scratch = re.compile(re.escape(f"{TMP_PREFIX}{target.name}-") + r"(\d{1,9})-[0-9a-f]{8}")
    with contextlib.suppress(OSError):
        for entry in sorted(target.parent.iterdir()):
            found = scratch.fullmatch(entry.name)
            if found is not None and not psutil.pid_exists(int(found[1])):
                with contextlib.suppress(OSError):
                    remove_tree(entry)


def replace_directory(source: Path, target: Path) -> None:
    """Give ``source`` the name of an existing directory beside it, which is deleted after that.

    If that fails the old one has its name again; after a kill between the two renames ``sweep`` gives it back.
    """
    old = target.with_name(scratch_name(OLD_PREFIX, target.name))
    rename(target, old)
    sync_directory(target.parent)
    try:
        rename(source, target)
    except BaseException:
        with contextlib.suppress(OSError):
            rename(old, target)
        raise
    sync_directory(target.parent)
    with contextlib.suppress(OSError):  # the next start sweeps it
        discard(old)


def left_behind(directory: Path) -> list[Path]:
    """What killed processes left in a directory, or what is just being written or removed there. Raises OSError."""
    prefixes = (TMP_PREFIX, TRASH_PREFIX, OLD_PREFIX)
    return sorted(p for p in directory.iterdir() if p.name.startswith(prefixes)) if directory.is_dir() else []


def sweep(directory: Path) -> None:
    """Remove what killed processes left in ``directory``; the caller holds the run's lock.

    A directory that was to be replaced gets its name back if the new one has not taken it. Raises OSError if the
    directory cannot be read or synced.
    """
    left = left_behind(directory)
    if left:
        # a kill right after a rename: if that came undone by a power cut, the old name would stand for what is removed
        sync_directory(directory)
    for entry in left:
        with contextlib.suppress(OSError):  # e.g. open in another process on Windows: the next start tries again
            if entry.name.startswith(OLD_PREFIX) and not (target := _target_of(entry)).exists():
                rename(entry, target)
                sync_directory(directory)
            else:
                remove_tree(entry)


def _target_of(old: Path) -> Path:
    """What a directory was called that ``replace_directory`` has put aside."""
    return old.with_name(old.name.removeprefix(OLD_PREFIX).rsplit("-", 2)[0])


def sync_tree(folder: Path) -> None:
    """Wait until the files in a directory, and their names, are on the disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync_directory(path)
        else:
            with path.open("r+b") as file:
                sync_file(file.fileno())


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading. A link, pipe, device or directory is an OSError and never blocks."""
    return os.fdopen(_regular(path, os.O_RDONLY), "rb")


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file; anything else is an OSError, as in ``open_regular``."""
    with open_regular(path) as file:
        return file.read()


def open_to_append(path: Path) -> int:
    """Open a regular file, made if it is missing, to read it and append to it; its descriptor.

    Errors as in ``open_regular``.
    """
    return _regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)


def _regular(path: Path, flags: int) -> int:
    """The descriptor of a file that is opened only if it is a regular one."""
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, name, 0)
    if path.is_symlink():
        raise OSError(errno.ELOOP, "is a symbolic link", str(path))
    descriptor = os.open(path, flags, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def drop_cache(file: BufferedReader) -> None:
    """Ask the system to forget its cached pages of the file, so that the next read comes from the disk (Linux only)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def free_bytes(path: Path) -> int:
    """Free disk space for this user where ``path`` is."""
    return shutil.disk_usage(path).free


def has_no_locks(error: OSError) -> bool:
    """Whether an error met while locking says that the file system has no locks."""
    return error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def resource_error(doing: str, path: Path, error: OSError, needed_bytes: int | None = None) -> ResourceError:
    """The error for people for an OSError met while writing: what failed, where, how much was needed and was free."""
    sizes = ""
    if needed_bytes is not None:
        with contextlib.suppress(OSError):
            parent = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
            sizes = f" ({needed_bytes / 1e6:.1f} MB needed, {free_bytes(parent) / 1e6:.1f} MB free)"
    remedy = {
        errno.ENOSPC: "free some disk space, or lower save.keep",
        errno.EDQUOT: "your disk quota is used up: free some space, or lower save.keep",
        errno.EFBIG: "the file size limit of this process or file system is too low (ulimit -f)",
        errno.EMFILE: MORE_FILES,
        errno.EROFS: "choose another run.dir, or make this one writable",
        errno.EACCES: "choose another run.dir, or make this one writable",
        errno.EPERM: "choose another run.dir, or make this one writable",
        errno.ELOOP: "remove the link, or choose another run.dir",
    }.get(error.errno or 0, "check the disk, or choose another run.dir")
    return ResourceError(f"cannot {doing} {path}{sizes}: {error.strerror or error}", remedy)


@contextlib.contextmanager
def resource_errors(doing: str, path: Path) -> Iterator[None]:
    """Context in which an OSError becomes the error for people."""
    try:
        yield
    except OSError as error:
        raise resource_error(doing, path, error) from error
