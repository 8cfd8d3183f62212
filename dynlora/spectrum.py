"""Gates that the data sets: the singular values of what was learnt so far.

The published gates start at random, and which of them survive the thresholds is then mostly that draw. Here
all gates start alike. When the dense steps end, every update ΔW = B diag(w) A is written anew as its singular
value decomposition, with the singular values as gates: the soft threshold is then the proximal operator of
the nuclear norm, and a rank survives by how much of the update it carries. One threshold holds for all
matrices, so rank goes where the update is.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dynlora.lora import LoRA


def respan(loras: Sequence[LoRA], pruned_energy: float, kappa_total: float) -> None:
    """Rewrite the factors of every update in place; the updates stay what they are.

    Afterwards a gate of `kappa_total` stands for the singular value below which, over all matrices,
    `pruned_energy` of Σ‖ΔW‖² lies: what thresholds that add up to `kappa_total` take away.
    """
    with torch.no_grad():
        spectra = [_svd(lora) for lora in loras]
        cut = _cut(torch.cat([values for _, values, _ in spectra]), pruned_energy)
        unit = cut / kappa_total  # the singular value that a gate of 1 stands for
        for lora, (left, values, right) in zip(loras, spectra, strict=True):
            lora.lora_B.copy_(left * math.sqrt(unit))
            lora.importance.copy_(values / unit)
            lora.lora_A.copy_(right * math.sqrt(unit))


def _svd(lora: LoRA) -> tuple[Tensor, Tensor, Tensor]:
    """Of B diag(w) A by way of its thin factors: (out, r), (r,), (r, in)."""
    q_left, r_left = torch.linalg.qr(lora.lora_B * lora.importance)
    q_right, r_right = torch.linalg.qr(lora.lora_A.T)
    left, values, right = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    missing = len(lora.importance) - len(values)  # a rank above what the matrix can have carries nothing
    return (
        F.pad(q_left @ left, (0, missing)),
        F.pad(values, (0, missing)),
        F.pad(right @ q_right.T, (0, 0, 0, missing)),
    )


def _cut(values: Tensor, energy: float) -> float:
    """The largest value up to which the squares add up to at most `energy` of all.

    Where even the least has more, a value below it: nothing is cut. 1 if all are 0.
    """
    ordered = values.sort().values.double()
    total = float(ordered.square().sum())
    if total == 0:
        return 1.0
    below = int(torch.count_nonzero(ordered.square().cumsum(0) <= energy * total))
    cut = float(ordered[below - 1]) if below else math.sqrt(energy * total)
    return max(cut, 1e-6 * float(ordered[-1]))  # a gate is a value divided by it
