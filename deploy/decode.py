"""One picture file, one RGB image, whatever the file: what people see when they look at it.

EXIF rotation is applied, transparency lies over white, 16-bit grey is scaled to 8 bits. Whatever is
wrong with a file becomes an ImageError with a reason in plain words. Knows nothing of models.
"""

import functools
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from deploy.errors import ImageError

ImageSource = Image.Image | bytes | str | os.PathLike[str]

MAX_PIXELS = 80_000_000  # 240 MB of RGB; below the size at which Pillow warns of a bomb
MIN_SIDE_PIXELS = 2

# What cameras, browsers and scanners write. Others that Pillow knows start helper programs (EPS) or
# are read by code that few people ever look at.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "MPO", "JPEG2000", "PPM", "TGA", "ICO")


def decode_image(
    source: ImageSource, *, max_pixels: int = MAX_PIXELS, min_side_pixels: int = MIN_SIDE_PIXELS
) -> Image.Image:
    """Return ``source`` (a file's bytes, its path, or a Pillow image) as a loaded RGB image of its own.

    Raises:
        ImageError: it is not a picture, cut short, too large or too small; ``reason`` says which.
        OSError: the disk or the system failed; says nothing about the picture.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, max_pixels, min_side_pixels)
    if isinstance(source, bytes):
        return _decode_file(io.BytesIO(source), len(source), max_pixels, min_side_pixels)
    with _opened(Path(source)) as file:
        return _decode_file(file, os.fstat(file.fileno()).st_size, max_pixels, min_side_pixels)


def read_image(path: Path) -> bytes:
    """A picture file's bytes, for `decode_image`; the errors are its own, too."""
    with _opened(path) as file:
        return file.read()


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise ImageError("the file does not exist (or no longer)") from error
    except IsADirectoryError as error:
        raise ImageError("this is a folder, not an image file") from error
    except PermissionError as error:
        raise ImageError("the file may not be read: permission denied") from error


def _decode_file(file: BinaryIO, size_bytes: int, max_pixels: int, min_side_pixels: int) -> Image.Image:
    if size_bytes == 0:
        raise ImageError("the file is empty (0 bytes)")
    try:
        image = Image.open(file, formats=formats())
    except UnidentifiedImageError as error:
        raise ImageError("this is not an image, or of a format that is not supported") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"the image has too many pixels (at most {max_pixels:,} are allowed)") from error
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(f"the image's header is damaged ({error})") from error
    with image:
        return _to_rgb(image, max_pixels, min_side_pixels)


def _to_rgb(image: Image.Image, max_pixels: int, min_side_pixels: int) -> Image.Image:
    width, height = image.size  # known from the header: nothing large is in memory yet
    if width * height > max_pixels:
        raise ImageError(
            f"the image has too many pixels: {width} × {height}, at most {max_pixels:,} are allowed"
        )
    if min(width, height) < min_side_pixels:
        raise ImageError(
            f"the image is too small: {width} × {height} pixels, at least "
            f"{min_side_pixels} on each side are needed"
        )
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever their format's library does
        if "truncated" in str(error) or isinstance(error, EOFError):
            raise ImageError("the image is cut short: the end of the file is missing") from error
        raise ImageError(f"the image is damaged and cannot be decoded ({error})") from error
    try:
        return _over_white(_upright(image))
    except ValueError as error:
        raise ImageError(
            f"its colour mode {image.mode} cannot be turned into RGB; save it as JPEG or PNG"
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - broken EXIF raises anything; the picture itself is fine
        return image.copy()


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _grey_to_8_bits(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to L (Pillow's conversion would clip at 255), LA where one grey is see-through."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ImageError("its pixels are neither 8 nor 16 bits deep; save it as JPEG or PNG")
    grey = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that are read; the first call imports Pillow's readers of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # plugins of formats that we do not use may complain
        Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)
