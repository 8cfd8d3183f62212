"""Both towers as a loss sees them: L2-normalised float32 embeddings, computed in the dtype of the plan.

bfloat16 halves what is moved and doubles the speed of products where the processor has instructions for it.
What learns, the optimiser, the loss and the fold stay in float32.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynlora import attach, prompts, towers
from dynlora.clip import Clip
from dynlora.prompts import Prompts
from dynlora.settings import Settings

Dtype = Literal["float32", "bfloat16"]
Part = TypeVar("Part", Tensor, Prompts)

# What is measured to choose a dtype: enough vectors for large products, at a fraction of a step's time.
_TRIAL_IMAGES = 8
_TRIAL_PROMPTS = 16
_TRIALS = 3
# Rounding costs a little; a small gain, or one that a busy machine pretended, is not worth it.
_WORTH = 1.2


@dataclass(frozen=True)
class Encoders:
    """A model's towers, computing in one dtype, and as many at once as memory allows.

    Of more images or prompts than `…_at_once` only the embeddings are kept; when their gradients arrive, part
    by part is computed once more. A contrastive loss, which does not split into parts, stays the same.
    """

    model: nn.Module
    dtype: Dtype = "float32"
    images_at_once: int | None = None  # None: all
    prompts_at_once: int | None = None

    @classmethod
    def by(cls, settings: Settings, model: nn.Module) -> Self:
        """As `settings` want them."""
        return cls(model, settings.dtype, settings.images_at_once, settings.prompts_at_once)

    def images(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, dim) float32, L2-normalised, differentiable."""
        return _in_parts(self._images, torch.split(pixels, self.images_at_once or len(pixels)))

    def texts(self, of: Prompts) -> Tensor:
        """N prompts → (N, dim) float32, L2-normalised, differentiable."""
        rows = torch.split(torch.arange(len(of)), self.prompts_at_once or len(of))
        return _in_parts(self._texts, [of.rows(part) for part in rows] if len(rows) > 1 else [of])

    def _images(self, pixels: Tensor) -> Tensor:
        with self._autocast(pixels):
            features = towers.embed_images(self.model, pixels)
        return F.normalize(features.float(), dim=-1)

    def _texts(self, of: Prompts) -> Tensor:
        with self._autocast(of.tokens):
            return towers.embed_texts(self.model, of)

    def _autocast(self, example: Tensor) -> torch.autocast:
        # Frozen weights are not worth autocast's cache: ours keeps those of the large products.
        return torch.autocast(
            example.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16", cache_enabled=False
        )


def _in_parts(embed: Callable[[Part], Tensor], parts: Sequence[Part]) -> Tensor:
    """The embeddings of all parts; what leads to them is kept for the last part alone.

    That part's gradients are the first to be computed, so it would be computed twice for nothing.
    """
    *others, last = parts
    if not others:
        return embed(last)
    kept: list[Tensor] = [
        checkpoint(embed, part, use_reentrant=False, preserve_rng_state=False) for part in others
    ]
    return torch.cat([*kept, embed(last)])


def fastest_dtype(clip: Clip, *, rank: int) -> Dtype:
    """Try forward and backward passes in both dtypes, in turn; bfloat16 only where it clearly pays.

    Without instructions for it bfloat16 is slower: nothing needs to know which processor this is.
    """
    pixels = torch.zeros(_TRIAL_IMAGES, 3, *clip.image_size)
    of = prompts.tokenize(clip, [f"thing number {number}" for number in range(_TRIAL_PROMPTS)])
    seconds: dict[Dtype, list[float]] = {"float32": [], "bfloat16": []}
    with attach.attached(clip.model, rank) as sites:
        attach.reset(sites, seed=0, random_importance=False)
        parameters = [parameter for site in sites for parameter in site.lora.parameters()]
        for _ in range(1 + _TRIALS):
            for dtype, took in seconds.items():
                encoders = Encoders(clip.model, dtype)
                took.append(
                    _seconds_of(
                        lambda encoders=encoders: torch.autograd.grad(  # type: ignore[misc]
                            encoders.images(pixels).sum() + encoders.texts(of).sum(), parameters
                        )
                    )
                )
    float32, bfloat16 = (min(took[1:]) for took in seconds.values())  # the first one warms up
    return "bfloat16" if bfloat16 * _WORTH < float32 else "float32"


def _seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
