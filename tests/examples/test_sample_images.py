"""The sample images keep within what their licences, their budget and a fair score allow."""

import hashlib
from collections import Counter

from PIL import Image
from select_images import BUDGET_BYTES, IMAGES, PARTS

FILES = sorted(path for path in IMAGES.rglob("*") if path.is_file() and path.name != "LICENSES")


def test_the_images_fit_their_budget() -> None:
    """A clone stays small."""
    assert sum(path.stat().st_size for path in FILES) <= BUDGET_BYTES


def test_the_tree_is_what_the_script_would_choose() -> None:
    """Every class the script names has the number of images it names, and nothing else is there."""
    expected = {f"{part.folder}/{name}": part.images_per_class for part in PARTS for name in part.classes}

    found = Counter(path.parent.relative_to(IMAGES).as_posix() for path in FILES)

    assert found == expected


def test_no_image_is_there_twice() -> None:
    """A held-out image that was also dropped would make the score a lie."""
    hashes = Counter(hashlib.sha256(path.read_bytes()).hexdigest() for path in FILES)

    assert [digest for digest, count in hashes.items() if count > 1] == []


def test_every_image_is_a_whole_jpeg() -> None:
    """The demo starts from good input; bad input has tests of its own."""
    for path in FILES:
        with Image.open(path) as image:
            image.load()
            assert image.format == "JPEG", path


def test_the_licences_count_the_images_they_cover() -> None:
    """LICENSES states the number of images per source, and together they are all of them."""
    text = (IMAGES / "LICENSES").read_text()
    counts = Counter(part.pack for part in PARTS for _ in part.classes for _ in range(part.images_per_class))

    stated = [line.split() for line in text.splitlines() if line.endswith((" MIT", " CC0 1.0"))]

    assert sorted(counts.values()) == sorted(int(n) for row in stated for n in row if n.isdigit())


def test_never_dropped_classes_are_in_no_drop() -> None:
    """The zero-shot score is about names the model was never taught."""
    dropped = {name for part in PARTS if part.folder.startswith("drop/") for name in part.classes}
    never = {name for part in PARTS if part.folder == "never_dropped" for name in part.classes}

    assert len(never) >= 10
    assert dropped.isdisjoint(never)


def test_every_dropped_class_has_held_out_images() -> None:
    """What is learnt can be scored on images nobody learnt from."""
    classes = {part.folder: part.classes for part in PARTS}

    for domain in ("clothing", "groceries"):
        assert classes[f"drop/{domain}"] == classes[f"heldout/{domain}"]
