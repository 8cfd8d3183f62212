"""The image packs as tensors: few training images per class, a held-out part of train, and the test split.

Images are decoded once, through the preprocessing that serving uses. Which training images are the shots, and
which are held out to tune on, follows from the seed; neither ever holds an image of the test split.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.packs import decoded, images_of
from deploy.preprocess import Preprocessing
from dynlora.prompts import DEFAULT_TEMPLATE
from dynlora.task import Name, Task

STREAM = (
    "aerial_scenes_rsscn7",
    "caltech_objects",
    "textures_dtd10",
    "clothing",
    "flowers5",
    "groceries",
    "mnist_digits",
    "omniglot_alphabets",
    "pacs_sketch",
    "traffic_signs_gtsrb",
)
PROBES = ("tiny_imagenet_200", "cifar10", "pacs_photo", "pacs_art_painting")


@dataclass(frozen=True)
class Images:
    """Pixels (N, 3, H, W) float32 and labels (N,) int64 into the pack's classes."""

    pixels: Tensor
    labels: Tensor

    def parts(self, size: int) -> Iterator[Tensor]:
        """The pixels, so many at a time."""
        yield from torch.split(self.pixels, size)


class Asked(Protocol):
    """Images that are asked about, in memory or decoded each time."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64 into the pack's classes."""

    def parts(self, size: int) -> Iterator[Tensor]:
        """The pixels, so many at a time."""


class Labelled(Protocol):
    """What has classes and a prompt template: a pack, or a data set in its own layout."""

    classes: list[str]
    template: str


class Source(Labelled, Protocol):
    """What a stream is made of."""

    path: Path

    def train(self, seed: int, *, shots: int, held_out: int) -> tuple[Images, Images]:
        """Training images in memory, and others to tune on."""

    def test(self, per_class: int | None = None) -> Asked:
        """The test split, or some of it."""


class Pack:
    """One zip of `<split>/<class>/<file>`; classes in alphabetical order."""

    template = DEFAULT_TEMPLATE

    def __init__(self, path: Path, preprocessing: Preprocessing) -> None:
        self.path, self.preprocessing = path, preprocessing
        self._members: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
        for split, by_class in self._members.items():
            for label, member in sorted(images_of(path, split)):
                by_class.setdefault(label, []).append(member)
        self.classes = sorted(self._members["test"])

    def train(self, seed: int, *, shots: int, held_out: int) -> tuple[Images, Images]:
        """`shots` training images per class, and after them up to `held_out` others to tune on."""
        rng = np.random.default_rng([seed, len(self.path.stem)])
        chosen: tuple[list[list[str]], list[list[str]]] = ([], [])
        for name in self.classes:
            members = rng.permutation(self._members["train"][name]).tolist()
            chosen[0].append(members[:shots])
            chosen[1].append(members[shots : shots + held_out])
        return self._load(chosen[0]), self._load(chosen[1])

    def test(self, per_class: int | None = None) -> Images:
        """The test split, or the first `per_class` images of each of its classes."""
        return self._load([self._members["test"][name][:per_class] for name in self.classes])

    def _load(self, per_class: list[list[str]]) -> Images:
        images = decoded(self.path, [member for members in per_class for member in members])
        labels = np.repeat(np.arange(len(per_class)), [len(members) for members in per_class])
        return Images(torch.from_numpy(self.preprocessing(images)), torch.from_numpy(labels))


@dataclass(frozen=True)
class Drop:
    """What is learnt at once: a whole pack, or one of its classes."""

    stage: int  # the number of its pack in the stream
    task: Task


def drops_of(packs: Sequence[Labelled], train: Sequence[Images], *, one_class: bool) -> list[Drop]:
    """The stream in order; each task knows the names of those before it."""
    drops: list[Drop] = []
    known: dict[str, Name] = {}
    for stage, (pack, images) in enumerate(zip(packs, train, strict=True)):
        groups = (
            [[index] for index in range(len(pack.classes))] if one_class else [[*range(len(pack.classes))]]
        )
        for group in groups:
            rows = torch.isin(images.labels, torch.tensor(group))
            classes = [Name(pack.classes[index], pack.template) for index in group]
            own = {c.name for c in classes}
            labels = images.labels[rows] - group[0]
            task = Task(
                classes, images.pixels[rows], labels, known=[n for n in known.values() if n.name not in own]
            )
            drops.append(Drop(stage, task))
            known |= {c.name: c for c in classes}
    return drops


def union_names(packs: Sequence[Labelled]) -> list[Name]:
    """Every class name once, in the order of the stream and with the template of its first pack."""
    found: dict[str, Name] = {}
    for pack in packs:
        for name in pack.classes:
            found.setdefault(name, Name(name, pack.template))
    return list(found.values())
