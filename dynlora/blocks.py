"""Where the weight matrices of a model's blocks are, and whether all of them can be adapted.

Covered: open_clip's native transformers (fused in_proj, LayerNorm blocks) in both towers, the text tower in
the model itself or in a module of its own, and timm's vision towers made of the parts listed below. What
stands before, between and after the blocks, such as convolutions and pooling heads, stays as it is.
"""

from dataclasses import dataclass, field

from torch import nn

from dynlora.errors import ModelError

Layers = dict[str, tuple[str, ...]]  # a linear layer's name, and what it makes, in the order of its rows

_FUSED: Layers = {"qkv": ("q", "k", "v"), "proj": ("out",)}
_APART: Layers = {"q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",), "proj": ("out",)}
_PLAIN: Layers = {"fc1": ("mlp_in",), "fc2": ("mlp_out",)}

# Read one by one: they call their layers. Other classes may read their weights past ours, and are refused.
TIMM_ATTENTIONS: dict[str, tuple[Layers, ...]] = {
    "timm.layers.attention.Attention": (_FUSED,),  # ViT, SigLIP, ViTamin, MobileCLIP-B
    "timm.layers.attention.AttentionRope": (_FUSED, _APART),  # PE-Core
    "timm.models.eva.EvaAttention": (_FUSED, _APART),  # EVA01, EVA02
    "timm.models.pvt_v2.Attention": ({"q": ("q",), "kv": ("k", "v"), "proj": ("out",)},),
    "timm.models.swin_transformer.WindowAttention": (_FUSED,),
    "timm.models.vision_transformer_relpos.RelPosAttention": (_FUSED,),
}
TIMM_MLPS: dict[str, Layers] = {
    "timm.layers.mlp.Mlp": _PLAIN,
    "timm.layers.mlp.GluMlp": _PLAIN,  # gate and value are one matrix
    "timm.layers.mlp.SwiGLU": {"fc1_g": ("mlp_gate",), "fc1_x": ("mlp_in",), "fc2": ("mlp_out",)},
    "timm.models.pvt_v2.MlpWithDepthwiseConv": _PLAIN,
    "timm.models.vitamin.GeGluMlp": {"w0": ("mlp_gate",), "w1": ("mlp_in",), "w2": ("mlp_out",)},
}
NATIVE_MLP: Layers = {"c_fc": ("mlp_in",), "c_proj": ("mlp_out",)}

# Its one mixing layer is a convolution for each channel alone; all its matrices are in the MLP.
_CONVNEXT = "timm.models.convnext.ConvNeXtBlock"
_MIXERS = ("attn", "token_mixer", "conv_dw")  # an MLP beside one of these makes a block
_POSITIONS = "rel_pos"  # a network that computes position biases, beside a block's matrices


@dataclass(frozen=True)
class Block:
    """One block: where it is, what it is of, and the linear layers of its parts.

    A native block has its attention's matrices fused into parameters, so only its MLP is in `layers`.
    """

    path: str
    module: nn.Module
    tower: str
    index: int
    layers: dict[str, Layers] = field(default_factory=dict)


def find_blocks(model: nn.Module) -> list[Block]:
    """Every block of both towers.

    Raises:
        ModelError: a tower has blocks of a kind that is not covered; names the part.
    """
    is_timm = hasattr(getattr(model, "visual", None), "trunk")
    vision = _timm_blocks(model) if is_timm else _native_blocks(model, "visual.transformer", "vision")
    text_path = "text.transformer" if hasattr(model, "text") else "transformer"
    return vision + _native_blocks(model, text_path, "text")


def _native_blocks(model: nn.Module, path: str, tower: str) -> list[Block]:
    try:
        blocks = model.get_submodule(path).resblocks
    except AttributeError:
        blocks = None
    if not isinstance(blocks, nn.ModuleList):
        raise ModelError(
            f"{type(model).__name__} has no native open_clip transformer at {path!r}: ResNet and "
            "Hugging Face towers cannot be adapted; expected a ViT such as ViT-B-32 or ViT-B-16"
        )
    for index, block in enumerate(blocks):
        attention = getattr(block, "attn", None)
        fused = isinstance(attention, nn.MultiheadAttention) and attention.in_proj_weight is not None
        if not (fused and attention.batch_first):  # type: ignore[union-attr]
            raise ModelError(
                f"block {path}.resblocks.{index} has attention of type {type(attention).__name__}; "
                "expected nn.MultiheadAttention with one fused in_proj_weight, batch first"
            )
    return [
        Block(f"{path}.resblocks.{i}", block, tower, i, {"mlp": NATIVE_MLP}) for i, block in enumerate(blocks)
    ]


def _timm_blocks(model: nn.Module) -> list[Block]:
    """Everything under visual.trunk that mixes positions and has an MLP, in the order it is run."""
    trunk = model.get_submodule("visual.trunk")
    found = [
        (path, module)
        for path, module in trunk.named_modules()
        if hasattr(module, "mlp") and any(hasattr(module, name) for name in _MIXERS)
    ]
    if not found:
        raise ModelError(
            f"the timm tower {type(trunk).__name__} has no blocks with an MLP to adapt; "
            "expected one such as vit_base_patch16_224, eva02_base_patch16_clip_224 or convnext_base"
        )
    return [
        Block(f"visual.trunk.{path}", block, "vision", i, _timm_layers(trunk, path, block))
        for i, (path, block) in enumerate(found)
    ]


def _timm_layers(trunk: nn.Module, path: str, block: nn.Module) -> dict[str, Layers]:
    """The linear layers of one block's parts.

    Raises:
        ModelError: a part is of a class that is not known to call its layers, or has others than expected.
    """
    mlp: nn.Module = block.mlp  # type: ignore[assignment]
    parts = {"mlp": TIMM_MLPS.get(class_path(mlp))}
    if parts["mlp"] is not None and set(parts["mlp"]) != _linears(mlp):
        parts["mlp"] = None
    mixer: nn.Module = next(getattr(block, name) for name in _MIXERS if hasattr(block, name))
    if class_path(block) != _CONVNEXT:
        variants = TIMM_ATTENTIONS.get(class_path(mixer), ())
        parts["attn"] = next((layers for layers in variants if set(layers) == _linears(mixer)), None)
    known = {name: layers for name, layers in parts.items() if layers is not None}
    if len(known) < len(parts):
        raise ModelError(
            f"block visual.trunk.{path} of the timm tower {type(trunk).__name__} has {class_path(mixer)} and "
            f"{class_path(mlp)}, of which not every matrix can be adapted; expected blocks such as those of "
            "timm's ViT, EVA, Swin, PVTv2, ViTamin or ConvNeXt"
        )
    return dict(sorted(known.items()))


def text_tower(model: nn.Module) -> nn.Module:
    """The module that holds the text tower: the model itself, or its `text` (custom_text)."""
    tower: nn.Module = getattr(model, "text", model)
    return tower


def class_path(module: nn.Module) -> str:
    """Module and name of a class, which no other class shares."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _linears(module: nn.Module) -> set[str]:
    return {
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and not name.startswith(_POSITIONS)
    }
