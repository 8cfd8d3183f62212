"""Small drops that are quick to draw, for lives of many batches."""

from pathlib import Path

import numpy as np
from PIL import Image

IMAGES = 4


def draw_batch(folder: Path, class_name: str, *, seed: int, size: int, suffix: str) -> Path:
    """A batch folder of one class with four images of noise, and the mark that it is complete.

    Args:
        size: pixels of each side.
        suffix: of the files, .png or .jpg.
    """
    images = folder / class_name
    images.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index in range(IMAGES):
        pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}{suffix}")
    (folder / ".ready").touch()
    return folder
