"""Copying a file as cheaply as the file system allows: shared blocks where it can, else a copy of bytes."""

import contextlib
import fcntl
from pathlib import Path

from deploy import disk

_FICLONE = 0x40049409  # ioctl of Linux: the target shares the source's blocks until one of them is written
_PIECE_BYTES = 8 << 20


def copy_file(source: Path, target: Path) -> bool:
    """Copy a file's content to a new path and tell whether the blocks are shared; not flushed to the disk.

    A link would not do: ONNX Runtime refuses linked external data, and one damaged file would be two.

    Raises:
        OSError: for instance a full disk, or ``target`` exists; then no part of it is left.
    """
    with disk.new_file(target) as out:
        try:
            with source.open("rb", buffering=0) as file:
                # Btrfs, XFS and bcachefs share; others refuse, as they do across two file systems.
                with contextlib.suppress(OSError):
                    fcntl.ioctl(out, _FICLONE, file.fileno())
                    return True
                while piece := file.read(_PIECE_BYTES):
                    disk.write(out, piece)
        except BaseException:
            disk.unlink(target, missing_ok=True)
            raise
    return False
