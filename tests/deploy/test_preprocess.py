"""Preprocessing: bit by bit the same values as open_clip's own transform."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from deploy import preprocess
from deploy.errors import ImageError, VerifyError
from deploy.preprocess import Preprocessing, decode_image
from tests.deploy.pictures import encoded, grey_16, picture

CONFIGS = {
    "ViT-B-16": {"size": 224},
    "tiny": {"size": 64, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)},
    "bilinear": {"size": (64, 64), "interpolation": "bilinear"},
    "wide": {"size": (48, 96)},
    "tall-bilinear": {"size": (96, 40), "interpolation": "bilinear"},
    "squash": {"size": 64, "resize_mode": "squash"},
    "longest": {"size": 64, "resize_mode": "longest", "fill_color": 7},
}
ODD_SIZES = [(1, 1), (1, 2), (1, 97), (97, 1), (400, 1), (3, 2), (63, 65), (64, 64), (65, 64), (224, 223)]
ODD_SIZES += [(641, 479), (479, 641), (900, 7), (7, 900), (127, 31)]


def both(image: Image.Image, **cfg: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return (open_clip's, ours) for one RGB image."""
    cfg_object = PreprocessCfg(**cfg)
    ours = Preprocessing.from_open_clip_cfg(dataclasses.asdict(cfg_object))([image])[0]
    return image_transform_v2(cfg_object, is_train=False)(image).numpy(), ours


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_open_clip_on_every_odd_size(name: str) -> None:
    """Every value is the same float32 as open_clip's, for each resize mode, down to 1×1."""
    worst = 0.0
    for width, height in ODD_SIZES:
        if name == "longest" and 64 * min(width, height) / max(width, height) < 0.5:
            continue  # open_clip itself fails there: a side is rounded to 0
        expected, found = both(picture(width, height), **CONFIGS[name])
        assert expected.shape == found.shape
        worst = max(worst, float(np.abs(expected - found).max()))

    print(f"{name}: max |difference| {worst} over {len(ODD_SIZES)} sizes")
    assert worst == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 90), st.integers(1, 90))
def test_equals_open_clip_on_any_size(width: int, height: int, target_height: int, target_width: int) -> None:
    """No combination of picture and model size makes a difference."""
    expected, found = both(picture(width, height), size=(target_height, target_width))

    assert np.array_equal(expected, found)


def test_longest_survives_pictures_that_open_clip_cannot_resize() -> None:
    """Where open_clip would round a side to 0 pixels, one is kept."""
    (found,) = Preprocessing((64, 64), (0.5,) * 3, (0.5,) * 3, resize_mode="longest")([picture(1, 400)])

    assert found.shape == (3, 64, 64)


def test_the_window_of_an_extremely_long_picture_differs_by_at_most_a_grey_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Computing only what the crop keeps moves no value by more than 1/255."""
    model, worst = Preprocessing((64, 64), (0.0,) * 3, (1.0,) * 3), 0.0
    for width, height in [(5000, 2), (3, 4001), (1, 999), (2000, 37)]:
        image = picture(width, height)
        whole = model([image])
        with monkeypatch.context() as patch:
            patch.setattr(preprocess, "_MAX_RESIZED_PIXELS", 1)
            worst = max(worst, float(np.abs(model([image]) - whole).max()))

    print(f"window: max |difference| {worst * 255:.3g} grey levels")
    assert worst <= 1.01 / 255


def test_an_extremely_long_picture_needs_little_memory() -> None:
    """3,000,000×1 pixels, which would be 36 GB on the way, pass in a process that may have 2 GB."""
    script = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from PIL import Image
from deploy.preprocess import Preprocessing
pixels = Preprocessing((64, 64), (0, 0, 0), (1, 1, 1))([Image.new("RGB", (3_000_000, 1), (255, 0, 0))])
assert pixels.shape == (1, 3, 64, 64) and (pixels[0, 0] == 1).all() and (pixels[0, 1:] == 0).all()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", CONFIGS)
def test_config_file_reads_back_and_says_the_same_to_hugging_face(name: str, tmp_path: Path) -> None:
    """preprocessor_config.json restores the preprocessing, and has the keys of CLIPImageProcessor."""
    model = Preprocessing.from_open_clip_cfg(dataclasses.asdict(PreprocessCfg(**CONFIGS[name])))
    model.save(tmp_path / "preprocessor_config.json")
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())

    assert model == Preprocessing.load(tmp_path / "preprocessor_config.json")
    assert config["image_processor_type"] == "CLIPImageProcessor"
    assert list(model.mean) == config["image_mean"]
    assert {"height": model.size[0], "width": model.size[1]} == config["crop_size"]


def test_reads_a_config_that_hugging_face_wrote(tmp_path: Path) -> None:
    """The file of openai/clip-vit-base-patch32, as published, gives open_clip's own numbers."""
    path = tmp_path / "preprocessor_config.json"
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    path.write_text(
        json.dumps(
            {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3}
            | {"feature_extractor_type": "CLIPFeatureExtractor", "image_mean": mean, "image_std": std}
            | {"size": 224}
        )
    )

    assert Preprocessing.load(path) == Preprocessing.from_open_clip_cfg(dataclasses.asdict(PreprocessCfg()))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"size": 0}', '{"crop_size": "x"}'])
def test_a_broken_config_is_named(content: str, tmp_path: Path) -> None:
    """The error names the file and what to do."""
    path = tmp_path / "preprocessor_config.json"
    path.write_text(content)

    with pytest.raises(VerifyError, match=r"preprocessor_config\.json cannot be used.*again"):
        Preprocessing.load(path)


def test_only_decoded_images_are_accepted() -> None:
    """A picture that is not RGB is refused rather than converted in another way than decode_image does."""
    with pytest.raises(ImageError, match="found mode RGBA"):
        Preprocessing((8, 8), (0,) * 3, (1,) * 3)([picture(9, 9, "RGBA")])


def test_every_kind_of_file_gives_the_same_values_as_open_clip() -> None:
    """From the decoded RGB on, all modes are equal to open_clip's transform, bit by bit."""
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "grayscale": encoded(picture(93, 71, "L")),
        "16 bit": encoded(Image.fromarray(grey_16())),
        "palette": encoded(picture(93, 71).quantize(16), transparency=3),
        "RGBA": encoded(picture(93, 71, "RGBA")),
        "LA": encoded(picture(93, 71, "LA")),
        "CMYK": encoded(picture(93, 71, "CMYK"), "JPEG"),
        "EXIF": encoded(picture(93, 71), "JPEG", exif=exif),
        "gif": encoded(picture(93, 71).quantize(200), "GIF"),
        "webp": encoded(picture(93, 71, "RGBA"), "WEBP"),
        "bmp": encoded(picture(93, 71), "BMP"),
        "bilevel": encoded(picture(93, 71, "L").convert("1")),
    }
    for name, data in files.items():
        expected, found = both(decode_image(data), size=64)
        print(f"{name}: max |difference| {np.abs(expected - found).max()}")
        assert np.array_equal(expected, found), name
