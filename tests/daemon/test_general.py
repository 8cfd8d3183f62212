"""What a home knows of images in general: real images, real models."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from daemon.errors import ConfigError
from daemon.general import MOMENTS_NAME, image_moments, keep_bundled, keep_of_folder
from deploy.preprocess import Preprocessing, decode_image
from dynlora.clip import load_clip
from dynlora.errors import ModelError

IMAGES = Path(__file__).parents[2] / "examples" / "demo" / "images"


def test_a_folder_of_images_becomes_two_moments_of_what_the_model_answers_to_them(tmp_path):
    """Files that are no images are passed over, folders within are searched; progress reaches the end."""
    clip, told = load_clip(), []
    shutil.copytree(IMAGES, tmp_path / "images")
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no image")
    others = sum(path.is_file() and path.suffix not in {".jpg", ".png"} for path in IMAGES.rglob("*"))
    found = keep_of_folder(tmp_path, clip, tmp_path / "images", told=lambda *progress: told.append(progress))
    moments, digest = image_moments(tmp_path, 128)
    paths = sorted(p for p in IMAGES.rglob("*") if p.suffix in {".jpg", ".png"})
    pixels = Preprocessing.from_open_clip_cfg(clip.preprocess_cfg)([decode_image(path) for path in paths])
    with torch.no_grad():
        embeddings = F.normalize(clip.model.visual(torch.from_numpy(pixels)), dim=-1)

    assert found == len(paths)
    assert digest == hashlib.sha256((tmp_path / MOMENTS_NAME).read_bytes()).hexdigest()
    assert told[-1] == (len(paths) + others + 1,) * 2
    assert torch.allclose(moments.mean, embeddings.mean(0), atol=1e-4)
    assert torch.allclose(moments.covariance, torch.cov(embeddings.T), atol=1e-4)


def test_a_folder_with_too_few_images_is_refused_with_the_number_it_takes(tmp_path):
    """Before anything is kept."""
    (tmp_path / "few").mkdir()
    (tmp_path / "none").mkdir()
    shutil.copy(next(IMAGES.rglob("*.jpg")), tmp_path / "few" / "one.jpg")
    with pytest.raises(ConfigError, match=r"few holds 1 images that can be read; expected at least 256"):
        keep_of_folder(tmp_path, load_clip(), tmp_path / "few", told=lambda *_: None)
    with pytest.raises(ConfigError, match=r"none holds 0 images"):
        keep_of_folder(tmp_path, load_clip(), tmp_path / "none", told=lambda *_: None)

    assert image_moments(tmp_path, 128) == (None, None)


def test_the_bundled_model_brings_its_own_and_another_models_are_refused(tmp_path):
    """By their width."""
    keep_bundled(tmp_path)

    assert (tmp_path / MOMENTS_NAME).exists()
    assert image_moments(tmp_path, 128)[0] is not None
    with pytest.raises(ModelError, match="width 128; the model's embeddings have 512"):
        image_moments(tmp_path, 512)
