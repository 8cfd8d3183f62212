"""The one door to the disk: every call that changes what lies on it is made in this file.

One function, one change. Nothing here knows what is atomic or survives a power cut: deploy.atomic builds
that out of these. No other file of `deploy` and `daemon` opens to write, flushes, renames, links, makes or
removes, so a fault can be put before any change of the disk, and a trace of the system calls shows that none
goes around (tests/faults).
"""

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PIECE_BYTES = 8 << 20
_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # of Linux alone, and not of os


def open_file(path: Path, flags: int, mode: int = 0o644) -> int:
    """Open a file to change it, and return its descriptor; never inherited by another program."""
    return os.open(path, flags | os.O_CLOEXEC, mode)


@contextmanager
def new_file(path: Path, mode: int = 0o644) -> Iterator[int]:
    """Make a file, and yield its descriptor.

    Raises:
        FileExistsError: there is something of that name, a link included.
    """
    descriptor = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of it.

    Raises:
        OSError: the disk is full, for instance; a part of it may have been written.
    """
    with memoryview(data) as whole, whole.cast("B") as left:
        written = 0
        while written < len(left):
            written += os.write(descriptor, left[written:])


def write_once(descriptor: int, data: bytes) -> int:
    """Write with a single call and return how many bytes it took; less than all where the disk is full."""
    return os.write(descriptor, data)


def write_new(path: Path, data: bytes) -> None:
    """Make a file with this content; not flushed."""
    with new_file(path) as descriptor:
        write(descriptor, data)


def copy(source: Path, target: Path) -> None:
    """Make a file with the content of another one, which may not be a link; not flushed.

    Raises:
        OSError: a part of the target may be left.
    """
    reading = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(reading, "rb", buffering=0) as file, new_file(target) as descriptor:
        while piece := file.read(_PIECE_BYTES):
            write(descriptor, piece)


def reserve(descriptor: int, size_bytes: int) -> None:
    """Make sure that so many bytes find space."""
    os.posix_fallocate(descriptor, 0, size_bytes)


def truncate(descriptor: int, size_bytes: int) -> None:
    """Cut a file to this size."""
    os.ftruncate(descriptor, size_bytes)


def begin_flush(descriptor: int, offset: int, size_bytes: int) -> None:
    """Let the system begin to write a range to the disk: no promise, just less left to do for `fsync`.

    An error that it meets is kept for that `fsync`, which reports it: nothing here waits for the result.
    """
    if _sync_file_range is not None:
        flags = ctypes.c_uint(_SYNC_FILE_RANGE_WRITE)
        _sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size_bytes), flags)


def fsync(descriptor: int) -> None:
    """Flush a file's content, or a directory's entries."""
    os.fsync(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename, over a file or link that is there."""
    source.rename(target)


def symlink(link: Path, target: str | Path) -> None:
    """Make a link that points at `target`."""
    link.symlink_to(target)


def unlink(path: Path, *, missing_ok: bool = False) -> None:
    """Remove a file or link."""
    path.unlink(missing_ok=missing_ok)


def mkdir(path: Path, *, exist_ok: bool = False) -> None:
    """Make a directory."""
    path.mkdir(exist_ok=exist_ok)


def make_dirs(path: Path) -> None:
    """Make a directory and its missing parents; harmless where they exist."""
    path.mkdir(parents=True, exist_ok=True)


def remove_tree(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a directory and all that is in it, entry by entry."""
    shutil.rmtree(path, ignore_errors=ignore_errors)
