"""Products with frozen matrices laid out once for oneDNN, where torch was built with it.

oneDNN rearranges a matrix before every product; one that never changes can be given to it rearranged. In
single products of a ViT's shapes that is 15 to 40 % faster than torch's usual ones. Torch has the operators
for its own compiler and promises nothing about them: a trial on a small matrix says whether they can be
used, and where they cannot, nothing is lost but time.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TOLERANCE = 1e-5  # relative, of a float32 product of a few numbers


class PackedMatrix:
    """A matrix (out, in), kept in oneDNN's order only: as much memory as it took before."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = _operators()._reorder_linear_weight(weight.contiguous(), None)  # noqa: SLF001

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(N, in) → (N, out): x Wᵀ + b, in the dtype of the matrix, which is that of x and b."""
        y: Tensor = _operators()._linear_pointwise(x, self._weight, bias, "none", [], "")  # noqa: SLF001
        return y


@functools.cache
def can_pack(device: str, dtype: torch.dtype) -> bool:
    """Whether the operators are there and compute what they should, on this machine."""
    if device != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((3, 8), (16, 8), (16,))
    )
    try:
        found = PackedMatrix(weight).multiply(x, bias)
    except (AttributeError, RuntimeError, TypeError):  # absent, not for this dtype, or called otherwise
        return False
    expected = F.linear(x.float(), weight.float(), bias.float())
    tolerance = max(_TOLERANCE, torch.finfo(dtype).eps)
    return bool((found.float() - expected).abs().max() <= tolerance * expected.abs().max())


def _operators() -> Any:
    return torch.ops.mkldnn
