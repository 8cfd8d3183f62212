"""What a home knows of images in general: real images, real models."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from daemon import general
from daemon.errors import ConfigError
from daemon.general import MOMENTS_NAME, HomeMoments, bundled_moments, home_moments, keep, moments_of_folder
from daemon.seen import SEEN_NAME, Seen
from deploy.preprocess import Preprocessing, decode_image
from dynlora.clip import load_clip
from dynlora.errors import ModelError

IMAGES = Path(__file__).parents[2] / "examples" / "demo" / "images"
OF = "f" * 64  # sha256 of some version 0's weights


def refuse(sentence):
    """For what must not be told."""
    raise AssertionError(sentence)


def asked(home, width=128, warn=refuse):
    """What a worker gets."""
    return home_moments(home, width, of=OF, warn=warn)


def test_a_folder_of_images_becomes_two_moments_of_what_the_model_answers_to_them(tmp_path):
    """Files that are no images are passed over, folders within are searched; progress reaches the end."""
    clip, told = load_clip(), []
    shutil.copytree(IMAGES, tmp_path / "images")
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no image")
    files = sum(path.is_file() for path in (tmp_path / "images").rglob("*"))
    found = moments_of_folder(clip, tmp_path / "images", told=lambda *progress: told.append(progress))
    keep(tmp_path, found, of=OF)
    moments = asked(tmp_path)
    paths = sorted(p for p in IMAGES.rglob("*") if p.suffix in {".jpg", ".png"})
    pixels = Preprocessing.from_open_clip_cfg(clip.preprocess_cfg)([decode_image(path) for path in paths])
    with torch.no_grad():
        embeddings = F.normalize(clip.model.visual(torch.from_numpy(pixels)), dim=-1)

    assert moments.sha256 == hashlib.sha256((tmp_path / MOMENTS_NAME).read_bytes()).hexdigest()
    assert moments.seen is None
    assert told[-1] == (files, files)
    assert torch.allclose(moments.general.mean, embeddings.mean(0), atol=1e-4)
    assert torch.allclose(moments.general.covariance, torch.cov(embeddings.T), atol=1e-4)


def test_files_between_the_images_do_not_push_them_out_of_the_sample(tmp_path, monkeypatch):
    """A data set often has one for each image, and names alternate: 00001.json, 00001.png, 00002.json …"""
    monkeypatch.setattr(general, "MOST_IMAGES", 260)
    for number in range(300):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:05}.png")
        (tmp_path / f"{number:05}.json").write_text(json.dumps({"label": number}))
    told = []
    moments_of_folder(load_clip(), tmp_path, told=lambda *progress: told.append(progress))

    assert told[-1] == (260, 260)


def test_a_folder_with_too_few_images_is_refused_with_the_number_it_takes(tmp_path):
    """Before anything is kept."""
    (tmp_path / "few").mkdir()
    (tmp_path / "none").mkdir()
    shutil.copy(next(IMAGES.rglob("*.jpg")), tmp_path / "few" / "one.jpg")
    (tmp_path / "few" / "one.txt").write_text("no image")
    few = r"few holds 1 images that can be read, among 2 files; expected at least 256"
    with pytest.raises(ConfigError, match=few):
        moments_of_folder(load_clip(), tmp_path / "few", told=lambda *_: None)
    with pytest.raises(ConfigError, match=r"none holds 0 images"):
        moments_of_folder(load_clip(), tmp_path / "none", told=lambda *_: None)


def test_a_home_that_knows_nothing_says_so_and_one_that_has_seen_batches_uses_these(tmp_path):
    """Beside what was made for all images, if it was; and the hash is of all that is used."""
    told = []
    assert asked(tmp_path, warn=told.append) == HomeMoments()
    assert "only this batch's own images" in told[0]
    Seen(np.ones(128, np.float32), np.eye(128, dtype=np.float32), 3, ("a",)).save(tmp_path / SEEN_NAME)
    seen = asked(tmp_path)

    assert seen.general is None
    assert torch.equal(seen.seen.mean, torch.ones(128))
    assert seen.sha256 == hashlib.sha256((tmp_path / SEEN_NAME).read_bytes()).hexdigest()
    keep(tmp_path, bundled_moments(128), of=OF)
    both, files = asked(tmp_path), (tmp_path / MOMENTS_NAME, tmp_path / SEEN_NAME)
    assert torch.equal(both.general.mean, bundled_moments(128).mean)
    assert torch.equal(both.seen.mean, torch.ones(128))
    assert both.sha256 == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def test_moments_of_another_model_are_refused(tmp_path):
    """By their width, or by the weights they were made with; and what an earlier `init` left is forgotten."""
    keep(tmp_path, bundled_moments(128), of=OF)
    with pytest.raises(ModelError, match="width 128; the model's embeddings have 512"):
        asked(tmp_path, 512)
    keep(tmp_path, bundled_moments(128), of="0" * 64)
    with pytest.raises(ModelError, match="of another model than this home began with; copy the file"):
        asked(tmp_path)
    keep(tmp_path, None, of=OF)

    assert not (tmp_path / MOMENTS_NAME).exists()


def test_moments_kept_by_an_earlier_release_do_not_say_whose_they_are_and_are_taken(tmp_path):
    """Their width is right; they were made by `init` in this home."""
    (tmp_path / MOMENTS_NAME).write_bytes(bundled_moments(128).content())

    assert torch.equal(asked(tmp_path).general.mean, bundled_moments(128).mean)
