"""Which ranks live: the soft threshold, its schedule, and pruning. Pure functions of tensors.

Knows nothing of models or optimisers. Equations are those of CoDyRA, arXiv 2412.01004, section 3.
"""

from typing import Literal

import torch
from torch import Tensor

Operator = Literal["paper", "reference"]


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


def kappa_at(step: int, *, steps: int, dense_fraction: float, kappa_max: float, levels: int = 50) -> float:
    """The threshold applied after `step` (counted from 0) of `steps`.

    0 through the dense phase, then `levels` equal stairs from 0 to `kappa_max` over the rest.
    """
    dense_steps = int(steps * dense_fraction)
    sparse_steps = steps - dense_steps
    if step < dense_steps or sparse_steps <= 0 or levels < 2:
        return 0.0
    stair = min((step - dense_steps) * levels // sparse_steps, levels - 1)
    return kappa_max * stair / (levels - 1)


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
