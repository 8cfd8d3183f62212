"""Prompts laid out so that no token is computed twice, nor any that stands for nothing.

In a causal tower a token depends on those before it alone. So what all prompts begin with, such as `a photo
of a`, is the same for all of them in every block and is computed once; its gradient is the sum over prompts.
What follows is packed: one row per token, without the padding of shorter prompts. Only attention needs them
as sequences again. All of it is exact.

Shapes: N prompts, P tokens that all begin with, R tokens in all after those, S at most after them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dynlora.attention import attend, join_heads, split_heads


@dataclass(frozen=True)
class Layout:
    """Where each of the P + R rows comes from and goes to."""

    prefix: int  # P
    tokens: Tensor  # (P + R,)
    positions: Tensor  # (P + R,) in its prompt
    row_of: Tensor  # (N, S): which of the R rows; any where `place_of` names none
    place_of: Tensor  # (R,): which of the N·S places
    last: Tensor  # (N,): which of the P + R rows is pooled
    causal: Tensor  # (P, P), added to scores
    mask: Tensor  # (S, P + S), the same for what comes after the prefix
    last_mask: Tensor  # (N, 1, 1, P + S), the same for the pooled rows


def lay_out(tokens: Tensor, eot: Tensor) -> Layout:
    """Prompts (N, L) that are pooled at `eot` (N,), N >= 1; what comes after that is left out."""
    prompts, prefix = len(tokens), _shared(tokens, eot)
    counts = eot - prefix + 1  # of rows after the prefix, at least 1
    longest = int(counts.max())
    ends = counts.cumsum(0)
    steps = torch.arange(longest, device=tokens.device)
    is_row = steps < counts[:, None]  # (N, S)
    row_of = (ends - counts)[:, None] + steps
    position = (prefix + steps).expand(prompts, longest)
    first = torch.arange(prefix, device=tokens.device)
    hidden = torch.full((longest, longest), float("-inf"), device=tokens.device).triu(1)
    seen = torch.zeros(longest, prefix, device=tokens.device)
    last_mask = torch.zeros(prompts, prefix + longest, device=tokens.device)
    last_mask[:, prefix:].masked_fill_(~is_row, float("-inf"))
    return Layout(
        prefix,
        torch.cat([tokens[0, :prefix], tokens[:, prefix : prefix + longest][is_row]]),
        torch.cat([first, position[is_row]]),
        torch.where(is_row, row_of, 0),
        is_row.flatten().nonzero().squeeze(1),
        prefix + ends - 1,
        torch.full((prefix, prefix), float("-inf"), device=tokens.device).triu(1),
        torch.cat([seen, hidden], dim=1),
        last_mask[:, None, None],
    )


def _shared(tokens: Tensor, eot: Tensor) -> int:
    """How many tokens all prompts begin with, short of the first EOT."""
    least = int(eot.min())
    differ = (tokens[:, :least] != tokens[:1, :least]).any(0).nonzero()
    return int(differ[0]) if len(differ) else least


def attend_causally(fused: Tensor, layout: Layout, heads: int) -> Tensor:
    """q, k and v of every row (P + R, 3D) → what each row sees of itself and those before, (P + R, D)."""
    first, after = torch.split(fused, [layout.prefix, len(layout.place_of)])
    q, k, v = split_heads(first[None], heads, 3)  # (1, H, P, d)
    q_after, *after_kv = split_heads(_spread(after, layout), heads, 3)  # (N, H, S, d)
    mixed = attend(q_after, *_behind(k, v, *after_kv), layout.mask)
    packed: Tensor = _Pack.apply(join_heads(mixed), layout.place_of)
    return torch.cat([join_heads(attend(q, k, v, layout.causal))[0], packed])


def attend_from_last(q: Tensor, kv: Tensor, layout: Layout, heads: int) -> Tensor:
    """What they see, (N, D), from q of the pooled rows (N, D), k and v of every row (P + R, 2D)."""
    first, after = torch.split(kv, [layout.prefix, len(layout.place_of)])
    keys = _behind(*split_heads(first[None], heads, 2), *split_heads(_spread(after, layout), heads, 2))
    (query,) = split_heads(q[:, None], heads, 1)
    return join_heads(attend(query, *keys, layout.last_mask))[:, 0]


def _behind(k: Tensor, v: Tensor, k_after: Tensor, v_after: Tensor) -> tuple[Tensor, Tensor]:
    """The prefix's keys and values before those of each prompt, (N, H, P + S, d)."""
    prompts = len(k_after)
    pairs = ((k, k_after), (v, v_after))
    keys, values = (torch.cat([of.expand(prompts, -1, -1, -1), after], dim=2) for of, after in pairs)
    return keys, values


def _spread(rows: Tensor, layout: Layout) -> Tensor:
    """R rows as sequences, (N, S, ·); places without a row hold another's, which nobody looks at."""
    spread: Tensor = _Spread.apply(rows, layout.row_of, layout.place_of)
    return spread


class _Spread(Function):
    """x[row_of]; every row is wanted at one place, so the gradient is a copy, too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, row_of: Tensor, place_of: Tensor) -> Tensor:
        """(R, ·) → (N, S, ·)."""
        ctx.save_for_backward(place_of)
        return rows[row_of]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Of (N, S, ·), zero where no row belongs; returns (R, ·)."""
        (place_of,) = ctx.saved_tensors
        return gradient.flatten(0, 1)[place_of], None, None


class _Pack(Function):
    """The rows at `place_of`, and no others."""

    @staticmethod
    def forward(ctx: Any, sequences: Tensor, place_of: Tensor) -> Tensor:
        """(N, S, ·) → (R, ·)."""
        ctx.save_for_backward(place_of)
        ctx.shape = sequences.shape
        return sequences.flatten(0, 1)[place_of]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Of (R, ·); returns (N, S, ·)."""
        (place_of,) = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.shape)
        whole.flatten(0, 1)[place_of] = gradient
        return whole, None
