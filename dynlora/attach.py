"""Find every weight matrix of both towers' blocks, put a LoRA beside each, and take them off again.

Covered: open_clip's native transformers (fused in_proj, LayerNorm blocks), and timm's vision towers whose
blocks have the attention of its ViT or of PVTv2. What stands before and between the blocks, such as
convolutions, stays as it is. Refused by name: other timm towers, ResNets, Hugging Face text towers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from dynlora.errors import ModelError
from dynlora.lora import LoRA, LoRAAttention, LoRAFusedLinear, LoRALinear

# What the linear layers of timm's attentions make. Other classes may read their weights past our layers.
TIMM_ATTENTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "timm.models.pvt_v2.Attention": {"q": ("q",), "kv": ("k", "v"), "proj": ("out",)},
    "timm.layers.attention.Attention": {"qkv": ("q", "k", "v"), "proj": ("out",)},
}
TIMM_MLP: dict[str, tuple[str, ...]] = {"fc1": ("mlp_in",), "fc2": ("mlp_out",)}
NATIVE_MLP: dict[str, tuple[str, ...]] = {"c_fc": ("mlp_in",), "c_proj": ("mlp_out",)}


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


@dataclass(frozen=True)
class _Block:
    """One transformer block: where it is, and what it is of."""

    path: str
    module: nn.Module
    tower: str
    index: int


@contextmanager
def attached(
    model: nn.Module, rank: int, *, only: Callable[[Site], bool] = lambda _: True
) -> Iterator[list[Site]]:
    """Wrap all six matrices of every block of both towers; restore the model on leaving.

    Inside, the model's own parameters are frozen and only the yielded sites train.

    Args:
        only: which sites to yield; the others have an update of zero that nobody can change.

    Raises:
        ModelError: a tower has blocks of a kind that is not covered, or `only` leaves nothing.
    """
    blocks = _blocks(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    sites: list[Site] = []
    undo: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for block in blocks:
            sites += _wrap(block, rank, undo)
        yield _chosen(sites, only)
    finally:
        for parent, name, original in undo:
            setattr(parent, name, original)
        for parameter in trainable:
            parameter.requires_grad_(True)


def _chosen(sites: list[Site], only: Callable[[Site], bool]) -> list[Site]:
    chosen = [site for site in sites if only(site)]
    if not chosen:
        raise ModelError("no matrix of the model was chosen to be adapted; expected at least one")
    for site in sites:
        if site not in chosen:
            site.lora.requires_grad_(False)
            for parameter in site.lora.parameters():
                parameter.zero_()
    return chosen


def check_supported(model: nn.Module) -> None:
    """Raise ModelError, naming the part, unless every block of both towers can be adapted."""
    _blocks(model)


def _blocks(model: nn.Module) -> list[_Block]:
    is_timm = hasattr(getattr(model, "visual", None), "trunk")
    vision = _timm_blocks(model) if is_timm else _native_blocks(model, "visual.transformer", "vision")
    return vision + _native_blocks(model, "transformer", "text")


def _native_blocks(model: nn.Module, path: str, tower: str) -> list[_Block]:
    try:
        blocks = model.get_submodule(path).resblocks
    except AttributeError:
        blocks = None
    if not isinstance(blocks, nn.ModuleList):
        raise ModelError(
            f"{type(model).__name__} has no native open_clip transformer at {path!r}: ResNet and "
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
    return [_Block(f"{path}.resblocks.{i}", block, tower, i) for i, block in enumerate(blocks)]


def _timm_blocks(model: nn.Module) -> list[_Block]:
    """Everything under visual.trunk that has an attention and an MLP, in the order it is run."""
    trunk = model.get_submodule("visual.trunk")
    found = [(p, m) for p, m in trunk.named_modules() if hasattr(m, "attn") and hasattr(m, "mlp")]
    if not found:
        raise ModelError(
            f"the timm tower {type(trunk).__name__} has no transformer blocks to adapt; "
            "expected one such as vit_base_patch16_224 or pvt_v2_b0"
        )
    for path, block in found:
        attention, mlp = block.attn, block.mlp
        layers = TIMM_ATTENTIONS.get(_class_path(attention))
        if layers is None or set(layers) != _linears(attention) or set(TIMM_MLP) != _linears(mlp):
            raise ModelError(
                f"block visual.trunk.{path} of the timm tower {type(trunk).__name__} has attention "
                f"{_class_path(attention)} and MLP {type(mlp).__name__}, which cannot be adapted yet; "
                "expected the blocks of timm's ViT or PVTv2"
            )
    return [_Block(f"visual.trunk.{path}", block, "vision", i) for i, (path, block) in enumerate(found)]


def _class_path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _linears(module: nn.Module) -> set[str]:
    return {name for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def _wrap(block: _Block, rank: int, undo: list[tuple[nn.Module, str, nn.Module]]) -> list[Site]:
    attention: nn.Module = block.module.attn  # type: ignore[assignment]
    if not isinstance(attention, nn.MultiheadAttention):
        layers = TIMM_ATTENTIONS[_class_path(attention)]
        return _wrap_linears(block, "attn", layers, rank, undo) + _wrap_linears(
            block, "mlp", TIMM_MLP, rank, undo
        )
    wrapped = LoRAAttention(attention, rank)
    undo.append((block.module, "attn", attention))
    block.module.attn = wrapped
    loras = {"q": wrapped.q, "k": wrapped.k, "v": wrapped.v}
    sites = _sites(block, "attn.in_proj_weight", loras) + _sites(
        block, "attn.out_proj.weight", {"out": wrapped.out.lora}
    )
    return sites + _wrap_linears(block, "mlp", NATIVE_MLP, rank, undo)


def _wrap_linears(
    block: _Block,
    part: str,
    layers: dict[str, tuple[str, ...]],
    rank: int,
    undo: list[tuple[nn.Module, str, nn.Module]],
) -> list[Site]:
    """Wrap the named linear layers of `block.<part>`."""
    parent = block.module.get_submodule(part)
    sites = []
    for name, kinds in layers.items():
        base = parent.get_submodule(name)
        assert isinstance(base, nn.Linear), (block.path, part, name)
        undo.append((parent, name, base))
        if len(kinds) == 1:
            single = LoRALinear(base, rank)
            setattr(parent, name, single)
            loras = {kinds[0]: single.lora}
        else:
            fused = LoRAFusedLinear(base, rank, len(kinds))
            setattr(parent, name, fused)
            loras = dict(zip(kinds, fused.loras, strict=True))  # type: ignore[arg-type]
        sites += _sites(block, f"{part}.{name}.weight", loras)
    return sites


def _sites(block: _Block, key: str, loras: dict[str, LoRA]) -> list[Site]:
    """One site per LoRA; together they cover the rows of the matrix in order."""
    sites, row = [], 0
    for kind, lora in loras.items():
        stop = row + lora.lora_B.shape[0]
        sites.append(Site(f"{block.path}.{key}", row, stop, block.tower, block.index, kind, lora))
        row = stop
    return sites


def reset(sites: list[Site], *, seed: int, random_importance: bool) -> None:
    """Initialise every site from one seed, in order: ΔW = 0 everywhere."""
    generator = torch.Generator().manual_seed(seed)
    for site in sites:
        site.lora.reset(generator, random_importance=random_importance)
