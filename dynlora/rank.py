"""Which ranks live: the soft threshold, its schedule, and pruning. Pure functions of tensors.

Knows nothing of models or optimisers. Equations are those of CoDyRA, arXiv 2412.01004, section 3.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

Operator = Literal["paper", "reference"]
Ramp = Literal["equal", "reference"]


def soft_threshold(importance: Tensor, kappa: float, *, operator: Operator = "paper") -> Tensor:
    """Shrink importance weights towards 0 by `kappa`; those within reach of 0 become exactly 0.

    `paper`: T(x) = 1(|x| > kappa) (x - sign(x) kappa), the proximal operator of kappa * |x|.
    `reference`: the authors' code zeroes once more below kappa *after* shrinking: a dead zone of 2 kappa.

    Args:
        importance: any shape.
        kappa: >= 0.

    Returns:
        A new tensor of the same shape.
    """
    assert kappa >= 0, kappa
    shrunk = torch.sign(importance) * torch.clamp(importance.abs() - kappa, min=0.0)
    if operator == "reference":
        shrunk = torch.where(shrunk.abs() < kappa, torch.zeros_like(shrunk), shrunk)
    return shrunk


@dataclass(frozen=True)
class Schedule:
    """When gates are thresholded, and by how much: dense steps, a ramp, and steps in which the rest settles.

    Attributes:
        steps: in all.
        dense_fraction, settle_fraction: shares of them without any threshold, at the start and at the end.
        kappa_max: the threshold at the end of the ramp, which rises to it in `levels` equal stairs from 0.
        stairs: `equal` as written here; `reference` as the authors' code counts them: each of
            floor(steps left / levels) steps, ending at multiples of that number, the first one already above
            0, and none after the very step at which the ramp starts.
    """

    steps: int
    dense_fraction: float
    kappa_max: float
    levels: int = 50
    settle_fraction: float = 0.0
    stairs: Ramp = "equal"

    @property
    def ramp(self) -> range:
        """The steps, counted from 0, after which gates are thresholded."""
        last = self.steps - int(self.steps * self.settle_fraction)
        return range(int(self.steps * self.dense_fraction), last)

    def kappa(self, step: int) -> float:
        """The threshold applied after `step`; 0 outside of the ramp."""
        if step not in self.ramp or self.levels < 2:
            return 0.0
        if self.stairs == "reference":
            stair = self._reference_stair(step)
        elif len(self.ramp) == 1:
            stair = self.levels - 1  # no way to rise: a ramp without any threshold would prune nothing
        else:
            stair = (step - self.ramp.start) * self.levels // len(self.ramp)
        return self.kappa_max * min(stair, self.levels - 1) / (self.levels - 1)

    def _reference_stair(self, step: int) -> int:
        dense = self.steps * self.dense_fraction
        width = int((self.steps - dense) // self.levels)
        if step <= dense or width == 0:
            return 0
        return step // width - (math.ceil(dense) - 1) // width

    def is_settling(self, step: int) -> bool:
        """After the ramp: what is left goes on learning, and what is dead stays dead."""
        return step >= self.ramp.stop

    def with_total(self, total: float) -> Self:
        """The same with `kappa_max` such that all thresholds add up to `total`."""
        unit = replace(self, kappa_max=1.0)
        whole = sum(unit.kappa(step) for step in self.ramp)
        return replace(self, kappa_max=total / whole if whole else 0.0)


def prune(lora_b: Tensor, lora_a: Tensor, importance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Drop every rank whose importance is exactly 0; the product B diag(w) A stays the same.

    Args:
        lora_b: (out, rank).
        lora_a: (rank, in).
        importance: (rank,).

    Returns:
        The same three with `rank` reduced to the kept rank, which may be 0.
    """
    kept = importance != 0
    return lora_b[:, kept].contiguous(), lora_a[kept].contiguous(), importance[kept].contiguous()
