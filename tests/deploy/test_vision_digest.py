"""Equal vision towers have equal digests, whatever else of a version differs."""

import shutil

import numpy as np
import pytest

from deploy.errors import VerifyError
from deploy.manifest import WEIGHTS_NAME
from deploy.vision_digest import is_same_tower, vision_digest
from deploy.weights import read_layout


def change(directory, key):
    """Another last byte of one tensor."""
    path = directory / WEIGHTS_NAME
    offset, length = read_layout(path)[key]
    content = bytearray(path.read_bytes())
    content[offset + length - 1] ^= 1
    path.write_bytes(content)


def test_a_text_tensor_changes_nothing_and_every_vision_tensor_everything(version_dir, tmp_path):
    """Down to the last byte of its first and last tensor."""
    copy = tmp_path / "version"
    shutil.copytree(version_dir, copy)
    before = vision_digest(version_dir)
    keys = sorted(read_layout(copy / WEIGHTS_NAME))
    vision = [key for key in keys if key.startswith("visual.") and "num_batches" not in key]

    assert vision_digest(copy) == before
    change(copy, next(key for key in keys if key.startswith("token_embedding")))
    assert vision_digest(copy) == before
    assert is_same_tower(copy, version_dir)
    for key in (vision[0], vision[-1]):
        change(copy, key)
        assert vision_digest(copy) != before
        assert not is_same_tower(copy, version_dir)
        change(copy, key)
    assert vision_digest(copy) == before


def test_a_version_cut_short_is_named(version_dir, tmp_path):
    """Rather than hashed as far as it goes."""
    copy = tmp_path / "version"
    shutil.copytree(version_dir, copy)
    with (copy / WEIGHTS_NAME).open("r+b") as file:
        file.truncate(int(np.median([offset for offset, _ in read_layout(copy / WEIGHTS_NAME).values()])))
    with pytest.raises(VerifyError, match="version: the vision tower cannot be read"):
        vision_digest(copy)
