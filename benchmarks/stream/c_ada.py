"""C-ADA-style: adapters beside attention and MLP of every block, which grow by a few channels with each task.

After "Beyond Prompt Learning" (ECCV 2024): x → ReLU((α ⊙ x + β) Downᵀ) Up, added to what the frozen part
makes of the same x. Scale and shift (α, β) learn the first task's domain and are frozen; each task adds
channels of its own, the older ones are frozen, and a loss keeps what new channels look at orthogonal to what
older ones do. The original has a vision tower and a classifier; here names learn too, so both towers have
adapters. Our reading of the paper, whose code is not public.

Shapes: N images or prompts, L tokens, D width of a block, R channels of a task.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.stream.adapters import Adapter, Branch, beside, blocks_of, width_of
from benchmarks.stream.methods import Params, Similarity
from dynlora import Clip, Task
from dynlora.prompts import Prompts, encode_text

_CHANNELS = 4  # R: a task then adds as many parameters as DIKI's keys and values
_ORTHOGONALITY = 1.0  # of the loss; a task that is tuned on has no older one, so tuning cannot choose it


class Growing:
    """An adapter of width D: scale and shift, and channels task by task."""

    def __init__(self, width: int) -> None:
        self.scale, self.shift = torch.ones(width), torch.zeros(width)
        self.down: list[Tensor] = []  # (R, D) of each task
        self.up: list[Tensor] = []

    def grow(self, generator: torch.Generator) -> list[Tensor]:
        """Add channels; returns what is trained with them."""
        width = len(self.scale)
        self.down.append(torch.empty(_CHANNELS, width).uniform_(-1, 1, generator=generator) / width**0.5)
        self.up.append(torch.zeros(_CHANNELS, width))
        is_first = len(self.down) == 1
        return [self.down[-1], self.up[-1], *((self.scale, self.shift) if is_first else ())]

    def __call__(self, x: Tensor) -> Tensor:
        """(N, L, D) → (N, L, D)."""
        channels = F.relu((self.scale * x + self.shift) @ torch.cat(self.down).T)
        return channels @ torch.cat(self.up)

    def overlap(self) -> Tensor:
        """Squares of the products of the newest channels' directions with those of all older ones."""
        *old, new = self.down
        return (torch.cat(old) @ new.T).square().sum() if old else torch.zeros(())

    @property
    def parameters(self) -> int:
        """All numbers that inference needs."""
        return sum(tensor.numel() for tensor in (self.scale, self.shift, *self.down, *self.up))


class CAda(Adapter):
    """Two growing adapters a block; all channels count for every image."""

    name = "c-ada"
    grid: tuple[Params, ...] = tuple({"learning_rate": rate} for rate in (1e-3, 3e-3, 1e-2))

    def __init__(self) -> None:
        super().__init__()
        self.adapters: list[Growing] = []  # beside attention and MLP of each block, in order

    @property
    def added_parameters(self) -> int:
        """Of all tasks."""
        return sum(adapter.parameters for adapter in self.adapters)

    def grown(self, clip: Clip, task: Task, seed: int) -> list[Tensor]:
        """Channels in every adapter; with the first task the adapters too."""
        del task
        if not self.adapters:
            self.adapters = [Growing(width_of(block)) for block in blocks_of(clip.model) for _ in range(2)]
        generator = torch.Generator().manual_seed(seed)
        return [tensor for adapter in self.adapters for tensor in adapter.grow(generator)]

    def branches(self, model: nn.Module) -> dict[nn.Module, Branch]:
        """Every adapter beside its part."""
        parts = [part for block in blocks_of(model) for part in (block.module.attn, block.module.mlp)]
        return dict(zip(parts, self.adapters, strict=True))  # type: ignore[arg-type]

    def restraint(
        self, images: Tensor, texts: Tensor, chosen: Tensor, weights: dict[str, Tensor], params: Params
    ) -> Tensor:
        """The orthogonality of new channels to older ones."""
        del images, texts, chosen, weights, params
        return _ORTHOGONALITY * torch.stack([adapter.overlap() for adapter in self.adapters]).sum()

    def similarity(self, clip: Clip, prompts: Prompts) -> Similarity:
        """With all adapters on."""
        if not self.adapters:
            return super().similarity(clip, prompts)
        branches = self.branches(clip.model)
        with beside(branches):
            texts = encode_text(clip.model, prompts)

        def similar(pixels: Tensor) -> Tensor:
            with beside(branches):
                return F.normalize(clip.model.visual(pixels), dim=-1) @ texts.T  # type: ignore[operator]

        return similar
