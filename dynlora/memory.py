"""How many images and prompts a step can compute at once in the memory there is.

Measured, not guessed: a few images and prompts go forward, and what is kept for the backward pass is added
up. What a step takes beside that is in proportion: gradients in flight, and the products of one block.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from dynlora import attach, prompts
from dynlora.clip import Clip
from dynlora.encoders import Encoders
from dynlora.packed import can_pack
from dynlora.prompts import Prompts
from dynlora.settings import Settings
from dynlora.task import Name, Task

_FEW = 4
_BESIDE = 1.5  # all that a step takes, over what is kept for its backward pass
# Of each factor: itself, its gradient, and AdamW's two moments, float32.
_BYTES_PER_PARAMETER = 16


def bound(clip: Clip, task: Task, settings: Settings, *, limit_bytes: int) -> Settings:
    """`settings` with as many images and prompts at once as fit into `limit_bytes` of memory.

    At least one of each, however little memory there is. Without bounds where a whole step fits.
    """
    images, names = _of_a_step(task, settings)
    asked = prompts.tokenize(clip, [n.name for n in names], [n.template for n in names])
    encoders, dtype = Encoders(clip.model, settings.dtype), getattr(torch, settings.dtype)
    with attach.attached(clip.model, settings.rank) as sites:
        keys = {site.key for site in sites}
        attach.reset(sites, seed=0, random_importance=False)
        factors = sum(parameter.numel() for site in sites for parameter in site.lora.parameters())
        per_image, per_prompt = _per_image(encoders, clip.image_size), _per_prompt(encoders, asked)
    fixed = _BYTES_PER_PARAMETER * factors + _copies_bytes(clip.model, keys, dtype)
    shares = _share((limit_bytes - fixed) / _BESIDE, images * per_image, len(names) * per_prompt)
    images_at_once, prompts_at_once = (
        None if share is None else max(1, int(share / each))
        for share, each in zip(shares, (per_image, per_prompt), strict=True)
    )
    return replace(settings, images_at_once=images_at_once, prompts_at_once=prompts_at_once)


def _of_a_step(task: Task, settings: Settings) -> tuple[int, list[Name]]:
    """How many images a step computes, and as many names as it asks about."""
    images, names = min(settings.batch_size, len(task.labels)), list(task.classes)
    if settings.objective == "default":
        images = 0  # all are looked at before the first step; and names that share a token, and that do not
        bank = [Name(name) for name in prompts.generic_names()]
        names += [*task.known[: 2 * settings.names_per_step], *bank[: 2 * settings.names_per_step]]
    return images, names


def _share(left: float, images: float, texts: float) -> tuple[float | None, float | None]:
    """What of `left` either tower gets, in bytes; None for one that needs no bound."""
    if images + texts <= left:
        return None, None
    if images <= left / 2:
        return None, left - images
    if texts <= left / 2:
        return left - texts, None
    return left / 2, left / 2


def _per_image(encoders: Encoders, size: tuple[int, int]) -> float:
    few, twice = (torch.zeros(n, 3, *size) for n in (_FEW, 2 * _FEW))
    return (kept_bytes(lambda: encoders.images(twice)) - kept_bytes(lambda: encoders.images(few))) / _FEW


def _per_prompt(encoders: Encoders, of: Prompts) -> float:
    """Of the longest ones."""
    length = of.eot if of.eot is not None else torch.ones(len(of))
    longest = length.argsort(descending=True)[torch.arange(2 * _FEW) % len(of)]
    few, twice = of.rows(longest[:_FEW]), of.rows(longest)
    return (kept_bytes(lambda: encoders.texts(twice)) - kept_bytes(lambda: encoders.texts(few))) / _FEW


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """What is kept between `forward` and its backward pass, parameters included."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # held by the result: no other tensor can get its place meanwhile

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    assert result.requires_grad
    return sum(kept.values())


def _copies_bytes(model: nn.Module, keys: set[str], dtype: torch.dtype) -> int:
    """What the adapted matrices take once more, packed both ways, or cast."""
    matrices = sum(model.get_parameter(key).numel() for key in keys)
    copies = 2 if can_pack("cpu", dtype) else int(dtype != torch.float32)
    return copies * dtype.itemsize * matrices
