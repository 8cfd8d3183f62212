"""Where models come from: OpenAI's archives, tags, folders and the hub's cache; and what is refused, when."""

import json
import pickle
import warnings
import zipfile

import open_clip
import pytest
import torch
from open_clip import factory
from safetensors.torch import save_file
from torch import nn

from dynlora import prompts
from dynlora.clip import build_model, load_clip
from dynlora.errors import ModelError
from dynlora.learner import adapt
from dynlora.settings import preset
from dynlora.torchscript import read_torchscript
from tests.e2e.test_towers import SMALL, TEXT
from tests.e2e.towers import task_for, write_model, write_tokenizer

VISION = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
PLAIN = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT | {"layers": 1}}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The name of a small registered architecture, with a tag that was trained with QuickGELU."""
    path = tmp_path / "tiny-native.json"
    path.write_text(json.dumps(PLAIN))
    quick = tmp_path / "tiny-native-quickgelu.json"
    quick.write_text(json.dumps(PLAIN | {"quick_gelu": True}))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", [*factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    open_clip.add_model_config(path)
    open_clip.add_model_config(quick)
    return "tiny-native"


def _uses_quick_gelu(clip):
    return any(isinstance(module, open_clip.transformer.QuickGELU) for module in clip.model.modules())


def _random_model(**more):
    torch.manual_seed(1)
    return build_model(PLAIN | more)


class _AsOpenAi(nn.Module):
    """What OpenAI's archives hold: weights in half precision, sizes, and a mask in every text block."""

    def __init__(self, model):
        super().__init__()
        for name, child in model.named_children():
            setattr(self, name, child)
        for name, parameter in model.named_parameters(recurse=False):
            setattr(self, name, parameter)
        for block in self.transformer.resblocks:
            block.attn_mask = model.attn_mask
        self.input_resolution, self.context_length, self.vocab_size = (
            torch.tensor(n) for n in (32, 77, 49408)
        )

    def forward(self, x):
        return x * self.logit_scale


def test_openais_torchscript_archive_is_read_without_running_it(tmp_path, tiny):
    """Its weights are the model's, in float32, and the model computes QuickGELU as OpenAI's do."""
    model = _random_model().half()
    path = tmp_path / "ViT-tiny.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its own format outdated
        torch.jit.save(torch.jit.trace(_AsOpenAi(model), torch.ones(1)), str(path))
    clip = load_clip(tiny, str(path))
    state = clip.model.state_dict()

    assert all(torch.equal(state[key], value.float()) for key, value in model.state_dict().items())
    assert _uses_quick_gelu(clip)
    assert clip.model_cfg["quick_gelu"] is True


def test_an_archive_that_names_anything_else_is_refused_and_nothing_runs(tmp_path, tiny):
    """A pickle in an archive is data, too."""

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "it-ran"), "w"))

    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bomb/data.pkl", pickle.dumps(Bomb()))
        archive.writestr("bomb/constants.pkl", b"")
    with pytest.raises(ModelError, match=r"bomb\.pt is a TorchScript archive .* it names (_io|io)\.open"):
        load_clip(tiny, str(path))
    assert not (tmp_path / "it-ran").exists()


def test_an_archive_whose_tensor_reaches_beyond_its_bytes_is_refused(tmp_path):
    """Damage is found, not read past."""
    path = tmp_path / "short.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(_AsOpenAi(_random_model()), torch.ones(1)), str(path))
    cut = tmp_path / "cut.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(cut, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content[:-8] if name.endswith("/data/0") else content)
    with pytest.raises(ModelError, match=r"cut\.pt is a TorchScript archive whose weights cannot be read"):
        read_torchscript(cut)


def _save_torchscript(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its own format outdated
        torch.jit.save(torch.jit.trace(module, torch.ones(1)), str(path))


class _Holding(nn.Module):
    """A module with some tensors and nothing else."""

    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x):
        """Anything that can be traced."""
        return x + 1


def test_an_archive_that_was_compressed_since_is_read(tmp_path):
    """Weights hardly shrink, so its size says about what is in it."""
    _save_torchscript(_Holding(weight=torch.randn(300, 300)), tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as old:
        packed = zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED)
        with packed as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    plain, again = (read_torchscript(tmp_path / name)["weight"] for name in ("plain.pt", "packed.pt"))

    assert (tmp_path / "packed.pt").stat().st_size < (tmp_path / "plain.pt").stat().st_size
    assert torch.equal(plain, again)


@pytest.mark.parametrize("kind", ["zeros", "pickle", "expanded", "shared"])
def test_an_archive_that_unpacks_to_much_more_than_its_size_is_refused(tmp_path, kind):
    """A bomb takes no memory: bytes that compress, a number many times, a storage under many names."""
    storage = torch.randn(100_000)
    tensors = {
        "expanded": {"weight": torch.ones(1).expand(50_000_000)},
        "shared": {f"weight_{number}": storage[:] for number in range(200)},
    }
    path = tmp_path / "bomb.pt"
    _save_torchscript(_Holding(**tensors.get(kind, {"weight": torch.ones(10_000_000)})), path)
    if kind in ("zeros", "pickle"):
        bomb = tmp_path / "packed.pt"
        large = "/data.pkl" if kind == "pickle" else None
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                more = bytes(40_000_000) if large and name.endswith(large) else b""
                new.writestr(name, old.read(name) + more)
        path = bomb

    with pytest.raises(ModelError, match=r"it unpacks to more than .* bytes, 4 times its size"):
        read_torchscript(path)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_a_tags_activation_is_the_one_its_weights_were_trained_with(tmp_path, tiny, monkeypatch, quick_gelu):
    """open_clip only warns: ViT-B-16 with the tag openai would compute another function than OpenAI's."""
    path = tmp_path / "weights.safetensors"
    save_file(_random_model().state_dict(), path)
    tag = {"url": "https://example.org/w", "quick_gelu": quick_gelu}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny, {"some_tag": tag})
    monkeypatch.setattr(factory, "download_pretrained", lambda cfg, cache_dir=None: str(path))
    clip = load_clip(tiny, "some_tag")

    assert _uses_quick_gelu(clip) is quick_gelu
    assert clip.model_cfg.get("quick_gelu", False) is quick_gelu


def test_weights_trained_with_gelu_are_refused_for_a_quickgelu_model(tiny, monkeypatch):
    """The message names the model that fits; nothing is downloaded."""
    tag = {"url": "https://example.org/w"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, f"{tiny}-quickgelu", {"some_tag": tag})
    with pytest.raises(ModelError, match=r"'some_tag' were trained with GELU.*name the model tiny-native$"):
        load_clip(f"{tiny}-quickgelu", "some_tag")


def test_the_openai_tag_of_vit_b_16_computes_quickgelu():
    """The model of the paper."""
    from dynlora.clip import _needs_quick_gelu

    assert _needs_quick_gelu("ViT-B-16", "openai")
    assert not _needs_quick_gelu("ViT-B-16", "laion2b_s34b_b88k")
    assert not _needs_quick_gelu("ViT-B-16", "/models/a-file.safetensors")


@pytest.fixture
def in_hub_cache(tmp_path, monkeypatch):
    """Puts files where huggingface_hub finds what it downloaded earlier; there is no network."""
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def snapshot_of(repository):
        whole = hub / f"models--{repository.replace('/', '--')}"
        (whole / "refs").mkdir(parents=True)
        (whole / "refs" / "main").write_text("0" * 40)
        directory = whole / "snapshots" / ("0" * 40)
        directory.mkdir(parents=True)
        return directory

    return snapshot_of


def test_siglips_tokenizer_comes_out_of_the_hubs_cache(tmp_path, tiny, in_hub_cache):
    """Where the config names a repository, its two files are enough; no network, no transformers."""
    model_dir = write_model(tmp_path / "model", SMALL["SigLIP"])
    registered = tmp_path / "tiny-siglip.json"
    registered.write_text(json.dumps(SMALL["SigLIP"]))
    open_clip.add_model_config(registered)
    write_tokenizer(in_hub_cache("timm/ViT-B-16-SigLIP"), 64)
    clip = load_clip("tiny-siglip", str(model_dir / "open_clip_model.safetensors"))

    assert clip.tokenizer(["a red shoe"])[0, :4].tolist() == [4, 9, 10, 1]
    assert clip.logit_bias == -10


def test_a_repository_on_the_hub_is_loaded_out_of_its_cache(tmp_path, in_hub_cache):
    """By open_clip's own loader: config, weights, and CLIP's own tokenizer."""
    config = PLAIN | {"custom_text": True, "quick_gelu": True}
    model_dir = write_model(tmp_path / "model", config)
    snapshot = in_hub_cache("somebody/some-clip")
    for path in model_dir.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    clip = load_clip("hf-hub:somebody/some-clip")

    assert clip.model_cfg == config
    assert clip.preprocess_cfg["mean"] == [0.5] * 3
    assert _uses_quick_gelu(clip)


def test_a_repository_of_another_architecture_is_refused_before_its_weights(in_hub_cache):
    """Only its config was there."""
    config = PLAIN | {"vision_cfg": VISION | {"layers": [1, 1, 1, 1]}}
    snapshot = in_hub_cache("somebody/a-resnet")
    (snapshot / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(ModelError, match="hf-hub:somebody/a-resnet has a ResNet vision tower"):
        load_clip("hf-hub:somebody/a-resnet")


def test_a_folder_without_its_tokenizer_is_refused_before_its_weights_are_read(tmp_path):
    """What is missing and what to do."""
    model_dir = write_model(tmp_path / "model", SMALL["SigLIP"])
    (model_dir / "tokenizer.json").unlink()
    (model_dir / "open_clip_model.safetensors").write_bytes(b"would not load either")
    with pytest.raises(
        ModelError, match=r"needs the tokenizer of timm/ViT-B-16-SigLIP.*tokenizer\.json is missing"
    ):
        load_clip(f"local-dir:{model_dir}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"multimodal_cfg": {}}, "a captioning decoder"),
        ({"text_cfg": TEXT | {"embed_cls": True}}, "a text tower with a class token of its own"),
        ({"text_cfg": TEXT | {"tokenizer_mode": "clips"}}, "a tokenizer in mode 'clips'"),
        ({"text_cfg": TEXT | {"tokenizer_kwargs": {"strip_sep_token": True}}}, "with strip_sep_token"),
        (
            {"text_cfg": TEXT | {"qk_norm": True}},
            r"transformer\.resblocks\.0 has attention of type Attention",
        ),
        ({"vision_cfg": VISION | {"patch_dropout": 0.5}}, "patch dropout"),
        ({"text_cfg": TEXT | {"sails": 3}}, "open_clip cannot build .* 'sails'"),
    ],
)
def test_a_folder_is_refused_by_its_config_alone(tmp_path, changes, words):
    """There are no weights in it at all."""
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": PLAIN | changes}))
    with pytest.raises(ModelError, match=words):
        load_clip(f"local-dir:{tmp_path}")


def test_a_folder_that_is_none_is_refused(tmp_path):
    """The message names the file that was looked for."""
    with pytest.raises(ModelError, match=r"cannot read the open_clip_config\.json of local-dir:"):
        load_clip(f"local-dir:{tmp_path}")


def test_prompts_are_cut_where_text_is_causal_and_never_where_it_is_not(tmp_path):
    """SigLIP looks at all tokens and pools at the last: cutting would change every embedding."""
    siglip = load_clip(f"local-dir:{write_model(tmp_path / 'siglip', SMALL['SigLIP'])}")
    whole = prompts.tokenize(siglip, ["cat", "dog"])
    assert whole.eot is None
    assert whole.tokens.shape == (2, 16)
    assert whole.rows(torch.tensor([1])).tokens.shape == (1, 16)
    with torch.no_grad():
        ours = prompts.encode_text(siglip.model, whole)
        theirs = siglip.model.encode_text(whole.tokens, normalize=True)
    assert torch.equal(ours, theirs)

    model = build_model(PLAIN | {"custom_text": True, "text_cfg": TEXT | {"no_causal_mask": True}})
    assert prompts.last_seen(model, torch.ones(2, 77, dtype=torch.long)) is None


@pytest.mark.parametrize("pooling", [{}, {"pool_type": "eos", "eos_id": 49407}])
@pytest.mark.parametrize("custom_text", [True, False])
def test_cut_prompts_embed_as_whole_ones_in_every_causal_tower(pooling, custom_text):
    """Pooled at the highest id or at the id that the tower names; in the model or in a tower of its own."""
    model = _random_model(custom_text=custom_text, text_cfg=TEXT | pooling).eval()
    tokens = open_clip.SimpleTokenizer()(["a cat", "a photo of a dog, asleep"])
    eot = prompts.last_seen(model, tokens)
    cut = prompts.Prompts(tokens[:, : int(eot.max()) + 1], eot)
    with torch.no_grad():
        difference = prompts.encode_text(model, cut) - model.encode_text(tokens, normalize=True)

    assert cut.tokens.shape[1] < 12
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.nightly] if n == "SigLIP" else []) for n in SMALL]
)
def test_the_default_preset_learns_on_every_kind_of_text_tower(tmp_path, name):
    """Steps in which every term of the objective takes part, on matrices and on rows of tokens."""
    clip = load_clip(f"local-dir:{write_model(tmp_path / 'model', SMALL[name])}")
    adaptation = adapt(
        clip, task_for(clip), preset("default").with_overrides(steps=2, rank=2, names_per_step=4)
    )

    assert adaptation.delta_norm > 0
    assert {site.split(".")[0] for site in adaptation.ranks} == {"text"}
    assert adaptation.tokens > 0
