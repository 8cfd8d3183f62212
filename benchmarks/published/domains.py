"""The real data sets of MTIL and X-TAIL where they lie: CoOp's folder layout, decoded when they are asked.

CoOp (KaiyangZhou/CoOp, DATASETS.md) keeps each data set's images as they were released, beside a
`split_zhou_*.json` with lists of [image, label, class name]; Aircraft comes with its own lists. CoOp has no
MNIST and no CIFAR-100: they are expected as `<split>/<class name>/<file>`, split = train or test.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.stream.packs import Images
from deploy.decode import decode_image
from deploy.preprocess import Preprocessing

Listed = list[tuple[Path, str]]


@dataclass(frozen=True)
class Domain:
    """One data set: its folder, the folder of its images within, its split file, and its prompt."""

    folder: str
    images: str
    split: str  # "" for <split>/<class>/<file>, "variants" for Aircraft's own lists
    template: str = "a photo of a {}."


DOMAINS = {
    "Aircraft": Domain("fgvc_aircraft", "images", "variants", "a photo of a {}, a type of aircraft."),
    "Caltech101": Domain("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json"),
    "CIFAR100": Domain("cifar-100", "", ""),
    "DTD": Domain("dtd", "images", "split_zhou_DescribableTextures.json", "{} texture."),
    "EuroSAT": Domain("eurosat", "2750", "split_zhou_EuroSAT.json", "a centered satellite photo of {}."),
    "Flowers": Domain(
        "oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json", "a photo of a {}, a type of flower."
    ),
    "Food": Domain("food-101", "images", "split_zhou_Food101.json", "a photo of {}, a type of food."),
    "MNIST": Domain("mnist", "", "", 'a photo of the number: "{}".'),
    "OxfordPet": Domain(
        "oxford_pets", "images", "split_zhou_OxfordPets.json", "a photo of a {}, a type of pet."
    ),
    "StanfordCars": Domain("stanford_cars", "", "split_zhou_StanfordCars.json"),
    "SUN397": Domain("sun397", "SUN397", "split_zhou_SUN397.json"),
}
MTIL = tuple(DOMAINS)
XTAIL = tuple(name for name in DOMAINS if name != "CIFAR100")


@dataclass(frozen=True)
class ImageFiles:
    """Images decoded each time they are asked for: a test split of Food is 18 GB as tensors."""

    files: list[Path]
    labels: Tensor
    preprocessing: Preprocessing

    def parts(self, size: int) -> Iterator[Tensor]:
        """The pixels, so many at a time."""
        for start in range(0, len(self.files), size):
            images = [decode_image(path) for path in self.files[start : start + size]]
            yield torch.from_numpy(self.preprocessing(images))


class DomainPack:
    """One data set under `root`; classes in alphabetical order."""

    def __init__(self, root: Path, name: str, preprocessing: Preprocessing) -> None:
        self.domain, self.preprocessing = DOMAINS[name], preprocessing
        self.template = self.domain.template
        self.path = root / self.domain.folder
        if not self.path.is_dir():
            sys.exit(f"{name}: {self.path} is not there; expected CoOp's folder layout under --root")
        self._listed = {split: self._list(split) for split in ("train", "test")}
        self.classes = sorted({label for _, label in self._listed["test"]})
        missing = set(self.classes) - {label for _, label in self._listed["train"]}
        if missing:
            sys.exit(f"{name}: {self.path} has no training image of {', '.join(sorted(missing))}")

    def train(self, seed: int, *, shots: int, held_out: int = 0) -> tuple[Images, Images]:
        """`shots` training images per class in memory, and up to `held_out` others."""
        rng = np.random.default_rng(seed)
        chosen: tuple[Listed, Listed] = ([], [])
        for members in self._by_class("train"):
            order = [members[index] for index in rng.permutation(len(members))]
            chosen[0].extend(order[:shots])
            chosen[1].extend(order[shots : shots + held_out])
        return self._in_memory(chosen[0]), self._in_memory(chosen[1])

    def test(self, per_class: int | None = None) -> ImageFiles:
        """The test split, or the first `per_class` images of each of its classes."""
        return self._files([entry for members in self._by_class("test") for entry in members[:per_class]])

    def _list(self, split: str) -> Listed:
        images = self.path / self.domain.images
        if self.domain.split == "variants":
            lines = (self.path / f"images_variant_{split}.txt").read_text().splitlines()
            pairs = [line.split(" ", 1) for line in lines if line]
            return [(images / f"{image}.jpg", label) for image, label in pairs]
        if self.domain.split:
            entries = json.loads((self.path / self.domain.split).read_text())[split]
            return [(images / image, label.replace("_", " ")) for image, _, label in entries]
        return [(path, path.parent.name) for path in sorted((self.path / split).glob("*/*"))]

    def _by_class(self, split: str) -> list[Listed]:
        members: dict[str, Listed] = {name: [] for name in self.classes}
        for path, label in self._listed[split]:
            if label in members:
                members[label].append((path, label))
        return list(members.values())

    def _files(self, entries: Listed) -> ImageFiles:
        place = {name: index for index, name in enumerate(self.classes)}
        labels = torch.tensor([place[label] for _, label in entries], dtype=torch.int64)
        return ImageFiles([path for path, _ in entries], labels, self.preprocessing)

    def _in_memory(self, entries: Listed) -> Images:
        files = self._files(entries)
        pixels = list(files.parts(256)) or [torch.empty(0, 3, *self.preprocessing.size)]
        return Images(torch.cat(pixels), files.labels)
