"""Training images in memory, and what may happen to them on their way into a batch."""

import io
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SUFFIXES = {".jpg", ".jpeg", ".png"}
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]  # CLIP's own
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]


@dataclass(frozen=True)
class ImageSet:
    """`pixels` (N, 3, side, side) uint8, `labels` (N,) int64 into `classes`."""

    classes: list[str]
    pixels: Tensor
    labels: Tensor


def load(path: Path, split: str, side: int) -> ImageSet:
    """Read `<split>/<class>/<file>` from a zip or a folder; shorter side to `side`, centre crop.

    Raises SystemExit if there is nothing to read.
    """
    files = _in_zip(path, split) if path.is_file() else _in_folder(path, split)
    if not files:
        raise SystemExit(f"no images under {split}/<class>/ in {path}")
    classes = sorted({name for name, _ in files})
    with ThreadPoolExecutor(2) as pool:
        pixels = list(pool.map(lambda item: _decode(item[1], side), files))
    labels = torch.tensor([classes.index(name) for name, _ in files])
    return ImageSet(classes, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), labels)


def _in_zip(path: Path, split: str) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        parts = [(name.split("/"), name) for name in sorted(archive.namelist())]
        return [(p[1], archive.read(n)) for p, n in parts if len(p) == 3 and p[0] == split and _is_image(n)]


def _in_folder(path: Path, split: str) -> list[tuple[str, bytes]]:
    return [
        (file.parent.name, file.read_bytes())
        for file in sorted((path / split).glob("*/*"))
        if _is_image(file)
    ]


def _is_image(name: str | Path) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _decode(data: bytes, side: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = side / min(image.size)
    image = image.resize(
        (max(side, round(image.width * scale)), max(side, round(image.height * scale))),
        Image.Resampling.BICUBIC,
    )
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


def random_boxes(count: int, *, least: float, generator: torch.Generator) -> Tensor:
    """Crops as (left, top, width, height) in shares of the image, (count, 4): `least` to all of the area."""
    area = torch.empty(count).uniform_(least, 1.0, generator=generator)
    ratio = torch.empty(count).uniform_(-0.288, 0.288, generator=generator).exp()  # 3:4 to 4:3
    size = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1).clamp(max=1.0)
    return torch.cat([torch.rand(count, 2, generator=generator) * (1 - size), size], dim=1)


def jittered(boxes: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """The boxes of `random_boxes` with every edge moved by up to `strength`, still inside of the image."""
    moves = strength * (2 * torch.rand(2, len(boxes), 2, generator=generator) - 1)
    least = (boxes[:, :2] + moves[0]).clamp(min=0)
    most = (boxes[:, :2] + boxes[:, 2:] + moves[1]).clamp(max=1)
    return torch.cat([least, most - least], dim=1)


def crop(pixels: Tensor, boxes: Tensor, side: int, mirror: Tensor | None = None) -> Tensor:
    """Cut `boxes` out of uint8 images and bring them to (N, 3, side, side), floats between 0 and 1."""
    left, top, width, height = boxes.unbind(1)
    turned = torch.ones(len(boxes)) if mirror is None else 1 - 2 * mirror.float()
    theta = torch.zeros(len(boxes), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * turned, height
    theta[:, 0, 2], theta[:, 1, 2] = 2 * left + width - 1, 2 * top + height - 1
    grid = F.affine_grid(theta, [len(boxes), 3, side, side], align_corners=False)
    return F.grid_sample(
        pixels.float() / 255, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )


def recolour(images: Tensor, generator: torch.Generator, strength: float = 0.3) -> Tensor:
    """Change brightness, contrast and saturation of each image by up to `strength`."""
    b, c, s = (1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1, generator=generator) - 1)).unbind(0)
    images = images * b
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * c
    gray = images.mean(dim=1, keepdim=True)
    return (gray + (images - gray) * s).clamp(0, 1)


def coarsen(images: Tensor, factor: float) -> Tensor:
    """What is left of images that were `factor` times as wide and high: for pictures that were small once."""
    small = F.interpolate(images, scale_factor=factor, mode="area")
    return F.interpolate(small, size=images.shape[-2:], mode="bicubic", align_corners=False).clamp(0, 1)


def normalize(images: Tensor) -> Tensor:
    """CLIP's mean and deviation."""
    return (images - MEAN) / STD


def paste(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """CutMix (arXiv 1905.04899): a rectangle of every image comes from another one.

    Returns:
        The images, the index of the other image (N,), and the share of the area that is still its own.
    """
    side = images.shape[-1]
    order = torch.randperm(len(images), generator=generator)
    cut = (1 - torch.rand(1, generator=generator).item()) ** 0.5
    size = max(1, round(side * cut))
    top, left = (int(torch.randint(side - size + 1, (1,), generator=generator)) for _ in range(2))
    mixed = images.clone()
    mixed[:, :, top : top + size, left : left + size] = images[order, :, top : top + size, left : left + size]
    return mixed, order, 1 - (size / side) ** 2
