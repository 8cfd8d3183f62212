"""The towers of an adapted model, without the work whose result nobody looks at.

Of a tower that pools one token, the last block's query, output and MLP matter for that token alone; and of
prompts, no token is computed twice (dynlora/shared_prefix.py). Both are exact, forward and backward. They
need open_clip's native blocks with the adapters on; other towers, and plain ones, compute as they always do.

Shapes: N images or prompts, L tokens of an image, D width.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dynlora import prompts
from dynlora.attention import attend, join_heads, split_heads
from dynlora.blocks import class_path, text_tower
from dynlora.lora import LoRAAttention
from dynlora.prompts import Prompts
from dynlora.shared_prefix import attend_causally, attend_from_last, lay_out

# Followed step by step here, so no class derived from them will do.
_VISION = "open_clip.transformer.VisionTransformer"
_BLOCK = "open_clip.transformer.ResidualAttentionBlock"


def embed_images(model: nn.Module, pixels: Tensor) -> Tensor:
    """(N, 3, H, W) → (N, dim), not normalised, differentiable."""
    visual: Any = model.visual
    if not _pools_one_token(visual) or not _has_adapters(visual.transformer):
        whole: Tensor = visual(pixels)
        return whole
    x = visual._embeds(pixels)  # noqa: SLF001 - what `forward` begins with
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = block(x)
    pooled: Tensor = visual.ln_post(_finish(last, x))
    return pooled if visual.proj is None else pooled @ visual.proj


def embed_texts(model: nn.Module, of: Prompts) -> Tensor:
    """N prompts → (N, dim) float32, L2-normalised, differentiable."""
    text: Any = text_tower(model)
    if of.eot is None or not _has_adapters(text.transformer):
        return prompts.encode_text(model, of)
    layout = lay_out(of.tokens, of.eot)
    x = text.token_embedding(layout.tokens) + text.positional_embedding[layout.positions]
    *blocks, last = text.transformer.resblocks
    for block in blocks:
        attention = block.attn
        mixed = attend_causally(attention.fused(block.ln_1(x)), layout, attention.heads)
        x = _after_attention(block, x, mixed)
    seen = last.ln_1(x)
    query, kv = last.attn.queries(seen[layout.last]), last.attn.keys_and_values(seen)
    mixed = attend_from_last(query, kv, layout, last.attn.heads)
    pooled = text.ln_final(_after_attention(last, x[layout.last], mixed))
    return F.normalize(prompts.project(text, pooled).float(), dim=-1)


def _finish(block: Any, x: Tensor) -> Tensor:
    """The first token of each of N sequences (N, L, D) after the last block, (N, D)."""
    seen = block.ln_1(x)
    k, v = split_heads(block.attn.keys_and_values(seen), block.attn.heads, 2)
    (query,) = split_heads(block.attn.queries(seen[:, :1]), block.attn.heads, 1)
    return _after_attention(block, x[:, 0], join_heads(attend(query, k, v))[:, 0])


def _after_attention(block: Any, x: Tensor, mixed: Tensor) -> Tensor:
    """What open_clip's block does with what its heads saw, for any rows (…, D)."""
    x = x + block.ls_1(block.attn.out(mixed))
    whole: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return whole


def _pools_one_token(visual: nn.Module) -> bool:
    return (
        class_path(visual) == _VISION
        and visual.attn_pool is None
        and visual.pool_type == "tok"
        and not visual.output_tokens
    )


def _has_adapters(transformer: Any) -> bool:
    """Whether every block is of the kind that is followed here step by step."""
    return all(
        class_path(block) == _BLOCK and isinstance(block.attn, LoRAAttention)
        for block in transformer.resblocks
    )
