"""The one door for durable writes: a file is seen whole or not at all, and stays after a power cut.

Knows nothing of versions or batches. Everything here is atomic for readers (they see the old or the
new, never a part) unless its docstring says otherwise. Temporary names start with TEMPORARY_PREFIX,
so that whoever owns a directory can tell leftovers of a crash from data.

After a failed fsync Linux may drop the dirty pages, and a second fsync would then succeed without
them: so nothing here retries. The temporary file is discarded and the error passes on.
"""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"


def temporary_beside(path: Path) -> Path:
    """Return an unused temporary name in the directory of ``path``."""
    return path.parent / f"{TEMPORARY_PREFIX}{path.name[:100]}-{os.getpid()}-{secrets.token_hex(4)}"


def write_file(
    path: Path,
    data: bytes | Iterable[bytes | memoryview],
    *,
    mode: int = 0o644,
    size_bytes: int | None = None,
) -> None:
    """Write ``path`` through a temporary file, fsync, rename over, fsync the directory.

    Args:
        data: the content, or pieces of it that are written one after the other.
        size_bytes: the final size where it is known: the space is then reserved first, so that a
            full disk shows before the work is done.

    Raises:
        OSError: nothing was changed and the temporary file is gone.
    """
    temporary = temporary_beside(path)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if size_bytes:
                os.posix_fallocate(descriptor, 0, size_bytes)
            file.writelines((data,) if isinstance(data, bytes) else data)
            file.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, durably (see write_file)."""
    write_file(path, text.encode())


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
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        written = os.write(descriptor, line)
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
    path.mkdir(exist_ok=True)
    fsync_dir(path.parent)


def fsync_file(path: Path) -> None:
    """Flush one file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_dir(path: Path) -> None:
    """Flush a directory's entries (names, not contents) to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(path: Path) -> None:
    """Flush every file below ``path``, then its directories from the deepest up. Links are left alone."""
    for directory, _, names in os.walk(path, topdown=False):
        for name in names:
            file = Path(directory, name)
            if not file.is_symlink() and file.is_file():
                fsync_file(file)
        fsync_dir(Path(directory))


def rename(source: Path, target: Path) -> None:
    """Rename within one file system and make it durable: the target's directory first.

    After a power cut the entry is then under at least one of the two names.

    Raises:
        OSError: EXDEV across file systems, ENOTEMPTY where ``target`` is a directory with content.
    """
    source.rename(target)
    fsync_dir(target.parent)
    if source.parent != target.parent:
        fsync_dir(source.parent)


def replace_symlink(link: Path, target: str) -> None:
    """Point ``link`` at ``target`` (relative to the link's directory) in one step."""
    temporary = temporary_beside(link)
    temporary.symlink_to(target)
    try:
        temporary.rename(link)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(link.parent)


def remove_file(path: Path) -> None:
    """Remove a file or link, durably; fine if it is gone already."""
    path.unlink(missing_ok=True)
    fsync_dir(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a directory and everything in it, durably; fine if it is gone already.

    Not atomic: a crash leaves a part. Meant for staging and other directories that nobody reads.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
        fsync_dir(path.parent)
    else:
        remove_file(path)
