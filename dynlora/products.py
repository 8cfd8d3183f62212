"""The product of vectors with a frozen matrix and its low-rank updates, and the gradients, by hand.

    y = x Wᵀ + b + Δ        Δ[:, rows of part p] = ((x A_pᵀ) ⊙ w_p) B_pᵀ

Two ways to the same result, both with less work than plain autograd takes. *Beside* multiplies x by W and by
all A_p joined, once each, and adds the updates in place. *Merged* makes W + Σ_p B_p diag(w_p) A_p anew and
multiplies once: more arithmetic, but in large products instead of thin ones, and with no other pass over y.
It pays where a matrix is narrow and the vectors are many.

Shapes: N vectors, P parts, r rank; W (out, in), A_p (r, in), w_p (r,), B_p (out / P, r).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dynlora.packed import PackedMatrix, can_pack

# How much slower thin products run than large ones (docs/log.md). Where it is wrong, only time is lost.
_THINNESS = 3.0


class Frozen:
    """A weight matrix (out, in) that is never written to, with its bias, multiplied in any dtype.

    Remembers itself cast and packed, for products with it and with its transpose, from the first one on.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self._cast: dict[tuple[str, torch.dtype], Tensor] = {}
        self._packed: dict[tuple[str, torch.dtype], PackedMatrix] = {}

    def multiply(self, x: Tensor) -> Tensor:
        """(N, in) → (N, out): x Wᵀ + b, in the dtype of x."""
        bias = self.bias_in(x.dtype)
        if can_pack(x.device.type, x.dtype):
            return self._pack("W", self.weight, x.dtype).multiply(x, bias)
        return F.linear(x, self._in("W", self.weight, x.dtype), bias)

    def multiply_transposed(self, y: Tensor) -> Tensor:
        """(N, out) → (N, in): y W, in the dtype of y."""
        if can_pack(y.device.type, y.dtype):
            return self._pack("transposed", self.weight.T, y.dtype).multiply(y, None)
        return y @ self._in("W", self.weight, y.dtype)

    def bias_in(self, dtype: torch.dtype) -> Tensor | None:
        """The bias, (out,), in `dtype`."""
        return None if self.bias is None else self._in("b", self.bias, dtype)

    def _in(self, what: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype == tensor.dtype:
            return tensor
        if (what, dtype) not in self._cast:
            self._cast[what, dtype] = tensor.to(dtype)
        return self._cast[what, dtype]

    def _pack(self, what: str, matrix: Tensor, dtype: torch.dtype) -> PackedMatrix:
        if (what, dtype) not in self._packed:
            self._packed[what, dtype] = PackedMatrix(matrix.to(dtype))
        return self._packed[what, dtype]


def adapted_product(x: Tensor, frozen: Frozen, factors: Sequence[Tensor]) -> Tensor:
    """(…, in) → (…, out). Gradients reach x and all factors, in the dtype of each.

    Args:
        factors: A_1 … A_P, w_1 … w_P, B_1 … B_P. Under autocast they and x are multiplied in its dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    vectors, parts, rank = x.numel() // x.shape[-1], len(factors) // 3, len(factors[0])
    way = Merged if merging_pays(vectors, frozen.weight, parts=parts, rank=rank) else Beside
    y: Tensor = way.apply(x, frozen, *factors)
    return y


def merging_pays(vectors: int, weight: Tensor, *, parts: int, rank: int) -> bool:
    """Whether the extra products of Merged are expected to take less time than those of Beside."""
    rows, columns = weight.shape
    merged = (vectors + 3 * rank) * rows * columns
    beside = 3 * vectors * rank * (rows + parts * columns)
    return merged < _THINNESS * beside


class Beside(Function):
    """x Wᵀ + b, and the updates added to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: Frozen, *factors: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        a, w, b = _joined(factors, x.dtype)
        vectors = x.reshape(-1, x.shape[-1])
        inner = vectors @ a.T  # (N, P r)
        flat, gated = frozen.multiply(vectors), inner * w
        for rows, ranks, part in _parts(b):
            flat[:, rows].addmm_(gated[:, ranks], part.T)
        ctx.save_for_backward(vectors, inner, *factors)
        ctx.frozen, ctx.shape = frozen, x.shape
        # Not as a view: some blocks go on to write into it.
        y: Tensor = torch.ops.aten._unsafe_view(flat, [*x.shape[:-1], flat.shape[-1]])  # noqa: SLF001
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of y (…, out); returns those of x and of every factor."""
        vectors, inner, *factors = ctx.saved_tensors
        a, w, b = _joined(factors, vectors.dtype)
        of_y = gradient.reshape(len(vectors), -1)
        of_gated = torch.empty_like(inner)
        gated = inner * w
        of_b = []
        for rows, ranks, part in _parts(b):
            torch.mm(of_y[:, rows], part, out=of_gated[:, ranks])
            of_b.append(of_y[:, rows].T @ gated[:, ranks])
        of_w = (of_gated * inner).sum(0)
        of_inner = of_gated * w
        of_a = of_inner.T @ vectors
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = ctx.frozen.multiply_transposed(of_y).addmm_(of_inner, a).view(ctx.shape)
        return of_x, None, *_as_factors(of_a, of_w, of_b, factors)


class Merged(Function):
    """x (W + ΔW)ᵀ + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: Frozen, *factors: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        a, w, b = _joined(factors, frozen.weight.dtype)
        weight = frozen.weight.clone()
        for rows, ranks, part in _parts(b):
            weight[rows].addmm_(part * w[ranks], a[ranks])
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight, *factors)
        return F.linear(x, weight, frozen.bias_in(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of y (…, out); returns those of x and of every factor."""
        x, weight, *factors = ctx.saved_tensors
        a, w, b = _joined(factors, factors[0].dtype)
        of_y = gradient.reshape(-1, gradient.shape[-1])
        of_weight = (of_y.T @ x.reshape(-1, x.shape[-1])).to(a.dtype)
        of_a, of_w, of_b = torch.empty_like(a), torch.empty_like(w), []
        for rows, ranks, part in _parts(b):
            of_gated_b = of_weight[rows] @ a[ranks].T  # (out / P, r)
            of_w[ranks] = (of_gated_b * part).sum(0)
            of_b.append(of_gated_b * w[ranks])
            torch.mm((part * w[ranks]).T, of_weight[rows], out=of_a[ranks])
        of_x = (of_y @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return of_x, None, *_as_factors(of_a, of_w, of_b, factors)


Factors = tuple[Tensor, Tensor, list[Tensor]]  # A (P r, in), w (P r,), and B (out / P, r) of each part


def _joined(factors: Sequence[Tensor], dtype: torch.dtype) -> Factors:
    """A_1 … A_P, w_1 … w_P, B_1 … B_P as they are multiplied."""
    parts = len(factors) // 3
    a, w, b = factors[:parts], factors[parts : 2 * parts], factors[2 * parts :]
    if parts == 1:
        return a[0].to(dtype), w[0].to(dtype), [b[0].to(dtype)]
    return torch.cat([*a]).to(dtype), torch.cat([*w]).to(dtype), [part.to(dtype) for part in b]


def _parts(b: Sequence[Tensor]) -> Iterator[tuple[slice, slice, Tensor]]:
    """Each part's rows of W, its ranks among all, and its B."""
    rows, rank = b[0].shape
    for number, part in enumerate(b):
        yield slice(number * rows, (number + 1) * rows), slice(number * rank, (number + 1) * rank), part


def _as_factors(of_a: Tensor, of_w: Tensor, of_b: list[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """The gradients in the order and dtype of the factors."""
    rank, dtype = factors[0].shape[0], factors[0].dtype
    return [gradient.to(dtype) for gradient in (*torch.split(of_a, rank), *torch.split(of_w, rank), *of_b)]
