"""Put a LoRA beside every weight matrix of both towers' blocks and beside rows of the token embedding, and
take them off again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynlora.blocks import Block, Layers, class_path, find_blocks, text_tower
from dynlora.errors import ModelError
from dynlora.lora import LoRA, LoRAAttention, LoRAEmbedding, LoRAFusedLinear, LoRALinear

Undo = list[tuple[nn.Module, str, Any]]

_FEW_KEYS = "timm.models.pvt_v2.Attention"  # of a reduced picture


@dataclass(frozen=True)
class Site:
    """One adapted matrix: rows [row_start, row_stop) of the state-dict entry `key`."""

    key: str
    row_start: int
    row_stop: int
    tower: str  # "vision" | "text"
    block: int  # of a token's row: the token
    kind: str  # "q" | "k" | "v" | "out" | "mlp_in" | "mlp_gate" | "mlp_out" | "token"
    lora: LoRA

    @property
    def name(self) -> str:
        """For people and manifests, such as `vision.3.mlp_in`."""
        return f"{self.tower}.{self.block}.{self.kind}"


@contextmanager
def attached(
    model: nn.Module, rank: int, *, only: Callable[[Site], bool] = lambda _: True, tokens: Sequence[int] = ()
) -> Iterator[list[Site]]:
    """Wrap every weight matrix of every block of both towers; restore the model on leaving.

    Inside, the model's own parameters are frozen and only the yielded sites train.

    Args:
        only: which sites to yield; the others have an update of zero that nobody can change.
        tokens: whose rows of the token embedding are adapted, too.

    Raises:
        ModelError: a tower has blocks of a kind that is not covered, or `only` leaves nothing.
    """
    blocks = find_blocks(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    sites: list[Site] = []
    undo: Undo = []
    try:
        for block in blocks:
            sites += _wrap(block, rank, undo)
        sites += _wrap_tokens(model, tokens, undo)
        yield _chosen(sites, only)
    finally:
        for parent, name, original in reversed(undo):
            setattr(parent, name, original)
        for parameter in trainable:
            parameter.requires_grad_(True)


def _chosen(sites: list[Site], only: Callable[[Site], bool]) -> list[Site]:
    chosen = [site for site in sites if only(site)]
    if not chosen:
        raise ModelError("no matrix of the model was chosen to be adapted; expected at least one")
    kept = {id(site) for site in chosen}
    for site in sites:
        if id(site) not in kept:
            site.lora.requires_grad_(False)
            for parameter in site.lora.parameters():
                parameter.zero_()
    return chosen


def check_supported(model: nn.Module) -> None:
    """Raise ModelError, naming the part, unless every block of both towers can be adapted."""
    find_blocks(model)


def _wrap(block: Block, rank: int, undo: Undo) -> list[Site]:
    attention: Any = getattr(block.module, "attn", None)
    sites: list[Site] = []
    if isinstance(attention, nn.MultiheadAttention):
        sites = _wrap_native_attention(block, attention, rank, undo)
    elif getattr(attention, "q_bias", None) is not None:
        # EVA adds q's and v's bias inside of one product that reads the weight past our layer, unless told
        # to add it separately: the same sum.
        undo.append((attention, "qkv_bias_separate", attention.qkv_bias_separate))
        attention.qkv_bias_separate = True
    elif class_path(attention) == _FEW_KEYS:
        # torch's attention for long sequences is slower there, and many times so in bfloat16.
        undo.append((attention, "fused_attn", attention.fused_attn))
        attention.fused_attn = False
    for part, layers in block.layers.items():
        sites += _wrap_linears(block, part, layers, rank, undo)
    return sites


def _wrap_tokens(model: nn.Module, tokens: Sequence[int], undo: Undo) -> list[Site]:
    if not tokens:
        return []
    text: Any = text_tower(model)
    base = text.token_embedding
    undo.append((text, "token_embedding", base))
    text.token_embedding = wrapped = LoRAEmbedding(base, tokens)
    key = ("token_embedding" if text is model else "text.token_embedding") + ".weight"
    rows = zip(tokens, wrapped.loras, strict=True)
    return [Site(key, token, token + 1, "text", token, "token", lora) for token, lora in rows]  # type: ignore[arg-type]


def _wrap_native_attention(
    block: Block, attention: nn.MultiheadAttention, rank: int, undo: Undo
) -> list[Site]:
    wrapped = LoRAAttention(attention, rank)
    undo.append((block.module, "attn", attention))
    block.module.attn = wrapped
    loras = {"q": wrapped.q, "k": wrapped.k, "v": wrapped.v}
    out = {"out": wrapped.out.lora}
    return _sites(block, "attn.in_proj_weight", loras) + _sites(block, "attn.out_proj.weight", out)


def _wrap_linears(block: Block, part: str, layers: Layers, rank: int, undo: Undo) -> list[Site]:
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


def _sites(block: Block, key: str, loras: dict[str, LoRA]) -> list[Site]:
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
        if site.kind == "token":
            site.lora.reset_row()
        else:
            site.lora.reset(generator, random_importance=random_importance)
