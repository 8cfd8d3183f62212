"""Copying a file as cheaply as the file system allows: shared blocks where it can, else a copy of bytes."""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

_FICLONE = 0x40049409  # ioctl of Linux: the target shares the source's blocks until one of them is written


def copy_file(source: Path, target: Path) -> bool:
    """Copy a file's content to a new path and tell whether the blocks are shared; not flushed to the disk.

    A link would not do: ONNX Runtime refuses linked external data, and one damaged file would be two.

    Raises:
        OSError: for instance a full disk, or ``target`` exists; then no part of it is left.
    """
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with os.fdopen(descriptor, "wb") as out, source.open("rb") as file:
            # Btrfs, XFS and bcachefs share; others refuse, as they do across two file systems.
            with contextlib.suppress(OSError):
                fcntl.ioctl(out.fileno(), _FICLONE, file.fileno())
                return True
            shutil.copyfileobj(file, out, 8 << 20)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return False
