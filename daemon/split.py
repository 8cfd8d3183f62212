"""Which image is learnt from, which tunes, which grades: decided by content alone.

Pure, no random numbers: within a class images are ordered by sha256, which is as good as shuffled and the
same in any order of arrival. Two promises hold over all batches ever: an image that is in any exam is never
trained or tuned on, and one that was trained or tuned on never grades.
"""

import math
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from daemon.batch import Split


@dataclass(frozen=True)
class History:
    """Image hashes of earlier batches. An image in both sets (which no split makes) counts as exam."""

    exam: AbstractSet[str] = frozenset()
    trained: AbstractSet[str] = frozenset()  # tuning included


def split_images(
    images: Mapping[str, Iterable[str]],
    history: History,
    *,
    exam_fraction: float,
    tune_fraction: float,
    max_exam_images: int,
) -> dict[str, Split]:
    """The split of every image.

    Args:
        images: class key to the sha256 of its images; an image belongs to one class.
        exam_fraction: share of each class, rounded to the nearest image, at least one of two or more.
        max_exam_images: per class; images known from an earlier exam come on top.
    """
    result: dict[str, Split] = {}
    for members in images.values():
        unique = sorted(set(members))
        result |= dict.fromkeys(unique, "train")
        known_exam = [image for image in unique if image in history.exam]
        result |= dict.fromkeys(known_exam, "exam")
        unseen = [image for image in unique if image not in history.exam and image not in history.trained]
        trainable = len(unique) - len(known_exam)

        wanted = min(_share(len(unique), exam_fraction, least=1), max_exam_images) - len(known_exam)
        exam = unseen[: max(0, min(wanted, trainable - 1))]  # one image at least is left to learn from
        result |= dict.fromkeys(exam, "exam")

        spare = trainable - len(exam) - 1
        tune = unseen[len(exam) :][: max(0, min(_share(len(unique), tune_fraction, least=0), spare))]
        result |= dict.fromkeys(tune, "tune")
    return result


def _share(count: int, fraction: float, *, least: int) -> int:
    if fraction == 0:
        return 0
    return max(least, math.floor(count * fraction + 0.5))
