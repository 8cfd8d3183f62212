"""Image packs: zips of `<split>/<class>/<file>`, as `--data` names a folder of."""

import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.decode import decode_image


def images_of(path: Path, split: str) -> list[tuple[str, str]]:
    """(class, name in the zip) of every image of a split, in the order of the zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = [name.split("/") for name in archive.namelist()]
    except FileNotFoundError:
        sys.exit(f"{path} is not there; name the folder of the image packs with --data")
    return [(part[1], "/".join(part)) for part in parts if len(part) == 3 and part[0] == split and part[2]]


def decoded(path: Path, names: Sequence[str]) -> list[Any]:
    """The images of these names in the zip."""
    with zipfile.ZipFile(path) as archive:
        return [decode_image(archive.read(name)) for name in names]
