"""Every kind of tower the whole way: attach, adapt, fold, export, ONNX Runtime against torch, classify."""

import copy
from pathlib import Path

import open_clip
import pytest
import torch

from deploy.client import Client
from deploy.manifest import WEIGHTS_NAME
from deploy.runtime import LoadedVersion
from deploy.weights import read_layout
from dynlora.settings import Settings
from tests.e2e.towers import differing, learn_and_publish, load, publish_founded, write_model

PHOTO = Path(__file__).parents[2] / "examples/demo/images/heldout/clothing/shoes/0000.jpg"
SHORT = Settings(steps=3, batch_size=4, rank=4, kappa_max=0.3, learning_rate=2e-3)

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
SIGLIP_TEXT = {
    "context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2, "mlp_ratio": 3.7362,
    "hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "tokenizer_kwargs": {"clean": "canonicalize"},
    "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
}  # fmt: skip
NATIVE = {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
SMALL = {
    "custom text, QuickGELU": {
        "embed_dim": 32, "custom_text": True, "quick_gelu": True, "vision_cfg": NATIVE, "text_cfg": TEXT,
    },
    "SigLIP": {
        "embed_dim": 192, "custom_text": True, "init_logit_bias": -10, "text_cfg": SIGLIP_TEXT,
        "vision_cfg": {
            "image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map",
            "timm_proj": "none",
        },
    },
}  # fmt: skip


def _timm(name: str, size: int, pool: str = "avg", proj: str | None = "linear") -> dict[str, object]:
    vision = {"timm_model_name": name, "image_size": size, "timm_pool": pool, "timm_proj": proj}
    return {"embed_dim": 32, "custom_text": True, "vision_cfg": vision, "text_cfg": TEXT}


OTHERS = {
    "EVA, fused bias": _timm("vit_medium_patch16_rope_reg1_gap_256", 256),
    "PE": _timm("vit_pe_core_tiny_patch16_384", 384, "map", None),
    "Swin": _timm("swin_tiny_patch4_window7_224", 224),
    "relative positions": _timm("vit_relpos_small_patch16_224", 224),
    "ViTamin": _timm("vitamin_small_224", 224, ""),
    "ConvNeXt": _timm("convnext_tiny", 224, ""),
    "PVTv2": _timm("pvt_v2_b0", 64),
    "EOS by its id": {
        "embed_dim": 32, "vision_cfg": NATIVE, "text_cfg": {
            "context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2,
            "hf_tokenizer_name": "google/mt5-base", "pool_type": "eos", "eos_id": 1,
            "tokenizer_kwargs": {"clean": "canonicalize"},
        },
    },
}  # fmt: skip
REAL = ("ViT-B-16", "ViT-B-16-quickgelu", "ViT-B-16-SigLIP", "EVA02-B-16", "MobileCLIP-B", "ViT-M-16-alt")


def _goes_the_whole_way(tmp_path: Path, config: dict[str, object]) -> None:
    """The promise of this file; prints the differences it measured."""
    store = publish_founded(tmp_path / "home", write_model(tmp_path / "model", copy.deepcopy(config)))
    version, expected, task = learn_and_publish(store, SHORT)
    with LoadedVersion(store.path(version)) as loaded:
        parity = loaded.measure_parity()
        found = loaded.encode_pixels(task.pixels.numpy())
        clip = load(store, version)
        texts = ["a photo of a cat.", "Red_SHOE!", "lemon " * 90, ""]
        ids = clip.tokenizer(texts)
        assert (loaded.tokenize(texts) == ids.numpy()).all()
        with torch.no_grad():
            by_torch = clip.model.encode_text(ids, normalize=True)
        by_runtime = loaded.encode_texts(texts)
    print(
        f"parity {parity}, fold {differing(found, expected):.2g}, text {differing(by_runtime, by_torch):.2g}"
    )
    assert differing(found, expected) < 1e-4
    assert differing(by_runtime, by_torch) < 1e-5
    assert read_layout(store.path(0) / WEIGHTS_NAME) == read_layout(store.path(version) / WEIGHTS_NAME)
    manifest = store.manifest(version)
    assert manifest.logit_bias == pytest.approx(config.get("init_logit_bias"))
    with Client(tmp_path / "home" / "serving") as client:
        [answer] = client.classify([PHOTO], top=9)
        assert answer.version == version
        assert {p.label for p in answer.predictions} == {"dog", "red shoe", "cat", "lemon"}
        [other] = client.classify([PHOTO], labels=["dog", "the lemon"])
        assert sum(p.score for p in other.predictions) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_a_small_model_of_the_kind_goes_the_whole_way(tmp_path, name):
    """From a folder of weights to an answer of the version that was learnt."""
    _goes_the_whole_way(tmp_path, SMALL[name])


@pytest.mark.nightly
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_kind_of_tower_goes_the_whole_way(tmp_path, name):
    """As above."""
    _goes_the_whole_way(tmp_path, OTHERS[name])


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", REAL)
def test_a_real_configuration_goes_the_whole_way(tmp_path, name):
    """Full size, random weights."""
    _goes_the_whole_way(tmp_path, open_clip.get_model_config(name))
