"""Fetching files from a remote: never more bytes than expected, checked by hash, resumed where it broke off.

Knows what a file must be, not what it is for.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from deploy import disk
from deploy.errors import ShareError
from deploy.manifest import FileRecord
from deploy.remote import PIECE_BYTES, Remote, read_small

PART_SUFFIX = ".part"
_ATTEMPTS = 3
_PAUSE_SECONDS = 0.5  # before the second try; doubles

ResultT = TypeVar("ResultT")


class Fetcher:
    """Fetches from one remote and counts.

    Attributes:
        bytes_moved: bytes of files that came over so far, those of broken tries included.
    """

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.bytes_moved = 0

    def small(self, name: str, limit: int) -> bytes:
        """Return a file of at most ``limit`` bytes.

        Raises:
            ShareError: it is larger.
            FileNotFoundError, PermissionError, OSError: it is not there, or cannot be read.
        """
        content = _persist(lambda: read_small(self.remote, name, limit))
        self.bytes_moved += len(content)
        return content

    def file(self, name: str, record: FileRecord, path: Path) -> None:
        """Put a file at ``path`` once it is what ``record`` says; not flushed to the disk.

        What came over before a break stays in ``path``.part, and the next call goes on from there.

        Raises:
            ShareError: the remote's file is another one.
            FileNotFoundError, OSError: it is not there, or cannot be read or written.
        """
        part = path.with_name(path.name + PART_SUFFIX)
        was_resumed = _persist(lambda: self._continue(name, record, part))
        found = _sha256_of(part)
        if found.hexdigest() != record.sha256 and was_resumed:
            disk.unlink(part)  # what lay here was of another file, or a power cut had spoilt it
            _persist(lambda: self._continue(name, record, part))
            found = _sha256_of(part)
        if found.hexdigest() != record.sha256:
            disk.unlink(part)
            raise ShareError(
                f"{name} there is not what its manifest records: expected sha256 {record.sha256}, "
                f"found {found.hexdigest()}. Nothing was changed here."
            )
        disk.rename(part, path)

    def _continue(self, name: str, record: FileRecord, part: Path) -> bool:
        """Bring ``part`` to its full size; tell whether something of it was there already."""
        size = part.stat().st_size if part.exists() else 0
        if size > record.bytes:
            disk.unlink(part)
            size = 0
        if size == record.bytes and part.exists():
            return True
        with self.remote.open(name, size) as (start, stream), _opened(part) as descriptor:
            disk.truncate(descriptor, start)
            os.lseek(descriptor, start, os.SEEK_SET)
            left = record.bytes - start
            while left and (piece := stream.read(min(PIECE_BYTES, left))):
                self.bytes_moved += len(piece)
                disk.write(descriptor, piece)
                left -= len(piece)
            if not left and stream.read(1):
                raise ShareError(f"{name} there is longer than the {record.bytes} bytes its manifest records")
        if left:
            raise OSError(f"{name} broke off {left} bytes before its end")
        return start > 0


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = disk.open_file(path, os.O_WRONLY | os.O_CREAT)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _sha256_of(path: Path) -> "hashlib._Hash":
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def _persist(work: Callable[[], ResultT]) -> ResultT:
    """Try again after a passing error; what is missing, forbidden or wrong will be so the next time too."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return work()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError:
            if attempt == _ATTEMPTS:
                raise
            time.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1))
    raise AssertionError("the last attempt returns or raises")
