"""Towers without needless work give what the whole ones give, forward and backward."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynlora import prompts, towers
from dynlora.attach import attached, reset
from dynlora.clip import Clip, plain_tokenizer

TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
VISION = {"image_size": 64, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16}
MODELS = {
    "as it comes": {},
    "QuickGELU": {"quick_gelu": True},
    "scaled layers": {
        "vision_cfg": VISION | {"ls_init_value": 0.1},
        "text_cfg": TEXT | {"ls_init_value": 0.1},
    },
    "no norm before": {"vision_cfg": VISION | {"no_ln_pre": True}},
    "mean of tokens": {"vision_cfg": VISION | {"pool_type": "avg"}},
    "norm after pooling": {"vision_cfg": VISION | {"final_ln_after_pool": True}},
    "attention pooling": {"vision_cfg": VISION | {"attentional_pool": True, "attn_pooler_heads": 4}},
    "text of its own": {"custom_text": True},
    "text without a mask": {"text_cfg": TEXT | {"no_causal_mask": True}},
}
NAMES = ["cat", "an elephant that is not grey", "dog", "catfish"]


@pytest.fixture(params=MODELS)
def clip(request):
    """A small native CLIP with random weights, a part of it unusual."""
    torch.manual_seed(7)
    config = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT} | MODELS[request.param]
    build = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    model = build(**config).eval().requires_grad_(False)
    return Clip(model, request.param, {}, {"size": 64}, plain_tokenizer(20))


def _trained(sites):
    reset(sites, seed=2, random_importance=True)
    for number, site in enumerate(sites):
        nn.init.normal_(site.lora.lora_B, std=0.05, generator=torch.Generator().manual_seed(number))
    return [parameter for site in sites for parameter in site.lora.parameters()]


@pytest.mark.parametrize("names", [NAMES, NAMES[:1], ["cat", "cat"]])
def test_embeddings_and_every_gradient_are_those_of_open_clips_own_forward(clip, names):
    """Several prompts, one, and the same twice; the last block and the shared beginning lose nothing."""
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    of = prompts.tokenize(clip, names)
    whole = clip.tokenizer([prompts.DEFAULT_TEMPLATE.format(name) for name in names])
    with attached(clip.model, rank=4) as sites:
        parameters = _trained(sites)
        ours = (
            F.normalize(towers.embed_images(clip.model, pixels), dim=-1),
            towers.embed_texts(clip.model, of),
        )
        theirs = [
            clip.model.encode_image(pixels, normalize=True), clip.model.encode_text(whole, normalize=True)
        ]  # fmt: skip
        gradients = []
        for images, texts in (ours, theirs):
            logits = 10 * images @ texts.T + images.sum() + texts.square().mean(0).sum()
            loss = F.softplus(logits).sum()
            gradients.append(torch.autograd.grad(loss, parameters))

    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() < 1e-5
    for mine, other in zip(*gradients, strict=True):
        assert (mine - other).norm() <= 1e-4 * other.norm() + 1e-6


def test_a_plain_model_embeds_as_one_with_fresh_adapters(clip):
    """Without adapters the model's own way is taken."""
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    of = prompts.tokenize(clip, NAMES)
    with torch.no_grad():
        plain = towers.embed_images(clip.model, pixels), towers.embed_texts(clip.model, of)
        with attached(clip.model, rank=4) as sites:
            reset(sites, seed=1, random_importance=True)
            fresh = towers.embed_images(clip.model, pixels), towers.embed_texts(clip.model, of)

    for one, other in zip(plain, fresh, strict=True):
        assert (one - other).abs().max() < 1e-5
