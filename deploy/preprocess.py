"""Decoded pictures to model input, without torch, equal to open_clip's own transform.

Every value is bit-equal to open_clip's evaluation transform (resize with Pillow, centre crop, /255,
normalise) of the RGB image that deploy.decode gives, except for pictures so elongated that its
intermediate image would not fit in memory; see _MAX_RESIZED_PIXELS.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from deploy import atomic
from deploy.decode import ImageSource, decode_image
from deploy.errors import ImageError, VerifyError

__all__ = ["ImageSource", "Preprocessing", "decode_image"]

Float32 = NDArray[np.float32]

# open_clip resizes first and crops then: a 30000×1 picture becomes 6,720,000×224 on the way. Above this
# size only the part that the crop keeps is computed; rounding then differs by a grey level here and there.
_MAX_RESIZED_PIXELS = 1 << 25

_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_RESCALE_FACTOR = 1 / 255


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its pictures: the numbers of open_clip's preprocess config.

    ``size`` is (height, width) in pixels; ``mean`` and ``std`` are per RGB channel of values in 0..1.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = 0

    @classmethod
    def from_open_clip_cfg(cls, cfg: Mapping[str, Any]) -> "Preprocessing":
        """Take over open_clip's ``preprocess_cfg``.

        Raises:
            VerifyError: a value is missing or cannot be used.
        """
        try:
            return cls(
                size=_pair(cfg["size"]),
                mean=_triple(cfg["mean"]),
                std=_triple(cfg["std"]),
                # open_clip resizes with bicubic wherever its config does not say bilinear.
                interpolation="bilinear" if cfg.get("interpolation") == "bilinear" else "bicubic",
                resize_mode=_resize_mode(cfg.get("resize_mode") or "shortest"),
                fill_color=int(cfg.get("fill_color") or 0),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise VerifyError(
                "this preprocess config cannot be used: expected size, mean, std, interpolation and "
                f"resize_mode as open_clip writes them, found {dict(cfg)} ({error!r})"
            ) from error

    @classmethod
    def load(cls, path: Path) -> "Preprocessing":
        """Read a ``preprocessor_config.json``, ours or that of a Hugging Face CLIPImageProcessor.

        Raises:
            VerifyError: it is not one; names the file and what is wrong.
        """
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            return cls.from_open_clip_cfg(
                {
                    "size": _edge_lengths(config),
                    "mean": config["image_mean"],
                    "std": config["image_std"],
                    "interpolation": "bilinear" if config.get("resample", 3) == 2 else "bicubic",
                    "resize_mode": config.get("resize_mode")
                    or ("shortest" if config.get("do_center_crop", True) else "squash"),
                    "fill_color": config.get("fill_color", 0),
                }
            )
        except (VerifyError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise VerifyError(
                f"{path} cannot be used: expected a CLIPImageProcessor's preprocessor_config.json, found "
                f"{error}. Copy or download the version again."
            ) from error

    def save(self, path: Path) -> None:
        """Write ``path`` in the Hugging Face format, durably.

        Hugging Face's own processor follows it exactly for square ``shortest`` and for ``squash``;
        the other resize modes, which its format cannot say, are in keys of our own.
        """
        height, width = self.size
        box = {"height": height, "width": width}
        plain_shortest = self.resize_mode == "shortest" and height == width
        config = {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": height} if plain_shortest else box,
            "resample": int(_RESAMPLE[self.interpolation]),
            "do_center_crop": self.resize_mode != "squash",
            "crop_size": box,
            "do_rescale": True,
            "rescale_factor": _RESCALE_FACTOR,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "resize_mode": self.resize_mode,
            "fill_color": self.fill_color,
        }
        atomic.write_json(path, config)

    def __call__(self, images: Sequence[Image.Image]) -> Float32:
        """Return pixel values (N, 3, height, width) of N decoded RGB images.

        Raises:
            ImageError: an image is not RGB; ``decode_image`` makes it so.
        """
        pixels = np.empty((len(images), 3, *self.size), np.float32)
        table = self._table()
        for row, image in zip(pixels, images, strict=True):
            if image.mode != "RGB":
                raise ImageError(f"expected an RGB image, found mode {image.mode}; use decode_image first")
            fitted = np.asarray(self._fit(image))
            for channel in range(3):
                np.take(table[channel], fitted[..., channel], out=row[channel])
        return pixels

    def _table(self) -> Float32:
        """Return (3, 256): what each 8-bit value becomes, by the same float32 operations as torch."""
        levels = np.arange(256, dtype=np.float32) / np.float32(255)
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        table: Float32 = (levels[None] - mean[:, None]) / std[:, None]
        return table

    def _fit(self, image: Image.Image) -> Image.Image:
        """Resize and crop to ``size``."""
        height, width = self.size
        resized = self._resized_size(image.width, image.height)
        # A non-square `shortest` is always bicubic in open_clip.
        is_bicubic = self.resize_mode == "shortest" and height != width
        resample = _RESAMPLE["bicubic" if is_bicubic else self.interpolation]
        if resized[0] * resized[1] > _MAX_RESIZED_PIXELS:
            return _resize_window(image, resized, (width, height), resample)
        if resized != image.size:
            image = image.resize(resized, resample)
        return _crop_or_pad(image, (width, height), self.fill_color)

    def _resized_size(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) before the crop, rounded as open_clip and torchvision round."""
        target_height, target_width = self.size
        if self.resize_mode == "squash":
            return target_width, target_height
        if self.resize_mode == "shortest" and target_height == target_width:
            if width <= height:
                return target_width, int(target_width * height / width)
            return int(target_height * width / height), target_height
        ratios = (height / target_height, width / target_width)
        ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
        return max(1, round(width / ratio)), max(1, round(height / ratio))


def _resize_window(
    image: Image.Image, resized: tuple[int, int], window: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
    """Compute only the centre ``window`` (width, height) of ``image`` resized to ``resized``."""
    left, top = (round((whole - kept) / 2) for whole, kept in zip(resized, window, strict=True))
    scale_x, scale_y = image.width / resized[0], image.height / resized[1]
    x0, x1 = left * scale_x, min((left + window[0]) * scale_x, image.width)
    y0, y1 = top * scale_y, min((top + window[1]) * scale_y, image.height)
    # The rows that the filter reaches; then columns before rows, as Pillow does for the whole picture
    # (for a narrow window it would turn the order round, and clip other values on the way).
    reach = math.ceil(3 * max(1, scale_y))
    first, last = max(0, math.floor(y0) - reach), min(image.height, math.ceil(y1) + reach)
    strip = image.crop((0, first, image.width, last))
    strip = strip.resize((window[0], strip.height), resample, box=(x0, 0, x1, strip.height))
    return strip.resize(window, resample, box=(0, y0 - first, window[0], y1 - first))


def _crop_or_pad(image: Image.Image, target: tuple[int, int], fill: int) -> Image.Image:
    """Cut the centre (width, height) out of ``image``, or lay it on a plain ground where it is smaller."""
    lacks = [max(0, wanted - found) for wanted, found in zip(target, image.size, strict=True)]
    if any(lacks):
        border = (lacks[0] // 2, lacks[1] // 2, (lacks[0] + 1) // 2, (lacks[1] + 1) // 2)
        image = ImageOps.expand(image, border=border, fill=(fill, fill, fill))
    left, top = (round((found - wanted) / 2) for found, wanted in zip(image.size, target, strict=True))
    return image.crop((left, top, left + target[0], top + target[1]))


def _edge_lengths(config: Mapping[str, Any]) -> Any:
    """Return the size after the crop out of a Hugging Face config, which writes it in several ways."""
    size = config["crop_size"] if config.get("do_center_crop", True) else config["size"]
    return [size["height"], size["width"]] if isinstance(size, Mapping) else size


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if int(height) < 1 or int(width) < 1:
        raise ValueError(f"size must be positive, found {size}")
    return int(height), int(width)


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (values,) * 3 if isinstance(values, int | float) else values
    return float(red), float(green), float(blue)


def _resize_mode(mode: Any) -> Literal["shortest", "longest", "squash"]:
    for known in ("shortest", "longest", "squash"):
        if mode == known:
            return known
    raise ValueError(f"resize_mode must be shortest, longest or squash, found {mode!r}")
