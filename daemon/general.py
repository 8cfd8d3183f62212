"""What a home knows about images in general: two moments of the first model's answers, no image.

Learning uses them, clients never see them: they lie beside the store, not in its versions. The bundled model
comes with its own; for another model `dynlora init --images FOLDER` makes them. What batches showed since is
beside them (daemon.seen). Runs in the worker only.
"""

import contextlib
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from daemon.errors import ConfigError
from daemon.seen import SEEN_NAME, Seen, load_seen
from deploy import atomic
from deploy.decode import decode_image
from deploy.errors import ImageError
from deploy.preprocess import Preprocessing
from deploy.weights import read_metadata
from dynlora.clip import BUNDLED_MOMENTS, Clip
from dynlora.errors import ModelError
from dynlora.moments import REMEDY, ImageMoments

MOMENTS_NAME = "image_moments.safetensors"
MOST_IMAGES = 5_000  # more do not change two moments
_AT_ONCE = 64
_OF = "weights_sha256"  # in the file's header: version 0's, whose answers these are


@dataclass(frozen=True)
class HomeMoments:
    """What learning may know of images that are not the batch's.

    general: of images in general; seen: of earlier batches' images; either may be missing.
    sha256: of the files that they are from; None without any.
    """

    general: ImageMoments | None = None
    seen: ImageMoments | None = None
    sha256: str | None = None


def home_moments(home: Path, width: int, *, of: str, warn: Callable[[str], None]) -> HomeMoments:
    """What `dynlora init` kept, and what earlier batches left.

    Args:
        width: of the model's embeddings.
        of: sha256 of version 0's weights.
        warn: called with a sentence where there is nothing, or nothing that can be used.

    Raises:
        ModelError: what `dynlora init` kept is damaged, or of another model.
    """
    general = _load_general(home / MOMENTS_NAME, width, of)
    found = load_seen(home, width, warn)
    seen = None if found is None else moments_of_seen(found)
    if general is None and seen is None:
        warn(
            "nothing is known of images in general, neither from `dynlora init --images` nor from earlier "
            "batches: only this batch's own images say what its names must keep away from (docs/models.md)"
        )
        return HomeMoments()
    files = [home / name for name, has in ((MOMENTS_NAME, general), (SEEN_NAME, seen)) if has]
    return HomeMoments(
        general, seen, hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    )


def _load_general(path: Path, width: int, of: str) -> ImageMoments | None:
    if not path.exists():
        return None
    general = ImageMoments.load(path, width=width)
    if read_metadata(path).get(_OF, of) != of:
        raise ModelError(f"{path} is of another model than this home began with; {REMEDY}")
    return general


def moments_of_seen(seen: Seen) -> ImageMoments:
    """For learning: in torch, over mean (D,) and covariance (D, D)."""
    return ImageMoments(torch.from_numpy(seen.mean), torch.from_numpy(seen.covariance))


def seen_of_moments(own: ImageMoments, *, classes: int, batch: str) -> Seen:
    """For the home: what one batch of so many classes showed."""
    return Seen(own.mean.numpy(), own.covariance.numpy(), classes, (batch,))


def bundled_moments(width: int) -> ImageMoments:
    """The bundled model's, made from images it was trained on."""
    return ImageMoments.load(BUNDLED_MOMENTS, width=width)


def keep(home: Path, moments: ImageMoments | None, *, of: str) -> None:
    """In the home, or nothing; what an `init` that failed later may have left is forgotten either way.

    Args:
        of: sha256 of version 0's weights.
    """
    path = home / MOMENTS_NAME
    if moments is not None:
        atomic.write_file(path, moments.content({_OF: of}))
    elif path.exists():
        atomic.remove_file(path)


def moments_of_folder(clip: Clip, folder: Path, *, told: Callable[[int, int], None]) -> ImageMoments:
    """Moments of the images in a folder and its subfolders, of at most `MOST_IMAGES` drawn from all of it.

    Files that are no images are passed over.

    Args:
        told: called with the number of images that were looked at, and of those wanted.

    Raises:
        ConfigError: there are fewer than twice as many readable images as the embeddings have dimensions.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    random.Random(0).shuffle(paths)  # of all folders alike, and the same at every try
    wanted, found = min(len(paths), MOST_IMAGES), torch.zeros(0, int(clip.model_cfg["embed_dim"]))
    for start in range(0, len(paths), _AT_ONCE):
        found = torch.cat([found, _embed(clip, paths[start : start + _AT_ONCE])])
        told(min(len(found), wanted), wanted)
        if len(found) >= MOST_IMAGES:
            break
    if len(found) < (least := 2 * found.shape[1]):
        raise ConfigError(
            f"{folder} holds {len(found)} images that can be read, among {len(paths)} files; expected at "
            f"least {least}: any photographs typical of what the model is asked about. Without --images the "
            "batches themselves have to do"
        )
    told(wanted, wanted)
    return ImageMoments.of(found)


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
