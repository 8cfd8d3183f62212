"""One image of a batch as the model takes it, and whose fault it is where there is none. No torch."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from daemon.errors import BatchError
from daemon.plain_file import NotPlainError, open_plain
from deploy.errors import ImageError
from deploy.preprocess import Preprocessing, decode_image

Float32 = NDArray[np.float32]


def load_pixels(path: Path, preprocessing: Preprocessing, *, sha256: str) -> Float32:
    """One image as the model takes it: (3, height, width).

    Args:
        sha256: what the file was when the batch was taken in.

    Raises:
        BatchError: the image is missing, damaged, a link, or no longer what it was; names it.
    """
    with blaming(path):
        pixels: Float32 = preprocessing([decode_image(_read(path, sha256))])[0]
    return pixels


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """What is wrong with an image becomes a BatchError that names it."""
    try:
        yield
    except ImageError as error:
        raise BatchError(f"{path} cannot be used: {error.reason}") from error


def _read(path: Path, sha256: str) -> bytes:
    """The content of a plain file, read once: what is hashed is what is decoded."""
    try:
        with open_plain(path) as file:
            content = file.read()
    except NotPlainError as error:
        raise ImageError(f"{error}; drop the images again") from error
    except FileNotFoundError as error:
        raise ImageError("the file does not exist (or no longer)") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ImageError(
            f"it was changed after it was taken in: batch.json records sha256 {sha256}, found {found}; "
            "drop the images again"
        )
    return content
