"""The live version and its parent, asked about the kept exam images: which answers flipped, how sure each is.

Runs on ONNX Runtime as a client does; no torch. Needs both versions whole.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from daemon.exams import load_exams
from deploy.errors import DeployError, ImageError
from deploy.manifest import class_key, load_classes
from deploy.runtime import LoadedVersion
from deploy.store_reader import StoreReader

MOST_IMAGES = 400
MOST_SHOWN = 12  # of each kind
_THUMBNAIL = 96  # pixels
_BATCH = 32
_BINS = 10  # of shifts from -1 to 1


@dataclass(frozen=True)
class Flip:
    """An image whose answer became right or wrong; the scores are the right name's."""

    truth: str
    before: str
    after: str
    score_before: float
    score_after: float
    path: Path


@dataclass
class Comparison:
    """What was found; `why_not` says why nothing was."""

    why_not: str = ""
    before: int = 0
    after: int = 0
    images: int = 0
    mean_before: float = 0.0
    mean_after: float = 0.0
    gained: list[Flip] = field(default_factory=list)
    lost: list[Flip] = field(default_factory=list)
    shifts: list[int] = field(
        default_factory=lambda: [0] * _BINS
    )  # images by change of the right name's score


@dataclass(frozen=True)
class _Reply:
    best: str
    score: float  # of the right name


def compare(home: Path) -> Comparison:
    """Ask both versions; at most MOST_IMAGES images, spread over all exams."""
    store = StoreReader(home / "serving")
    live = store.current()
    parent = store.manifest(live).parent
    if parent is None:
        return Comparison(why_not=f"version {live} has no parent to be held against")
    if not (store.is_full(live) and store.is_full(parent)):
        return Comparison(why_not=f"versions {parent} and {live} are not both on disk with their weights")
    names = {entry.key: entry.name for entry in load_classes(store.path(live)).classes}
    images = _images(home, set(names))
    if not images:
        return Comparison(why_not="no exam image is kept of a class that the live version knows")
    # The parent is asked among these names too, as any client may ask about names of its own.
    labels = list(names.values())
    try:
        replies = [_ask(store.path(version), images, labels) for version in (parent, live)]
    except (DeployError, OSError) as error:
        return Comparison(why_not=str(error))
    return _summary(Comparison(before=parent, after=live), images, replies, names)


def _images(home: Path, keys: set[str]) -> list[tuple[Path, str]]:
    found = [
        (directory / image.file, image.class_key)
        for directory, exam in load_exams(home)
        for image in exam.images
        if image.class_key in keys and (directory / image.file).is_file()
    ]
    step = max(1, -(-len(found) // MOST_IMAGES))
    return found[::step]


def _ask(version_dir: Path, images: Sequence[tuple[Path, str]], labels: Sequence[str]) -> list[_Reply | None]:
    """An answer for each image; None where it cannot be read."""
    replies: list[_Reply | None] = []
    with LoadedVersion(version_dir) as version:
        for start in range(0, len(images), _BATCH):
            part = images[start : start + _BATCH]
            try:
                replies += _ask_part(version, part, labels)
            except ImageError:  # one by one: it must not cost the others their answers
                for image in part:
                    try:
                        replies += _ask_part(version, [image], labels)
                    except ImageError:
                        replies.append(None)
    return replies


def _ask_part(
    version: LoadedVersion, part: Sequence[tuple[Path, str]], labels: Sequence[str]
) -> list[_Reply]:
    """An answer for each image of one batch.

    Raises:
        ImageError: one of them cannot be read.
    """
    rows = version.classify([path for path, _ in part], labels, top=len(labels))
    return [
        _Reply(row[0].label, next((p.score for p in row if class_key(p.label) == key), 0.0))
        for (_, key), row in zip(part, rows, strict=True)
    ]


def _summary(
    found: Comparison,
    images: Sequence[tuple[Path, str]],
    replies: Sequence[Sequence[_Reply | None]],
    names: dict[str, str],
) -> Comparison:
    pairs = [
        (path, names[key], before, after)
        for (path, key), before, after in zip(images, *replies, strict=True)
        if before is not None and after is not None
    ]
    found.images = len(pairs)
    for path, truth, before, after in pairs:
        found.mean_before += before.score / len(pairs)
        found.mean_after += after.score / len(pairs)
        shift = after.score - before.score
        found.shifts[min(_BINS - 1, int((shift + 1) / 2 * _BINS))] += 1
        was_right, is_right = before.best == truth, after.best == truth
        if was_right != is_right:
            flips = found.gained if is_right else found.lost
            flips.append(Flip(truth, before.best, after.best, before.score, after.score, path))
    return found


def shown(flips: Sequence[Flip]) -> Sequence[Flip]:
    """Some of them for a page, spread over all: neighbours are of one class."""
    return flips[:: max(1, -(-len(flips) // MOST_SHOWN))]


def thumbnail(path: Path) -> str:
    """A small JPEG as a data URL; empty where the file is no image any more."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
