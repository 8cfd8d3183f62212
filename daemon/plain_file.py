"""Open a file where a stranger may have put something else: no link is followed, no pipe is waited for."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


class NotPlainError(OSError):
    """What lies there is no plain file; the message says what it is, without a name."""


def open_plain(path: Path) -> BinaryIO:
    """Open for reading.

    Raises:
        NotPlainError: it is a link, a folder, a pipe or a device.
        OSError: as `open` does, FileNotFoundError for one.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotPlainError("it is a link, and links are never followed") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # os.fdopen would refuse a folder in its own words
        os.close(descriptor)
        raise NotPlainError("it is not a regular file")
    return os.fdopen(descriptor, "rb")
