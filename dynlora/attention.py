"""Scaled dot-product attention, and its gradients, as batched products.

torch's own on CPUs is made for long sequences: for the 10 to 50 tokens of a prompt or a ViT-B/32 its backward
pass takes most of the time, in bfloat16 many times that of plain products (docs/log.md has the figures).
Short ones are multiplied here; long ones in float32, whose scores would not fit into a cache, are torch's.

Shapes: N sequences, H heads, Q queries and K keys of each, d width of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_LONG = 128  # keys, from which on torch's is as fast in float32, and keeps no scores for the backward pass


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + mask) v, (N, H, Q, d), from (N, H, Q, d) and twice (N, H, K, d).

    Args:
        mask: float, what broadcasts to (N, H, Q, K); −inf for what is not to be seen, never a whole row.
    """
    if q.device.type != "cpu" or (k.shape[-2] > _LONG and q.dtype == torch.float32):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.to(q.dtype))
    mixed: Tensor = _Attention.apply(q, k, v, mask)
    return mixed


def split_heads(x: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
    """(N, L, P D) → P times (N, H, L, d), moved once for all of them."""
    split: tuple[Tensor, ...] = _SplitHeads.apply(x, heads, parts)
    return split


def join_heads(x: Tensor) -> Tensor:
    """(N, H, L, d) → (N, L, D)."""
    return x.transpose(1, 2).flatten(2)


class _SplitHeads(Function):
    """Each number moved once forwards and once backwards; autograd would move it twice on its way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
        """(N, L, P D) → P times (N, H, L, d)."""
        ctx.shape = (*x.shape[:2], parts, heads, x.shape[-1] // parts // heads)
        return tuple(x.view(ctx.shape).permute(2, 0, 3, 1, 4).contiguous().unbind(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Of P times (N, H, L, d); returns (N, L, P D)."""
        whole = gradients[0].new_empty(ctx.shape)
        for part, gradient in enumerate(gradients):
            whole[:, :, part] = gradient.transpose(1, 2)
        return whole.flatten(2), None, None


class _Attention(Function):
    """Keeps the shares (N, H, Q, K): half of them would have to be multiplied again for the gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(N, H, Q, d)."""
        scale = q.shape[-1] ** -0.5
        scores = torch.matmul(q, k.mT).mul_(scale)
        shares = torch.softmax(scores if mask is None else scores.add_(mask), dim=-1)
        ctx.save_for_backward(q, k, v, shares)
        return torch.matmul(shares, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of the mixture (N, H, Q, d); returns those of q, k and v."""
        q, k, v, shares = ctx.saved_tensors
        of_mixed = gradient.contiguous()
        of_v = torch.matmul(shares.mT, of_mixed)
        of_shares = torch.matmul(of_mixed, v.mT)
        # d softmax: shares ⊙ (g − Σ g ⊙ shares), over the keys
        of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)  # noqa: SLF001
        of_scores.mul_(q.shape[-1] ** -0.5)
        return torch.matmul(of_scores, k), torch.matmul(of_scores.mT, q), of_v, None
