"""Which images make up a step, and where its random numbers come from. Stateless: resuming is exact."""

from collections.abc import Iterator

import torch
from torch import Tensor


class BatchSampler:
    """Which images make up step n: an endless stream of seeded shuffles, cut into batches. Stateless."""

    def __init__(self, images: int, batch_size: int, *, seed: int) -> None:
        self.images, self.seed = images, seed
        self.batch_size = min(batch_size, images)

    def at(self, step: int) -> Tensor:
        """(B,) indices for `step`."""
        first = step * self.batch_size
        return torch.cat(list(self._pieces(first, first + self.batch_size)))

    def _pieces(self, start: int, stop: int) -> Iterator[Tensor]:
        while start < stop:
            epoch, offset = divmod(start, self.images)
            order = torch.randperm(self.images, generator=generator_for(self.seed, epoch))
            piece = order[offset : offset + stop - start]
            yield piece
            start += len(piece)


def generator_for(seed: int, number: int) -> torch.Generator:
    """A generator of its own for every (seed, number): resuming needs no random state."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
