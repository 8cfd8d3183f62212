"""Loading a model to start from: bundled, local files, directories; and what is refused, in which words."""

import json

import pytest
import torch
from safetensors.torch import save_file

import dynlora
from dynlora.clip import BUNDLED_CONFIG, BUNDLED_WEIGHTS, load_clip, load_version, state_arrays
from dynlora.errors import ModelError


@pytest.fixture(scope="module")
def bundled():
    """The bundled CLIP."""
    return load_clip()


def _same(one, other):
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_bundled_model_is_float32_frozen_and_in_eval_mode(bundled):
    """float16 is for storage only."""
    assert {p.dtype for p in bundled.model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in bundled.model.parameters())
    assert not bundled.model.training
    assert (bundled.image_size, bundled.context_length) == ((64, 64), 77)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_a_local_checkpoint_file_gives_the_same_model(bundled, tmp_path, suffix):
    """Safetensors and torch's own format, the latter read as weights only."""
    path = tmp_path / f"weights{suffix}"
    state = state_arrays(bundled.model)
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)

    assert _same(load_clip(BUNDLED_CONFIG.stem, str(path)), bundled)


def test_a_local_directory_with_config_and_weights_gives_the_same_model(bundled, tmp_path):
    """open_clip's own layout: open_clip_config.json beside the weights."""
    config = {"model_cfg": bundled.model_cfg, "preprocess_cfg": bundled.preprocess_cfg}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(state_arrays(bundled.model), tmp_path / "open_clip_model.safetensors")
    loaded = load_clip(f"local-dir:{tmp_path}")

    assert _same(loaded, bundled)
    assert loaded.model_cfg == bundled.model_cfg


def test_a_version_is_rebuilt_from_its_config_and_weights(bundled, tmp_path):
    """What the worker does before it adapts."""
    config = {"model_cfg": bundled.model_cfg, "preprocess_cfg": bundled.preprocess_cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state_arrays(bundled.model), tmp_path / "weights.safetensors")
    loaded = load_version(tmp_path / "config.json", tmp_path / "weights.safetensors", BUNDLED_CONFIG.stem)

    assert _same(loaded, bundled)
    assert loaded.tokenizer(["a cat"]).equal(bundled.tokenizer(["a cat"]))


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    """Weights are data."""

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "it-ran"), "w"))

    torch.save({"state_dict": Bomb()}, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=f"cannot load {BUNDLED_CONFIG.stem}"):
        load_clip(BUNDLED_CONFIG.stem, str(tmp_path / "weights.pt"))

    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(
    ("architecture", "pretrained", "words"),
    [
        ("ViT-B-61", "openai", r"knows no architecture 'ViT-B-61'; did you mean .*ViT-B-16"),
        ("ViT-B-16", None, "named without weights; expected --pretrained"),
        ("ViT-B-16", "no-such-tag", r"cannot load ViT-B-16 with weights 'no-such-tag'"),
        ("RN50", "openai", "RN50 has a ResNet vision tower, which cannot be adapted; docs/models.md"),
        ("coca_ViT-B-32", "tag", r"has a captioning decoder \(CoCa\) and a text tower with a class token"),
        ("ViT-L-14-CLIPA", "datacomp1b", "has a tokenizer with strip_sep_token"),
        (
            "MobileCLIP-S1",
            "datacompdr",
            r"timm tower FastVit has .*RepMixer and .*ConvMlp, of which not every matrix can be adapted",
        ),
        ("roberta-ViT-B-32", "laion2b_s12b_b32k", r"a Hugging Face text tower \(roberta-base\)"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(architecture, pretrained, words):
    """Before anything is downloaded where the name or the config already tells."""
    with pytest.raises(ModelError, match=words):
        load_clip(architecture, pretrained)


def test_a_weights_file_cut_short_is_refused(tmp_path):
    """The message names the file."""
    path = tmp_path / "short.safetensors"
    path.write_bytes(BUNDLED_WEIGHTS.read_bytes()[:100_000])
    with pytest.raises(ModelError, match=r"short\.safetensors"):
        load_clip(BUNDLED_CONFIG.stem, str(path))


def test_the_public_names_are_these():
    """A changed name breaks programs outside: it needs a changelog entry."""
    assert dynlora.__all__ == [
        "Adaptation", "Clip", "DynloraError", "Factor", "Hooks", "Name", "Progress", "Settings", "Task",
        "adapt", "load_clip", "preset",
    ]  # fmt: skip
    assert all(hasattr(dynlora, name) for name in dynlora.__all__)
