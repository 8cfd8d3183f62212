"""The recipe of the bundled model runs from nothing but images, and goes on where it was stopped."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import names
import open_clip
import pytest
import torch
from images import coarsen, crop, jittered, paste, random_boxes
from wordnet import WordNet

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "examples" / "pretrain"
# Lines of WordNet's data.noun: offset, file, type, words, pointers, gloss. Two spaces begin its licence.
NOUNS = """\
  1 This software and database is being provided to you, the LICENSEE, by
00001740 03 n 01 entity 0 000 | that which is perceived
00001930 03 n 01 physical_entity 0 001 @ 00001740 n 0000 | an entity that has physical existence
00002137 03 n 01 idea 0 001 @ 00001740 n 0000 | a general concept
00003000 03 n 01 animal 0 001 @ 00001930 n 0000 | a living organism; "an animal ran"
00004000 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 001 @ 00003000 n 0000 | a member of the genus Canis
00005000 05 n 01 cat 0 001 @ 00003000 n 0000 | feline mammal
"""


def train(work: Path, *, epochs: int) -> list[float]:
    """The test-sized command; its losses in the order they were printed."""
    done = subprocess.run(
        [
            *(sys.executable, RECIPE / "pretrain.py", "quick", "--work", work, "--data"),
            *(ROOT / "examples/demo/images", "--split", "drop/clothing", "--batch", "32", "--threads", "1"),
            *("--epochs", str(epochs)),
        ],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"own ([\d.]+)", done.stdout)]


def test_a_minute_from_scratch_lowers_the_loss_and_writes_a_model_that_open_clip_loads(
    tmp_path: Path,
) -> None:
    """Started again, it goes on from its checkpoint instead of from the beginning."""
    losses = train(tmp_path, epochs=8)
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.05
    assert train(tmp_path, epochs=8) == []

    model = open_clip.CLIP(**json.loads((RECIPE / "small-clip-64.json").read_text()))
    result = open_clip.load_checkpoint(model, str(tmp_path / "open_clip_model.safetensors"), strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


@pytest.fixture
def wordnet(tmp_path: Path) -> WordNet:
    """Six nouns."""
    (tmp_path / "data.noun").write_text(NOUNS)
    return WordNet(tmp_path / "data.noun")


def test_wordnet_is_read_with_its_words_glosses_and_wider_meanings(wordnet: WordNet) -> None:
    """Examples in the gloss are left out; what nobody can see is no thing."""
    assert wordnet["00004000"].lemmas == ("dog", "domestic dog", "Canis familiaris")
    assert wordnet["00003000"].gloss == "a living organism"
    assert list(wordnet.ancestors("00004000")) == ["00003000", "00001930", "00001740"]
    assert wordnet.things() == ["00001930", "00003000", "00004000", "00005000"]


def test_wordnet_that_is_not_installed_is_said_in_a_sentence(tmp_path: Path) -> None:
    """With what to install."""
    with pytest.raises(SystemExit, match="wordnet-base"):
        WordNet(tmp_path / "data.noun")


def test_captions_are_shared_out_among_name_synonyms_and_wider_words(wordnet: WordNet) -> None:
    """Each row sums to 1 and the class's own name has the largest part; too wide words are not used."""
    found = names.from_wordnet(wordnet, {"00004000": "dog", "00005000": None})
    share = dict(zip(found.names, found.share[0], strict=True))

    assert found.own == ["dog", "cat"]
    assert share["dog"] == max(share.values())
    assert share["domestic dog"] == pytest.approx(share["Canis familiaris"])
    assert share["cat"] == 0
    assert "entity" not in found.names
    assert found.share.sum(axis=1) == pytest.approx(1)


def test_crops_stay_inside_and_the_whole_image_comes_back_as_it_was() -> None:
    """Jittered boxes too."""
    generator = torch.Generator().manual_seed(0)
    boxes = jittered(random_boxes(500, least=0.35, generator=generator), 0.1, generator)
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=generator)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(2, 4)

    assert boxes.min() >= 0
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 1 + 1e-6
    assert boxes[:, 2:].min() > 0.1
    assert torch.allclose(crop(pixels, whole, 8), pixels / 255, atol=1e-5)
    mirrored = crop(pixels, whole, 8, torch.tensor([True, False]))
    assert torch.allclose(mirrored[0].flip(-1), pixels[0] / 255, atol=1e-5)


def test_a_pasted_image_says_how_much_of_it_is_its_own() -> None:
    """The share is that of the pixels."""
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 16, 16)
    mixed, order, own = paste(images, torch.Generator().manual_seed(3))
    row = next(i for i in range(4) if order[i] != i)

    assert (mixed[row] == row).float().mean().item() == pytest.approx(own)
    assert ((mixed[row] == row) | (mixed[row] == order[row])).all()


def test_a_coarsened_image_keeps_its_size_and_colours_and_loses_its_detail() -> None:
    """A plain one stays as it is; a fine pattern becomes grey."""
    plain = torch.full((1, 3, 16, 16), 0.25)
    fine = (torch.arange(16) % 2).float().expand(1, 3, 16, 16)

    assert torch.allclose(coarsen(plain, 0.6), plain, atol=1e-6)
    assert coarsen(fine, 0.5).shape == fine.shape
    assert (coarsen(fine, 0.5) - 0.5).abs().max() < 0.1


def test_open_clip_alone_answers_about_an_image_pack(tmp_path: Path) -> None:
    """The printed share is that of the test split, far above chance for what it can tell apart."""
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as pack:
        for folder, name in (("clothing/shoes", "shoes"), ("groceries/tomato", "tomato")):
            for number, file in enumerate(sorted((ROOT / "examples/demo/images/heldout" / folder).iterdir())):
                pack.write(file, f"test/{name}/{number}.jpg")
    done = subprocess.run(
        [sys.executable, RECIPE / "zero_shot.py", tmp_path / "pack.zip"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    share, count = re.search(r"([\d.]+) % of (\d+) images, 2 names", done.stdout).groups()
    assert float(share) > 60
    assert int(count) > 20
