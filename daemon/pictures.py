"""Look at one file as a stranger sent it: is it an image that can be learnt from?

The file is read once; what is hashed is what is decoded.
"""

import errno
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from daemon.config import InboxConfig
from daemon.plain_file import NotPlainError, open_plain
from deploy.errors import ImageError
from deploy.preprocess import decode_image

_GONE = "it disappeared while it was being read; send it again"


@dataclass(frozen=True)
class Picture:
    """A usable image: sha256 of the file, size in pixels after EXIF rotation."""

    sha256: str
    width: int
    height: int


def examine(path: Path, config: InboxConfig) -> Picture:
    """Read and decode `path`.

    Raises:
        ImageError: it cannot be learnt from; the reason says why and what to do.
    """
    content = _read(path, config.max_image_bytes)
    try:
        image = decode_image(content, max_pixels=config.max_image_pixels)
    except ImageError as error:
        raise ImageError(f"{error.reason}; send a good copy to have it learnt") from error
    return Picture(hashlib.sha256(content).hexdigest(), image.width, image.height)


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        with open_plain(path) as file:  # it was a plain file when it was listed
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise ImageError(
                    f"it is too large: {size:,} bytes, at most {max_bytes:,} are read "
                    f"(inbox.max_image_bytes); send a smaller copy"
                )
            return file.read(max_bytes)
    except NotPlainError as error:
        raise ImageError(f"{error}; send a copy of the file") from error
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ESTALE}:
            raise ImageError(_GONE) from error
        raise ImageError(
            f"it cannot be read ({error.strerror}); correct its rights and send it again"
        ) from error
