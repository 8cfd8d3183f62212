"""Other views of a task's own images, and stand-ins for the rest of the visual world made out of them.

Pure functions of tensors and a generator. Pixels are (N, 3, H, W) float32, normalised; values stay within
what a real image can have. Nothing here needs, or keeps, an image of another task.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_NOISE_GRIDS = ((2, 1.0), (4, 0.7), (8, 0.5), (16, 0.35), (32, 0.25))  # cells a side, weight: coarse to fine
_TILES = 4  # a side, of the jigsaw
_RANGE = 3.7  # from black to white, in standard deviations of the usual normalisation


@dataclass(frozen=True)
class Views:
    """V ways to look at each of N images, drawn once, so that the previous model is asked about them once.

    theta: (V, N, 2, 3) affine maps; contrast, brightness: (V, N); low, high: (1, 3, 1, 1), the range of real
    pixels, which a view does not leave.
    """

    theta: Tensor
    contrast: Tensor
    brightness: Tensor
    low: Tensor
    high: Tensor

    def render(self, pixels: Tensor, image: Tensor, view: Tensor) -> Tensor:
        """View number `view` of image number `image`, (B,) each, out of all `pixels` → (B, 3, H, W)."""
        chosen = pixels[image]
        grid = F.affine_grid(self.theta[view, image], list(chosen.shape), align_corners=False)
        cropped = F.grid_sample(chosen, grid, padding_mode="reflection", align_corners=False)
        mean = cropped.mean((1, 2, 3), keepdim=True)
        contrast, brightness = (
            values[view, image].view(-1, 1, 1, 1) for values in (self.contrast, self.brightness)
        )
        return torch.clamp((cropped - mean) * contrast + mean + brightness, self.low, self.high)


def draw_views(
    pixels: Tensor, views: int, generator: torch.Generator, *, min_area: float, jitter: float
) -> Views:
    """Random crops (area share in [min_area, 1], aspect within ±20 %), flips, contrasts and brightnesses.

    Args:
        jitter: of contrast (twice) and brightness, as a share of the full range.
    """
    shape = (views, len(pixels))
    area = _uniform(shape, generator, min_area, 1.0)
    aspect = torch.exp(_uniform(shape, generator, -0.2, 0.2))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(*shape, 2, 3)
    theta[..., 0, 0] = width * torch.where(_uniform(shape, generator, 0, 1) < 0.5, -1.0, 1.0)
    theta[..., 0, 2] = _uniform(shape, generator, -1, 1) * (1 - width)
    theta[..., 1, 1] = height
    theta[..., 1, 2] = _uniform(shape, generator, -1, 1) * (1 - height)
    contrast = _uniform(shape, generator, 1 - 2 * jitter, 1 + 2 * jitter)
    brightness = _uniform(shape, generator, -_RANGE * jitter, _RANGE * jitter)
    return Views(theta, contrast, brightness, *_range(pixels))


def stand_ins(pixels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` images unlike any class: blends, jigsaws, noise, close-ups and negatives of the given ones.

    They probe the model where the task's images do not, so that keeping its answers there keeps what it knew.
    """
    first, second = (pixels[torch.randint(len(pixels), (count,), generator=generator)] for _ in range(2))
    channels = torch.stack([torch.randperm(3, generator=generator) for _ in range(count)])
    first = first.gather(1, channels.view(count, 3, 1, 1).expand_as(first))
    kinds = (
        _blend(first, second, generator),
        _jigsaw(first, generator),
        _noise(first, generator),
        _close_up(first),
        _patched_negative(first, second, generator),
    )
    kind = torch.randint(len(kinds), (count,), generator=generator).view(count, 1, 1, 1)
    out = torch.zeros_like(first)
    for number, images in enumerate(kinds):
        out = torch.where(kind == number, images, out)
    return torch.clamp(out, *_range(pixels))


def _blend(first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    share = torch.rand(len(first), 1, 1, 1, generator=generator)
    return share * first + (1 - share) * second.flip(-1)


def _jigsaw(images: Tensor, generator: torch.Generator) -> Tensor:
    n, c, h, w = images.shape
    th, tw = h // _TILES, w // _TILES
    tiles = images[:, :, : th * _TILES, : tw * _TILES].reshape(n, c, _TILES, th, _TILES, tw)
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).reshape(n, _TILES**2, c, th, tw)
    order = torch.rand(n, _TILES**2, generator=generator).argsort(1)
    tiles = tiles.gather(1, order.view(n, -1, 1, 1, 1).expand_as(tiles))
    whole = tiles.view(n, _TILES, _TILES, c, th, tw).permute(0, 3, 1, 4, 2, 5)
    return F.interpolate(whole.reshape(n, c, th * _TILES, tw * _TILES), (h, w))


def _noise(images: Tensor, generator: torch.Generator) -> Tensor:
    n, _, h, w = images.shape
    layers = (
        weight * F.interpolate(torch.randn(n, 3, side, side, generator=generator), (h, w), mode="bilinear")
        for side, weight in _NOISE_GRIDS
    )
    return sum(layers, torch.zeros(n, 3, h, w)) * 0.9


def _close_up(images: Tensor) -> Tensor:
    h, w = images.shape[-2:]
    window = images[..., h // 4 : h // 4 + math.ceil(h / 3), w // 4 : w // 4 + math.ceil(w / 3)]
    return F.interpolate(window, (h, w), mode="bilinear")


def _patched_negative(first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    mask = (
        F.interpolate(torch.randn(len(first), 1, 4, 4, generator=generator), first.shape[-2:], mode="bicubic")
        > 0
    )
    negative = first.amin() + first.amax() - second
    return torch.where(mask, first, negative)


def _range(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest value of each channel, (1, 3, 1, 1) each."""
    return pixels.amin((0, 2, 3), keepdim=True), pixels.amax((0, 2, 3), keepdim=True)


def _uniform(shape: tuple[int, ...], generator: torch.Generator, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)
