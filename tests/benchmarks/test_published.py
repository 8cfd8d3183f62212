"""MTIL and X-TAIL on miniature trees of the published layout: order, label spaces, and what is missing."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.published.domains import DOMAINS, MTIL, XTAIL, DomainPack
from benchmarks.published.protocol import main
from deploy.preprocess import Preprocessing
from dynlora.clip import load_clip


def _paint(path, rng, label):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = rng.integers(0, 128, (40, 50, 3), dtype=np.uint8)
    values[..., label] += 127
    Image.fromarray(values).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Every data set with two classes, three training and two test images each."""
    root = tmp_path_factory.mktemp("root")
    rng = np.random.default_rng(0)
    for name, domain in DOMAINS.items():
        folder = root / domain.folder
        listed = {"train": [], "val": [], "test": []}
        for split, count in (("train", 3), ("test", 2)):
            for label in range(2):
                for index in range(count):
                    shown = f"{name.lower()}_kind {label}"
                    if domain.split:
                        image = (
                            f"{label}/{split}{index}.jpg"
                            if domain.split != "variants"
                            else f"{label}{split}{index}"
                        )
                        suffix = ".jpg" if domain.split == "variants" else ""
                        _paint(folder / domain.images / f"{image}{suffix}", rng, label)
                        listed[split].append([image, label, shown])
                    else:
                        _paint(folder / split / shown / f"{index}.png", rng, label)
        if domain.split == "variants":
            for split, entries in listed.items():
                lines = [f"{image} {shown}" for image, _, shown in entries]
                (folder / f"images_variant_{split}.txt").write_text("\n".join(lines) + "\n")
        elif domain.split:
            (folder / domain.split).write_text(json.dumps(listed))
    return root


@pytest.fixture(scope="module")
def preprocessing():
    """The bundled model's."""
    return Preprocessing.from_open_clip_cfg(load_clip().preprocess_cfg)


@pytest.mark.parametrize("name", MTIL)
def test_every_data_set_is_read_in_its_own_layout(root, preprocessing, name):
    """Two classes with spaces instead of underscores, shots by seed, all test images with their labels."""
    pack = DomainPack(root, name, preprocessing)
    shots, held_out = pack.train(0, shots=2, held_out=5)
    test = pack.test()

    assert len(pack.classes) == 2
    assert pack.template.format(pack.classes[0]) != pack.template
    assert shots.labels.tolist() == [0, 0, 1, 1]
    assert held_out.labels.tolist() == [0, 1]
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert [part.shape[0] for part in test.parts(3)] == [3, 1]
    brightest = next(test.parts(4)).mean((2, 3)).argmax(1)
    assert brightest.tolist() == test.labels.tolist()


def test_the_orders_are_the_published_ones():
    """MTIL's eleven in alphabetical order; X-TAIL leaves CIFAR-100 out."""
    assert len(MTIL) == 11
    assert (MTIL[0], MTIL[2], MTIL[-1]) == ("Aircraft", "CIFAR100", "SUN397")
    assert [name for name in MTIL if name not in XTAIL] == ["CIFAR100"]


def test_a_protocol_runs_from_end_to_end_and_shows_the_published_figures(root, tmp_path, capsys):
    """Our rows stand beside the paper's; a second call reads the cells and says the same."""
    arguments = [
        *("--root", str(root), "--model", "bundled", "--methods", "zero-shot", "paper", "--shots", "1"),
        *("--steps", "1", "--batch-size", "2", "--results", str(tmp_path)),
    ]
    main("xtail", arguments)
    first = (tmp_path / "xtail.md").read_text()
    document = json.loads((tmp_path / "xtail.json").read_text())
    main("xtail", arguments)

    assert (tmp_path / "xtail.md").read_text() == first
    assert "| CoDyRA, published | 63.2 | 71.3 | 79.2 |" in first
    assert "| paper, ours, 1 seeds |" in first
    assert np.array(document["cells"][1]["union"]).shape == (10, 10)


def test_a_data_set_that_is_missing_is_named(tmp_path, preprocessing):
    """One sentence with the data set and the folder that was looked for."""
    with pytest.raises(SystemExit, match=r"DTD: .*dtd is not there"):
        DomainPack(tmp_path, "DTD", preprocessing)
