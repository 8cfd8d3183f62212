"""LoRA layers on real towers: where they sit, that they start as nothing, and what they compute."""

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynlora.attach import attached, check_supported, reset
from dynlora.errors import ModelError
from dynlora.lora import LoRAAttention

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VISION = {
    "native": {"image_size": 64, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16},
    "timm_pvt": {"timm_model_name": "pvt_v2_b0", "image_size": 64},
    "timm_vit": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "image_size": 224},
    # q, k and v fused with the bias added inside, a gated MLP, rotary positions.
    "timm_eva02": {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "", "image_size": 224},
    # The same attention beside a plain MLP: EVA01.
    "timm_eva01": {
        "timm_model_name": "vit_medium_patch16_rope_reg1_gap_256", "timm_pool": "", "image_size": 256,
    },
    "timm_pe": {"timm_model_name": "vit_pe_core_tiny_patch16_384", "timm_pool": "map", "image_size": 384},
    "timm_swin": {"timm_model_name": "swin_tiny_patch4_window7_224", "timm_pool": "", "image_size": 224},
    "timm_relpos": {
        "timm_model_name": "vit_relpos_small_patch16_224", "timm_pool": "", "image_size": 224,
    },
    "timm_vitamin": {"timm_model_name": "vitamin_small_224", "timm_pool": "", "image_size": 224},
    "timm_convnext": {"timm_model_name": "convnext_tiny", "timm_pool": "", "image_size": 224},
}  # fmt: skip
BLOCKS = {
    "native": 3, "timm_pvt": 8, "timm_vit": 12, "timm_eva02": 12, "timm_eva01": 12, "timm_pe": 12,
    "timm_swin": 12, "timm_relpos": 12, "timm_vitamin": 14, "timm_convnext": 18,
}  # fmt: skip
SITES_OF_A_BLOCK = {"timm_vitamin": 7, "timm_convnext": 2}  # else six


EVERY_DAY = ("native", "timm_pvt", "timm_vit", "timm_eva02")


@pytest.fixture(
    scope="module",
    params=[pytest.param(k, marks=[] if k in EVERY_DAY else pytest.mark.nightly) for k in VISION],
)
def kind(request):
    """Which vision tower."""
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    """A CLIP with random weights."""
    torch.manual_seed(7)
    return open_clip.CLIP(embed_dim=32, vision_cfg=VISION[kind], text_cfg=TEXT).eval()


def _images(model, n=3):
    return torch.randn(n, 3, *model.visual.image_size, generator=torch.Generator().manual_seed(0))


def test_all_matrices_of_every_block_of_both_towers_are_covered(model, kind):
    """Blocks times six sites (seven with a gated MLP); their rows tile the blocks' weight matrices."""
    rows = {}
    with attached(model, rank=4) as sites:
        for site in sites:
            rows.setdefault(site.key, []).append((site.row_start, site.row_stop))
    state = model.state_dict()
    beside = ("rel_pos", "relative_position", "downsample")  # position biases, and layers between the blocks
    matrices = {
        key
        for key, value in state.items()
        if "blocks." in key and value.ndim == 2 and not any(words in key for words in beside)
    }

    assert len(sites) == SITES_OF_A_BLOCK.get(kind, 6) * BLOCKS[kind] + 6 * 2
    assert len({site.name for site in sites}) == len(sites)
    assert set(rows) == matrices
    for key, slices in rows.items():
        assert [s for _, s in sorted(slices)][-1] == state[key].shape[0]
        assert sum(stop - start for start, stop in slices) == state[key].shape[0]


def test_a_fresh_attachment_changes_no_embedding_and_detaching_leaves_no_trace(model):
    """ΔW starts at 0; afterwards the model is bit for bit what it was."""
    images = _images(model)
    before_state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        before = model.encode_image(images)
        with attached(model, rank=4) as sites:
            reset(sites, seed=1, random_importance=True)
            inside = model.encode_image(images)
        after = model.encode_image(images)

    assert (inside - before).abs().max() < 1e-5
    assert torch.equal(after, before)
    assert list(model.state_dict()) == list(before_state)
    assert all(torch.equal(value, before_state[key]) for key, value in model.state_dict().items())


def test_the_adapted_model_equals_a_plain_one_with_the_deltas_added(model):
    """Against an independent merge, W + ΔW row by row, on both towers."""
    images, tokens = _images(model), open_clip.SimpleTokenizer()(["a photo of a cat.", "a dog"])
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad(), attached(model, rank=4) as sites:
        reset(sites, seed=2, random_importance=True)
        for number, site in enumerate(sites):
            generator = torch.Generator().manual_seed(number)
            site.lora.lora_B.normal_(0, 0.02, generator=generator)
            for row in range(site.row_start, site.row_stop):
                for i in range(4):
                    weight = site.lora.importance[i] * site.lora.lora_B[row - site.row_start, i]
                    plain[site.key][row] += weight * site.lora.lora_A[i]
        adapted = model.encode_image(images), model.encode_text(tokens)
    reference = copy.deepcopy(model)
    reference.load_state_dict(plain)
    with torch.no_grad():
        merged = reference.encode_image(images), reference.encode_text(tokens)

    for ours, theirs in zip(adapted, merged, strict=True):
        assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()


def test_one_step_gives_every_lora_tensor_a_gradient_and_the_base_none(model):
    """No adapter is silently left out (a known trap of nn.MultiheadAttention's out_proj)."""
    with attached(model, rank=4) as sites:
        reset(sites, seed=3, random_importance=True)
        for site in sites:
            nn.init.normal_(site.lora.lora_B, std=0.02)
        image = F.normalize(model.encode_image(_images(model)), dim=-1)
        text = F.normalize(model.encode_text(open_clip.SimpleTokenizer()(["cat", "dog"])), dim=-1)
        F.cross_entropy(10 * image @ text.T, torch.tensor([0, 1, 1])).backward()
        for site in sites:
            for name, parameter in site.lora.named_parameters():
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, f"{site.name} {name}"
        assert all(
            p.grad is None
            for n, p in model.named_parameters()
            if not any(p is ours for site in sites for ours in site.lora.parameters())
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


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "fastvit_mci0", "resnet18"])
def test_a_timm_tower_of_another_kind_is_refused_by_name(name):
    """Its attention might read its weights past our layers, or it has none."""
    vision = {"timm_model_name": name, "image_size": 224}
    with torch.device("meta"):
        model = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=TEXT)
    with pytest.raises(ModelError, match=r"timm tower (FastVit|Beit|ResNet) has "):
        check_supported(model)
