"""Rank-selective LoRA layers: y = x Wᵀ + b + ((x Aᵀ) ⊙ w) Bᵀ  (CoDyRA, arXiv 2412.01004, eq. 3).

The wrapped weights are frozen and never written to: folding is somebody else's job, done once, in one place.
Shapes: B batch, L tokens, D width, r rank.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynlora.attention import attend, join_heads, split_heads
from dynlora.products import Frozen, adapted_product


class LoRA(nn.Module):
    """The low-rank update of one weight matrix (out, in): ΔW = lora_B diag(importance) lora_A."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))  # (r, in)
        self.lora_B = nn.Parameter(torch.empty(out_features, rank))  # (out, r)
        self.importance = nn.Parameter(torch.empty(rank))  # (r,)

    def reset(self, generator: torch.Generator, *, random_importance: bool) -> None:
        """Start at ΔW = 0: A Kaiming-uniform (a = √5), B zero; importance N(0, 1) as published, or all 1."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])  # what kaiming_uniform_(a=√5) comes to
        with torch.no_grad():
            self.lora_A.uniform_(-bound, bound, generator=generator)
            self.lora_B.zero_()
            if random_importance:
                self.importance.normal_(generator=generator)
            else:
                self.importance.fill_(1.0)

    def reset_row(self) -> None:
        """Start a single row's update at 0. Its one direction is what is learnt, so B has nothing to add."""
        assert self.lora_B.shape == (1, 1), self.lora_B.shape
        with torch.no_grad():
            self.lora_A.zero_()
            self.lora_B.fill_(1.0)
            self.importance.fill_(1.0)
        self.lora_B.requires_grad_(False)

    def delta(self) -> Tensor:
        """ΔW, (out, in)."""
        return (self.lora_B * self.importance) @ self.lora_A

    def squared_norm(self) -> Tensor:
        """‖ΔW‖², differentiable, by way of two (r, r) products."""
        left = self.lora_B * self.importance
        return ((left.T @ left) * (self.lora_A @ self.lora_A.T)).sum()


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank update beside it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora = LoRA(base.in_features, base.out_features, rank)
        self._frozen = Frozen(base.weight, base.bias)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, which open_clip looks at for its dtype."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        return _product(x, self._frozen, [self.lora])


class LoRAFusedLinear(nn.Module):
    """A frozen linear layer that makes several things at once, such as timm's qkv; an update for each.

    Part i of P is rows [i·out/P, (i+1)·out/P) of the fused weight, which is multiplied once.
    """

    def __init__(self, base: nn.Linear, rank: int, parts: int) -> None:
        super().__init__()
        self.base = base
        assert base.out_features % parts == 0, (base.out_features, parts)
        loras = [LoRA(base.in_features, base.out_features // parts, rank) for _ in range(parts)]
        self.loras = nn.ModuleList(loras)
        self._frozen = Frozen(base.weight, base.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        return _product(x, self._frozen, self.loras)


class LoRAAttention(nn.Module):
    """Stands in for `nn.MultiheadAttention` in self-attention, with updates on q, k, v and out.

    q, k and v are rows [0, D), [D, 2D), [2D, 3D) of the fused in_proj_weight, which is multiplied once.
    """

    def __init__(self, base: nn.MultiheadAttention, rank: int) -> None:
        super().__init__()
        self.base = base
        width = base.embed_dim
        self.q, self.k, self.v = (LoRA(width, width, rank) for _ in range(3))
        self.out = LoRALinear(base.out_proj, rank)
        weight, bias = base.in_proj_weight, base.in_proj_bias
        self._frozen = Frozen(weight, bias)
        self._frozen_q = Frozen(weight[:width], None if bias is None else bias[:width])
        self._frozen_kv = Frozen(weight[width:], None if bias is None else bias[width:])

    @property
    def heads(self) -> int:
        """How many."""
        return int(self.base.num_heads)

    def fused(self, x: Tensor) -> Tensor:
        """(…, D) → q, k and v, (…, 3D)."""
        return _product(x, self._frozen, [self.q, self.k, self.v])

    def queries(self, x: Tensor) -> Tensor:
        """(…, D) → q alone, (…, D)."""
        return _product(x, self._frozen_q, [self.q])

    def keys_and_values(self, x: Tensor) -> Tensor:
        """(…, D) → k and v, (…, 2D)."""
        return _product(x, self._frozen_kv, [self.k, self.v])

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        need_weights: bool,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """(B, L, D) three times the same → (B, L, D), None. `attn_mask` (L, L) is added to the scores."""
        assert query is key and key is value and not need_weights, "self-attention only"
        q, k, v = split_heads(self.fused(query), self.heads, 3)  # (B, heads, L, D / heads)
        out: Tensor = self.out(join_heads(attend(q, k, v, attn_mask)))
        return out, None


class LoRAEmbedding(nn.Module):
    """A frozen embedding with an update for some of its rows. A row is a matrix whose rank is 0 or 1."""

    def __init__(self, base: nn.Embedding, rows: Sequence[int]) -> None:
        super().__init__()
        self.base = base
        self.loras = nn.ModuleList(LoRA(base.embedding_dim, 1, 1) for _ in rows)
        place = torch.zeros(base.num_embeddings, dtype=torch.int64)  # 0: no update
        place[torch.tensor(rows)] = torch.arange(1, len(rows) + 1)
        self.register_buffer("_place", place, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The frozen rows."""
        return self.base.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Indices (…) → (…, D)."""
        loras: list[Any] = list(self.loras)  # (1, D), (1,) and (1, 1) each: all rows in one go
        rows = torch.cat([lora.lora_A for lora in loras])
        gates = torch.cat([lora.importance for lora in loras])
        signs = torch.cat([lora.lora_B for lora in loras])
        none = torch.zeros(1, self.base.embedding_dim)
        # Element by element: autocast would round a product of matrices to bfloat16.
        updates = torch.cat([none, signs * gates[:, None] * rows])
        own: Tensor = self.base(tokens)
        return own + F.embedding(self._place[tokens], updates)  # type: ignore[index]


def _product(x: Tensor, frozen: Frozen, loras: Iterable[nn.Module]) -> Tensor:
    """Multiply x by the frozen matrix with the updates of its parts beside it."""
    factors = zip(*((lora.lora_A, lora.importance, lora.lora_B) for lora in loras), strict=True)
    return adapted_product(x, frozen, list(itertools.chain(*factors)))
