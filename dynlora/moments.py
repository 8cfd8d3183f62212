"""What a vision tower answers to images in general: mean and covariance of its embeddings, no image.

A class that is learnt must stand above other names on its own images, and on no others. Others are not at
hand, and need not be: two moments say where they lie. They are numbers of the model, as the running
statistics of a normalisation layer are, made once from images of the kind it was trained on.
D is the width of the embeddings.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dynlora.errors import ModelError

_SHRINKAGE = 0.05  # of the covariance towards an even one: directions nobody has seen are not impossible
REMEDY = "copy the file from a new home of the same model, or delete it: learning goes on without"


@dataclass(frozen=True)
class ImageMoments:
    """Mean (D,) and covariance (D, D) of unit embeddings of images, float32."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, embeddings: Tensor) -> Self:
        """The moments of (N, D) unit embeddings, N >= 2."""
        assert embeddings.ndim == 2 and len(embeddings) >= 2, embeddings.shape
        return cls(embeddings.mean(0), torch.cov(embeddings.T))

    @classmethod
    def of_classes(cls, embeddings: Tensor, labels: Tensor) -> Self:
        """The moments of (N, D) unit embeddings with labels (N,), every class with the same weight."""
        counts = torch.bincount(labels)
        weights = 1 / (counts[labels] * torch.count_nonzero(counts))  # (N,), they add up to 1
        mean = weights @ embeddings
        apart = embeddings - mean
        return cls(mean, (weights[:, None] * apart).T @ apart)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, D) unit vectors, distributed as embeddings of images are."""
        noise = torch.randn(count, len(self.mean), generator=generator)
        return F.normalize(self.mean + noise @ self._root.T, dim=-1)

    @cached_property
    def _root(self) -> Tensor:
        width = len(self.mean)
        even = torch.eye(width) * (self.covariance.trace() / width)
        root: Tensor = torch.linalg.cholesky(self.covariance + _SHRINKAGE * even + 1e-9 * torch.eye(width))
        return root

    def content(self, metadata: dict[str, str] | None = None) -> bytes:
        """A .safetensors file that `load` reads, with strings for its header."""
        return save({"mean": self.mean.contiguous(), "covariance": self.covariance.contiguous()}, metadata)

    @classmethod
    def load(cls, path: Path, *, width: int) -> Self:
        """Read a file of `content`.

        Raises:
            ModelError: the file is damaged, or of a model of another width.
        """
        try:
            tensors = load_file(path)
            moments = cls(tensors["mean"].float(), tensors["covariance"].float())
        except (SafetensorError, KeyError, OSError) as error:
            raise ModelError(f"cannot read the image moments in {path}: {error}; {REMEDY}") from error
        if moments.mean.shape != (width,) or moments.covariance.shape != (width, width):
            raise ModelError(
                f"{path} has image moments of width {len(moments.mean)}; the model's embeddings have {width}"
            )
        if not all(bool(tensor.isfinite().all()) for tensor in (moments.mean, moments.covariance)):
            raise ModelError(f"{path} has image moments that are no numbers; {REMEDY}")
        try:
            moments._root  # noqa: B018 - nothing can be drawn without it
        except RuntimeError as error:
            raise ModelError(f"{path} has a covariance that no images can have; {REMEDY}") from error
        return moments


@dataclass(frozen=True)
class MixedMoments:
    """Images of two kinds: a `share` of what is drawn is of the second."""

    first: ImageMoments
    second: ImageMoments
    share: float

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, D) unit vectors, those of the first kind first."""
        of_second = round(count * self.share)
        drawn = [
            self.first.draw(count - of_second, generator),
            self.second.draw(of_second, generator),
        ]
        return torch.cat(drawn)
