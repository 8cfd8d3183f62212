"""A batch of labelled images in memory, as the learner takes it.

Knows nothing of files: whoever decodes the images hands over pixel values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynlora.errors import TaskError
from dynlora.moments import ImageMoments
from dynlora.prompts import DEFAULT_TEMPLATE


@dataclass(frozen=True)
class Name:
    """A class name with the template its prompt is made from."""

    name: str
    template: str = DEFAULT_TEMPLATE


@dataclass(frozen=True)
class Task:
    """One batch: its classes, its images, and the names already known (no image of theirs).

    pixels: (N, 3, H, W) float32, preprocessed as for serving; labels: (N,) int64 into `classes`.
    tune_pixels, tune_labels: held out of training, for choices such as the size of the update; may be empty.
    known: names learnt or given before, less this task's own.
    moments: what the vision tower answers to images in general; None: taken from the task's own images.
    seen: what it answered to the images of earlier tasks.
    """

    classes: Sequence[Name]
    pixels: Tensor
    labels: Tensor
    tune_pixels: Tensor = field(default_factory=lambda: torch.empty(0))
    tune_labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    known: Sequence[Name] = ()
    moments: ImageMoments | None = None
    seen: ImageMoments | None = None

    def __post_init__(self) -> None:
        for what, pixels, labels in (
            ("training", self.pixels, self.labels),
            ("tuning", self.tune_pixels, self.tune_labels),
        ):
            if len(pixels) != len(labels):
                raise TaskError(
                    f"{len(pixels)} {what} images came with {len(labels)} labels; expected one each"
                )
            if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < len(self.classes)):
                raise TaskError(f"a {what} label is outside 0..{len(self.classes) - 1}, the task's classes")
        missing = set(range(len(self.classes))) - set(self.labels.tolist())
        if missing:
            names = ", ".join(repr(self.classes[i].name) for i in sorted(missing))
            raise TaskError(f"no training image for {names}; expected at least one per class")
