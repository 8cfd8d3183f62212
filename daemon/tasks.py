"""What is to be learnt: the order, and a batch's images and names as a task for the learner.

Runs in the worker only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from daemon.batch import Batch, BatchImage
from daemon.config import Config
from daemon.pixels import load_pixels
from deploy.manifest import ClassEntry
from deploy.preprocess import Preprocessing
from dynlora.task import Name, Task


@dataclass(frozen=True)
class Order:
    """What to do with which batch, on top of which version."""

    home: Path
    batch_id: str
    parent: int
    config: Config


def union_of_classes(known: tuple[ClassEntry, ...], batch: Batch) -> tuple[ClassEntry, ...]:
    """Every known name in its order, then the batch's new ones. A known class keeps its first spelling."""
    keys = {entry.key for entry in known}
    new = [c for c in batch.classes if c.key not in keys]
    return (
        *known,
        *(ClassEntry(name=c.name, key=c.key, template=c.template, batch=batch.id) for c in new),
    )


def load_task(
    batch: Batch, work_dir: Path, preprocessing: Preprocessing, classes: tuple[ClassEntry, ...]
) -> Task:
    """The batch's training and tuning images in memory, each decoded once. Exam images are not opened.

    Raises:
        BatchError: an image is missing, a link, or not what was taken in; names it.
    """
    entries = {entry.key: entry for entry in classes}
    keys = [c.key for c in batch.classes]
    own = set(keys)

    pixels, labels = load_images(batch, batch.split("train"), work_dir, preprocessing)
    tune_pixels, tune_labels = load_images(batch, batch.split("tune"), work_dir, preprocessing)
    return Task(
        classes=[Name(entries[key].name, entries[key].template) for key in keys],
        pixels=pixels,
        labels=labels,
        tune_pixels=tune_pixels,
        tune_labels=tune_labels,
        known=[Name(entry.name, entry.template) for entry in classes if entry.key not in own],
    )


def load_images(
    batch: Batch, images: Sequence[BatchImage], base: Path, preprocessing: Preprocessing
) -> tuple[Tensor, Tensor]:
    """Pixels (N, 3, H, W) float32 and labels (N,) int64 into the batch's classes; files lie under `base`.

    Raises:
        BatchError: an image is missing, a link, or not what was taken in; names it.
    """
    pixels = np.empty((len(images), 3, *preprocessing.size), np.float32)
    for row, image in zip(pixels, images, strict=True):
        row[:] = load_pixels(base / image.file, preprocessing, sha256=image.sha256)
    rows = {c.key: row for row, c in enumerate(batch.classes)}
    labels = torch.tensor([rows[image.class_key] for image in images], dtype=torch.int64)
    return torch.from_numpy(pixels), labels
