"""Durable writes: a file is seen whole or not at all, and stays after a power cut.

Built out of the calls in deploy.disk; knows nothing of versions or batches. Everything here is atomic for
readers (they see the old or the new, never a part) unless its docstring says otherwise. Temporary names
start with TEMPORARY_PREFIX, so that whoever owns a directory can tell leftovers of a crash from data.

After a failed fsync Linux may drop the dirty pages, and a second fsync would then succeed without
them: so nothing here retries. The temporary file is discarded and the error passes on.
"""

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deploy import disk

TEMPORARY_PREFIX = ".tmp-"

# A disk takes many flushes at once as fast as one: those of 200 files 0.05 s instead of 0.2 to 1.
_FLUSHES_AT_ONCE = 16
_FEW = 4  # for these, threads would only be in the way
_BEGUN_BYTES = 16 << 20  # written before the disk is told to begin with them


def temporary_beside(path: Path) -> Path:
    """Return an unused temporary name in the directory of ``path``."""
    return path.parent / f"{TEMPORARY_PREFIX}{path.name[:100]}-{os.getpid()}-{secrets.token_hex(4)}"


def write_file(
    path: Path,
    data: bytes | Iterable[bytes | memoryview],
    *,
    mode: int = 0o644,
    size_bytes: int | None = None,
    is_flushed: bool = True,
) -> None:
    """Write ``path`` through a temporary file, fsync, rename over, fsync the directory.

    Args:
        data: the content, or pieces of it that are written one after the other.
        size_bytes: the final size where it is known: the space is then reserved first, so that a
            full disk shows before the work is done.
        is_flushed: False leaves both fsyncs to whoever flushes the whole directory before anybody relies
            on it; after a power cut the file may then be there in part.

    Raises:
        OSError: nothing was changed and the temporary file is gone.
    """
    temporary = temporary_beside(path)
    try:
        with disk.new_file(temporary, mode=0o600) as descriptor:
            if size_bytes:
                disk.reserve(descriptor, size_bytes)
            _write_all(descriptor, (data,) if isinstance(data, bytes) else data)
            os.fchmod(descriptor, mode)
            if is_flushed:
                disk.fsync(descriptor)
        disk.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong before is what there is to tell
            disk.unlink(temporary, missing_ok=True)
        raise
    if is_flushed:
        fsync_dir(path.parent)


def _write_all(descriptor: int, pieces: Iterable[bytes | memoryview]) -> None:
    """Write them one after the other; the disk begins meanwhile, so that the flush at the end is short."""
    begun = written = 0
    for piece in pieces:
        disk.write(descriptor, piece)
        written += memoryview(piece).nbytes
        if written - begun >= _BEGUN_BYTES:
            disk.begin_flush(descriptor, begun, written - begun)
            begun = written


def write_text(path: Path, text: str, *, is_flushed: bool = True) -> None:
    """Write ``text`` as UTF-8, durably (see write_file)."""
    write_file(path, text.encode(), is_flushed=is_flushed)


def write_json(path: Path, obj: Any) -> None:
    """Write ``obj`` as indented JSON, durably (see write_file)."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, text: str) -> None:
    """Append one line with a single O_APPEND write.

    Lines of several writers do not mix. Durable at the next fsync of the file, so that a crash may
    lose the last lines and a full disk may tear the last one: readers skip a torn tail.

    Raises:
        OSError: the disk is full; part of the line may have been written.
    """
    line = text.rstrip("\n").encode() + b"\n"
    descriptor = disk.open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        written = disk.write_once(descriptor, line)
    finally:
        os.close(descriptor)
    if written < len(line):
        raise OSError(
            errno.ENOSPC, f"only {written} of {len(line)} bytes were appended: the disk is full", str(path)
        )


def make_dir(path: Path) -> None:
    """Make a directory (and its missing parents) that is still there after a power cut."""
    if path.is_dir():
        return
    if not path.parent.is_dir():
        make_dir(path.parent)
    disk.mkdir(path, exist_ok=True)
    fsync_dir(path.parent)


def fsync_file(path: Path) -> None:
    """Flush one file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        disk.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_dir(path: Path) -> None:
    """Flush a directory's entries (names, not contents) to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        disk.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_each(
    paths: Sequence[Path], flush: Callable[[Path], None], told: Callable[[int], None] = lambda _: None
) -> None:
    """Flush all of these, in no order, many at once where there are more than a few.

    Args:
        flush: does it for one of them; called from several threads.
        told: called after each with how many are done.

    Raises:
        OSError: one could not be flushed; others may have been.
    """
    if len(paths) <= _FEW:
        for done, path in enumerate(paths, 1):
            flush(path)
            told(done)
        return
    with ThreadPoolExecutor(_FLUSHES_AT_ONCE, thread_name_prefix="flush") as pool:
        for done, _ in enumerate(pool.map(flush, paths), 1):
            told(done)


def fsync_tree(path: Path) -> None:
    """Flush every file below ``path``, then its directories. Links are left alone."""
    tree = [(Path(directory), names) for directory, _, names in os.walk(path, topdown=False)]
    files = [directory / name for directory, names in tree for name in names]
    flush_each([file for file in files if not file.is_symlink() and file.is_file()], fsync_file)
    flush_each([directory for directory, _ in tree], fsync_dir)


def rename(source: Path, target: Path) -> None:
    """Rename within one file system and make it durable: the target's directory first.

    After a power cut the entry is then under at least one of the two names.

    Raises:
        OSError: EXDEV across file systems, ENOTEMPTY where ``target`` is a directory with content.
    """
    disk.rename(source, target)
    fsync_dir(target.parent)
    if source.parent != target.parent:
        fsync_dir(source.parent)


def replace_symlink(link: Path, target: str) -> None:
    """Point ``link`` at ``target`` (relative to the link's directory) in one step."""
    temporary = temporary_beside(link)
    disk.symlink(temporary, target)
    try:
        disk.rename(temporary, link)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong before is what there is to tell
            disk.unlink(temporary, missing_ok=True)
        raise
    fsync_dir(link.parent)


def remove_file(path: Path) -> None:
    """Remove a file or link, durably; fine if it is gone already."""
    disk.unlink(path, missing_ok=True)
    fsync_dir(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a directory and everything in it, durably; fine if it is gone already.

    Not atomic: a crash leaves a part. Meant for staging and other directories that nobody reads.
    """
    if path.is_dir() and not path.is_symlink():
        disk.remove_tree(path)
        fsync_dir(path.parent)
    else:
        remove_file(path)
