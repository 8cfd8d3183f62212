"""LoRA layers on a real CLIP: where they sit, that they start as nothing, and what they compute."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynlora.attach import attached, check_supported, reset
from dynlora.clip import load_clip
from dynlora.errors import ModelError
from dynlora.lora import LoRAAttention


@pytest.fixture(scope="module")
def clip():
    """The bundled CLIP."""
    return load_clip()


def _images(n=3):
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_all_six_matrices_of_every_block_of_both_towers_are_covered(clip):
    """10 blocks, 6 matrices each, and their rows tile exactly the blocks' weight matrices."""
    rows = {}
    with attached(clip.model, rank=4) as sites:
        for site in sites:
            rows.setdefault(site.key, []).append((site.row_start, site.row_stop))
    state = clip.model.state_dict()
    matrices = {key for key, value in state.items() if "resblocks" in key and value.ndim == 2}

    assert len(sites) == 60
    assert set(rows) == matrices
    for key, slices in rows.items():
        assert [s for _, s in sorted(slices)][-1] == state[key].shape[0]
        assert sum(stop - start for start, stop in slices) == state[key].shape[0]


def test_a_fresh_attachment_changes_no_embedding_and_detaching_leaves_no_trace(clip):
    """ΔW starts at 0; afterwards the model is bit for bit what it was."""
    images = _images()
    before_state = {key: value.clone() for key, value in clip.model.state_dict().items()}
    with torch.no_grad():
        before = clip.model.encode_image(images)
        with attached(clip.model, rank=4) as sites:
            reset(sites, seed=1, random_importance=True)
            inside = clip.model.encode_image(images)
        after = clip.model.encode_image(images)

    assert (inside - before).abs().max() < 1e-5
    assert torch.equal(after, before)
    assert list(clip.model.state_dict()) == list(before_state)
    assert all(torch.equal(value, before_state[key]) for key, value in clip.model.state_dict().items())


def test_the_adapted_model_equals_a_plain_one_with_the_deltas_added(clip):
    """Against an independent merge, W + ΔW row by row, on both towers."""
    images, tokens = _images(), clip.tokenizer(["a photo of a cat.", "a dog"])
    plain = {key: value.clone() for key, value in clip.model.state_dict().items()}
    with torch.no_grad(), attached(clip.model, rank=4) as sites:
        reset(sites, seed=2, random_importance=True)
        for number, site in enumerate(sites):
            generator = torch.Generator().manual_seed(number)
            site.lora.lora_B.normal_(0, 0.02, generator=generator)
            for row in range(site.row_start, site.row_stop):
                for i in range(4):
                    weight = site.lora.importance[i] * site.lora.lora_B[row - site.row_start, i]
                    plain[site.key][row] += weight * site.lora.lora_A[i]
        adapted = clip.model.encode_image(images), clip.model.encode_text(tokens)
    reference = load_clip().model
    reference.load_state_dict(plain)
    with torch.no_grad():
        merged = reference.encode_image(images), reference.encode_text(tokens)

    for ours, theirs in zip(adapted, merged, strict=True):
        assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()


def test_one_step_gives_every_lora_tensor_a_gradient_and_the_base_none(clip):
    """No adapter is silently left out (a known trap of nn.MultiheadAttention's out_proj)."""
    with attached(clip.model, rank=4) as sites:
        reset(sites, seed=3, random_importance=True)
        for site in sites:
            nn.init.normal_(site.lora.lora_B, std=0.02)
        image = F.normalize(clip.model.encode_image(_images()), dim=-1)
        text = F.normalize(clip.model.encode_text(clip.tokenizer(["cat", "dog"])), dim=-1)
        F.cross_entropy(10 * image @ text.T, torch.tensor([0, 1, 1])).backward()
        for site in sites:
            for name, parameter in site.lora.named_parameters():
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, f"{site.name} {name}"
        assert all(
            p.grad is None
            for n, p in clip.model.named_parameters()
            if "lora" not in n.lower() and ".q." not in n and ".k." not in n and ".v." not in n
        )


def test_attention_equals_torchs_own_with_and_without_a_mask():
    """At ΔW = 0 the layer is nn.MultiheadAttention."""
    torch.manual_seed(0)
    base = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    layer = LoRAAttention(base, rank=2)
    for lora in (layer.q, layer.k, layer.v, layer.out.lora):
        lora.reset(torch.Generator().manual_seed(0), random_importance=True)
    x = torch.randn(2, 5, 32)
    for mask in (None, torch.full((5, 5), float("-inf")).triu(1)):
        ours, _ = layer(x, x, x, need_weights=False, attn_mask=mask)
        theirs, _ = base(x, x, x, need_weights=False, attn_mask=mask)
        assert (ours - theirs).abs().max() < 1e-5


def test_a_tower_that_cannot_be_adapted_is_refused_by_name():
    """A ResNet vision tower has no transformer blocks."""

    class ResNetClip(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = nn.Sequential(nn.Conv2d(3, 8, 3))

    with pytest.raises(
        ModelError, match=r"ResNetClip has no native open_clip transformer at .visual\.transformer."
    ):
        check_supported(ResNetClip())
