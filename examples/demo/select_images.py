"""Rebuild examples/demo/images from the full image packs.

Run once by a maintainer; nobody needs it to run the demo or the tests, because the chosen images
are part of the repository. The choice has no random part: the files of a class are sorted by
name and every k-th is taken, so neighbouring shots of one scene are spread out, and a file whose
bytes were already chosen is passed over. Bytes are copied as they are.

    python examples/demo/select_images.py ../shared/data
"""

import argparse
import hashlib
import shutil
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

IMAGES = Path(__file__).parent / "images"
BUDGET_BYTES = 6_000_000  # all sample images together


class Part(NamedTuple):
    """One folder of images/ and where its classes come from."""

    folder: str
    pack: str
    split: str
    images_per_class: int
    classes: tuple[str, ...]


CLOTHING = ("dress", "hat", "pants", "shoes", "shorts", "t-shirt")
GROCERIES = ("carrot", "juice carton", "milk carton", "tomato", "yoghurt", "zucchini")
NEVER_DROPPED = (
    "apple", "avocado", "banana", "kiwi", "lemon", "mango",
    "melon", "mushroom", "onion", "orange", "pear", "pepper",
)  # fmt: skip
LETTERS = ("Greek handwritten letter", "Japanese handwritten letter", "Latin handwritten letter")

PARTS = (
    Part("drop/clothing", "clothing.zip", "train", 35, CLOTHING),
    Part("drop/groceries", "groceries.zip", "train", 35, GROCERIES),
    Part("heldout/clothing", "clothing.zip", "test", 24, CLOTHING),
    Part("heldout/groceries", "groceries.zip", "test", 24, GROCERIES),
    Part("never_dropped", "groceries.zip", "test", 20, NEVER_DROPPED),
    Part("letters", "omniglot_alphabets.zip", "train", 12, LETTERS),
)


def spread(names: list[str], count: int) -> Iterable[str]:
    """`count` evenly spaced names first, then the others: spares for duplicates."""
    if len(names) < count:
        sys.exit(f"{len(names)} images found where {count} are needed, near {names[:1]}")
    chosen = [names[i * len(names) // count] for i in range(count)]
    return chosen + [name for name in names if name not in set(chosen)]


def copy_class(pack: zipfile.ZipFile, part: Part, class_name: str, taken: set[str]) -> int:
    """Copy the chosen images of one class and return their size in bytes."""
    prefix = f"{part.split}/{class_name}/"
    target = IMAGES / part.folder / class_name
    target.mkdir(parents=True)
    copied_bytes = copied = 0
    for name in spread(sorted(n for n in pack.namelist() if n.startswith(prefix)), part.images_per_class):
        data = pack.read(name)
        digest = hashlib.sha256(data).hexdigest()
        if copied == part.images_per_class or digest in taken:
            continue
        taken.add(digest)
        (target / Path(name).name).write_bytes(data)
        copied_bytes += len(data)
        copied += 1
    if copied < part.images_per_class:
        sys.exit(f"{class_name}: {copied} different images, {part.images_per_class} needed")
    return copied_bytes


def main() -> None:
    """Empty images/ and fill it again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("packs", type=Path, help="folder that holds clothing.zip, groceries.zip, ...")
    packs = parser.parse_args().packs
    for folder in {part.folder.split("/")[0] for part in PARTS}:
        shutil.rmtree(IMAGES / folder, ignore_errors=True)
    taken: set[str] = set()
    total = 0
    for part in PARTS:
        with zipfile.ZipFile(packs / part.pack) as pack:
            size = sum(copy_class(pack, part, name, taken) for name in part.classes)
        print(f"{part.folder:20} {len(part.classes)} classes x {part.images_per_class}: {size:,} bytes")
        total += size
    print(f"{'total':20} {total:,} bytes of {BUDGET_BYTES:,}")
    if total > BUDGET_BYTES:
        sys.exit("the sample images are over their budget; take fewer")


if __name__ == "__main__":
    main()
