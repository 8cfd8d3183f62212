"""Pictures made for the tests of decoding and preprocessing."""

import io
from typing import Any

import numpy as np
from PIL import Image


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Return an image of random pixels."""
    rng = np.random.default_rng(seed)
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    return Image.fromarray(rng.integers(0, 256, (height, width, *channels), np.uint8), mode=mode)


def encoded(image: Image.Image, format_name: str = "PNG", **options: Any) -> bytes:
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def grey_16() -> np.ndarray:
    """Return a 30×40 ramp from black to white in 16 bits."""
    return np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
