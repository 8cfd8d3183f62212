"""Find every weight matrix of both towers' blocks, put a LoRA beside each, and take them off again.

Covered: open_clip's native transformer towers (fused in_proj, LayerNorm blocks).
Not covered: timm and ResNet vision towers, Hugging Face text towers: refused by name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from dynlora.errors import ModelError
from dynlora.lora import LoRA, LoRAAttention, LoRALinear


@dataclass(frozen=True)
class Site:
    """One adapted matrix: rows [row_start, row_stop) of the state-dict entry `key`."""

    key: str
    row_start: int
    row_stop: int
    tower: str  # "vision" | "text"
    block: int
    kind: str  # "q" | "k" | "v" | "out" | "mlp_in" | "mlp_out"
    lora: LoRA

    @property
    def name(self) -> str:
        """For people and manifests, such as `vision.3.mlp_in`."""
        return f"{self.tower}.{self.block}.{self.kind}"


@contextmanager
def attached(model: nn.Module, rank: int) -> Iterator[list[Site]]:
    """Wrap all six matrices of every block of both towers; restore the model on leaving.

    Inside, the model's own parameters are frozen and only the yielded sites train.

    Raises:
        ModelError: a tower is not one of open_clip's native transformers.
    """
    towers = {"vision": _blocks(model, "visual.transformer"), "text": _blocks(model, "transformer")}
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    sites: list[Site] = []
    originals: list[tuple[nn.Module, nn.Module, nn.Module, nn.Module]] = []
    try:
        for tower, (prefix, blocks) in towers.items():
            for index, block in enumerate(blocks):
                originals.append((block, block.attn, block.mlp.c_fc, block.mlp.c_proj))  # type: ignore[arg-type, union-attr]
                sites += _wrap(block, f"{prefix}.resblocks.{index}", (tower, index), rank)
        yield sites
    finally:
        for block, attn, c_fc, c_proj in originals:
            block.attn, block.mlp.c_fc, block.mlp.c_proj = attn, c_fc, c_proj  # type: ignore[union-attr]
        for parameter in trainable:
            parameter.requires_grad_(True)


def check_supported(model: nn.Module) -> None:
    """Raise ModelError, naming the part, unless every block of both towers can be adapted."""
    for path in ("visual.transformer", "transformer"):
        _blocks(model, path)


def _blocks(model: nn.Module, path: str) -> tuple[str, nn.ModuleList]:
    try:
        blocks = model.get_submodule(path).resblocks
    except AttributeError:
        blocks = None
    if not isinstance(blocks, nn.ModuleList):
        raise ModelError(
            f"{type(model).__name__} has no native open_clip transformer at {path!r}: timm, ResNet and "
            "Hugging Face towers cannot be adapted yet; expected a ViT such as ViT-B-32 or ViT-B-16"
        )
    for index, block in enumerate(blocks):
        attention = getattr(block, "attn", None)
        fused = isinstance(attention, nn.MultiheadAttention) and attention.in_proj_weight is not None
        if not (fused and attention.batch_first):  # type: ignore[union-attr]
            raise ModelError(
                f"block {path}.resblocks.{index} has attention of type {type(attention).__name__}; "
                "expected nn.MultiheadAttention with one fused in_proj_weight, batch first"
            )
    return path, blocks


def _wrap(block: nn.Module, prefix: str, place: tuple[str, int], rank: int) -> list[Site]:
    attention = LoRAAttention(block.attn, rank)  # type: ignore[arg-type]
    mlp_in = LoRALinear(block.mlp.c_fc, rank)  # type: ignore[union-attr, arg-type]
    mlp_out = LoRALinear(block.mlp.c_proj, rank)  # type: ignore[union-attr, arg-type]
    block.attn, block.mlp.c_fc, block.mlp.c_proj = attention, mlp_in, mlp_out  # type: ignore[union-attr]
    tower, index = place
    width = attention.base.embed_dim
    fused = [
        Site(f"{prefix}.attn.in_proj_weight", i * width, (i + 1) * width, tower, index, kind, lora)
        for i, (kind, lora) in enumerate((("q", attention.q), ("k", attention.k), ("v", attention.v)))
    ]
    whole = [
        Site(f"{prefix}.{path}.weight", 0, layer.base.out_features, tower, index, kind, layer.lora)
        for path, kind, layer in (
            ("attn.out_proj", "out", attention.out),
            ("mlp.c_fc", "mlp_in", mlp_in),
            ("mlp.c_proj", "mlp_out", mlp_out),
        )
    ]
    return fused + whole


def reset(sites: list[Site], *, seed: int, random_importance: bool) -> None:
    """Initialise every site from one seed, in order: ΔW = 0 everywhere."""
    generator = torch.Generator().manual_seed(seed)
    for site in sites:
        site.lora.reset(generator, random_importance=random_importance)
