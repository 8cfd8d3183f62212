"""What a home knows about images in general: two moments of the first model's answers, no image.

Learning uses them, clients never see them: they lie beside the store, not in its versions. The bundled model
comes with its own; for another model `dynlora init --images FOLDER` makes them. Runs in the worker only.
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from daemon.errors import ConfigError
from deploy import atomic
from deploy.decode import decode_image
from deploy.errors import ImageError
from deploy.preprocess import Preprocessing
from dynlora.clip import BUNDLED_MOMENTS, Clip
from dynlora.moments import ImageMoments

MOMENTS_NAME = "image_moments.safetensors"
MOST_IMAGES = 5_000  # more do not change two moments
_AT_ONCE = 64


def image_moments(home: Path, width: int) -> tuple[ImageMoments, str] | tuple[None, None]:
    """What `dynlora init` kept, and the file's sha256; None where it had nothing to make it from.

    Raises:
        ModelError: the file is damaged, or of another model.
    """
    path = home / MOMENTS_NAME
    if not path.exists():
        return None, None
    return ImageMoments.load(path, width=width), hashlib.sha256(path.read_bytes()).hexdigest()


def keep_bundled(home: Path) -> None:
    """The bundled model's moments, made from images it was trained on."""
    atomic.write_file(home / MOMENTS_NAME, BUNDLED_MOMENTS.read_bytes())


def keep_none(home: Path) -> None:
    """Forget what an `init` that failed later may have left: it was another model's."""
    if (home / MOMENTS_NAME).exists():
        atomic.remove_file(home / MOMENTS_NAME)


def keep_of_folder(home: Path, clip: Clip, folder: Path, *, told: Callable[[int, int], None]) -> int:
    """Moments of the images in a folder and its subfolders; returns how many were used.

    Files that are no images are passed over.

    Args:
        told: called with the number of files that were looked at, and of all there are.

    Raises:
        ConfigError: there are fewer than twice as many readable images as the embeddings have dimensions.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    count = min(len(paths), MOST_IMAGES)
    paths = [paths[number * len(paths) // count] for number in range(count)]  # of all folders alike
    parts = []
    for start in range(0, len(paths), _AT_ONCE):
        parts.append(_embed(clip, paths[start : start + _AT_ONCE]))
        told(min(start + _AT_ONCE, len(paths)), len(paths))
    found, least = sum(map(len, parts)), 2 * int(clip.model_cfg["embed_dim"])
    if found < least:
        raise ConfigError(
            f"{folder} holds {found} images that can be read; expected at least {least}: any photographs "
            "typical of what the model is asked about. Without --images each drop's own have to do"
        )
    atomic.write_file(home / MOMENTS_NAME, ImageMoments.of(torch.cat(parts)).content())
    return found


def _embed(clip: Clip, paths: Sequence[Path]) -> Tensor:
    """(N, D), L2-normalised, of those that are images."""
    preprocessing, pixels = Preprocessing.from_open_clip_cfg(clip.preprocess_cfg), []
    for path in paths:
        with contextlib.suppress(ImageError, OSError):
            pixels.append(torch.from_numpy(preprocessing([decode_image(path)])))  # one photograph at a time
    if not pixels:
        return torch.zeros(0, int(clip.model_cfg["embed_dim"]))
    with torch.no_grad():
        return F.normalize(clip.model.visual(torch.cat(pixels)), dim=-1)  # type: ignore[operator]
