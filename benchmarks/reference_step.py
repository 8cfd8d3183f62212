"""The published recipe done straightforwardly: separate q, k, v and out products, plain autograd, all tokens.

The yardstick of `benchmarks.step`, after the pinned `tools/reference_step.py` that lies beside the issues.
That one runs when it is imported, so the same stands here as functions. It knows nothing of dynlora.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Weights:
    """The low-rank update of one matrix, in the order that both sides go through them."""

    lora_a: Tensor  # (r, in)
    lora_b: Tensor  # (out, r)
    importance: Tensor  # (r,)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All three."""
        return self.lora_a, self.lora_b, self.importance


class PlainLoRA(nn.Module):
    """F.linear with a low-rank update, as three products."""

    def __init__(self, weight: Tensor, bias: Tensor | None, update: Weights) -> None:
        super().__init__()
        self.weight, self.bias, self.update = weight, bias, update

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        a, b, w = self.update.tensors
        return F.linear(x, self.weight, self.bias) + ((x @ a.T) * w) @ b.T


class PlainBlock(nn.Module):
    """One of open_clip's residual blocks with a PlainLoRA for each of its six matrices."""

    def __init__(self, block: Any, updates: Sequence[Weights]) -> None:
        super().__init__()
        attention, width = block.attn, block.attn.embed_dim
        weight, bias = attention.in_proj_weight.detach(), attention.in_proj_bias.detach()
        rows = [slice(i * width, (i + 1) * width) for i in range(3)]
        self.heads = attention.num_heads
        self.q, self.k, self.v = (
            PlainLoRA(weight[r].clone(), bias[r], u) for r, u in zip(rows, updates[:3], strict=True)
        )
        linears = (attention.out_proj, block.mlp.c_fc, block.mlp.c_proj)
        self.out, self.mlp_in, self.mlp_out = (
            PlainLoRA(linear.weight.detach(), linear.bias.detach(), update)
            for linear, update in zip(linears, updates[3:], strict=True)
        )
        self.ln_1, self.ln_2, self.act = block.ln_1, block.ln_2, block.mlp.gelu

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, D) → (N, L, D)."""
        x = x + self._attend(self.ln_1(x), mask)
        return x + self.mlp_out(self.act(self.mlp_in(self.ln_2(x))))

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        n, length, _ = x.shape
        q, k, v = (f(x).view(n, length, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out(mixed.transpose(1, 2).reshape(n, length, -1))  # type: ignore[no-any-return]


class PlainParts(nn.Module):
    """A linear layer that makes several things at once, as a PlainLoRA for each."""

    def __init__(self, base: nn.Linear, updates: Sequence[Weights]) -> None:
        super().__init__()
        weights = base.weight.detach().chunk(len(updates))
        biases = [None] * len(updates) if base.bias is None else base.bias.detach().chunk(len(updates))
        parts = (PlainLoRA(w.clone(), b, u) for w, b, u in zip(weights, biases, updates, strict=True))
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


class ReferenceStep:
    """Gradients of one step of the published loss on an open_clip model; a timm tower keeps its own blocks.

    `updates` are by state-dict key, those of q, k and v under that of the fused matrix.
    """

    def __init__(self, model: Any, updates: dict[str, list[Weights]]) -> None:
        self.model = model
        self.visual = _timm_tower(model, updates) if hasattr(model.visual, "trunk") else None
        if self.visual is None:
            self.vision = _blocks(model.visual.transformer, "visual.transformer", updates)
        self.text = _blocks(model.transformer, "transformer", updates)
        self.parameters = [tensor for of in updates.values() for update in of for tensor in update.tensors]

    def run(
        self, pixels: Tensor, labels: Tensor, tokens: Tensor, *, bfloat16: bool = False
    ) -> tuple[Tensor, ...]:
        """Gradients of all parameters. `tokens` (C, L), cut or not."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            images, texts = self._images(pixels), self._texts(tokens)
            logits = self.model.logit_scale.exp() * images @ texts.T
        logits = logits.float()
        members = (torch.arange(len(tokens))[:, None] == labels[None]).float()
        loss = F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, members)
        return torch.autograd.grad(loss, self.parameters)

    def _images(self, pixels: Tensor) -> Tensor:
        if self.visual is not None:
            return F.normalize(self.visual(pixels), dim=-1)
        visual = self.model.visual
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
        x = visual.ln_pre(x)
        for block in self.vision:
            x = block(x)
        return F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)

    def _texts(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.model.token_embedding(tokens) + self.model.positional_embedding[:length]
        mask = self.model.attn_mask[:length, :length]
        for block in self.text:
            x = block(x, mask)
        x = self.model.ln_final(x)[torch.arange(len(tokens)), tokens.argmax(-1)]
        return F.normalize(x @ self.model.text_projection, dim=-1)


def _blocks(tower: Any, path: str, updates: dict[str, list[Weights]]) -> list[PlainBlock]:
    names = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return [
        PlainBlock(block, [u for name in names for u in updates[f"{path}.resblocks.{index}.{name}"]])
        for index, block in enumerate(tower.resblocks)
    ]


def _timm_tower(model: Any, updates: dict[str, list[Weights]]) -> nn.Module:
    """A copy of the vision tower whose linear layers are PlainParts."""
    visual: nn.Module = copy.deepcopy(model.visual)
    for key, of in updates.items():
        if key.startswith("visual."):
            path, _, name = key.removeprefix("visual.").removesuffix(".weight").rpartition(".")
            parent = visual.get_submodule(path)
            setattr(parent, name, PlainParts(parent.get_submodule(name), of))  # type: ignore[arg-type]
    return visual


def useful_flops(forward: Callable[[], object]) -> int:
    """Twice the operations of a forward pass: what a step with a frozen base cannot do without."""
    from torch.utils.flop_counter import FlopCounterMode

    # The counter knows neither oneDNN's product nor the one operator that nn.MultiheadAttention is without
    # gradients, and would leave out a third of a ViT.
    packed = {torch.ops.mkldnn._linear_pointwise: _packed_flops}  # noqa: SLF001
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=packed) as counter:
            forward()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return 2 * counter.get_total_flops()


def _packed_flops(
    x: tuple[int, ...], _: object, *__: object, out_shape: tuple[int, ...], **___: object
) -> int:
    return 2 * math.prod(x) * out_shape[-1]
