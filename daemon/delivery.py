"""Carry out batch.json: bring its images from where they lay to images/, as often as it takes.

What was checked may be gone when it is to be moved, for whoever dropped it may still hold its folder. Then
the record is changed to what is left; the others are learnt.
"""

import errno
import os
import stat
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from daemon.batch import BATCH_FILE, Batch, BatchImage, SetAside, content_sha256
from daemon.compose import too_few
from deploy import atomic, disk

_MANY = 256  # files
_GONE = "it disappeared after it was checked and before it could be moved; send it again"


def flush(directory: Path, told: Callable[[int, int], None] = lambda _, __: None) -> None:
    """Bring everything below `directory` to the disk, but for what may not be opened or left meanwhile.

    Args:
        told: called now and then with how many files are done, and of how many.
    """
    tree = [(Path(folder), names) for folder, _, names in os.walk(directory, topdown=False)]
    files = [folder / name for folder, names in tree for name in names]

    def tell(done: int) -> None:
        if done % _MANY == 1:
            told(done, len(files))

    atomic.flush_each(files, _flush_file, tell)
    atomic.flush_each([folder for folder, _ in tree], _flush_folder)


def _flush_file(file: Path) -> None:
    if not file.is_symlink() and file.is_file():
        with suppress(PermissionError, FileNotFoundError):
            atomic.fsync_file(file)


def move_images(
    record: Batch, directory: Path, *, min_images: int, told: Callable[[int, int], None] = lambda _, __: None
) -> Batch:
    """Move every image to its place; returns the record, rewritten on disk where images were gone.

    Harmless to repeat. The files themselves must have been flushed; their new names are when this returns.

    Args:
        told: called now and then with how many images are moved, and of how many.

    Raises:
        OSError: the spool failed.
    """
    while True:
        record = _leave_out_gone(record, directory, min_images)
        folders = {Path(image.file).parent for image in record.images}
        arrivals = [directory / folder for folder in folders]
        for arrival in arrivals:
            disk.make_dirs(arrival)
        above = {directory / parent for folder in folders for parent in folder.parents}
        atomic.flush_each([*above], _flush_folder)
        try:
            for number, image in enumerate(record.images):
                _move_or_copy(directory / image.origin, directory / image.file)
                if number % _MANY == 0:
                    told(number, len(record.images))
        except FileNotFoundError:
            if not _gone(record, directory):
                raise
            continue
        # Where images arrived before where they left: after a power cut no name may be gone from both.
        atomic.flush_each(arrivals, _flush_folder)
        others = {Path(name) for name, _, _ in os.walk(directory)}.difference(arrivals)
        atomic.flush_each([*others], _flush_folder)
        return record


def _leave_out_gone(record: Batch, directory: Path, min_images: int) -> Batch:
    gone = _gone(record, directory)
    if not gone:
        return record
    rest = without(record, gone, min_images=min_images)
    kept = {image.file for image in rest.images}
    for image in record.images:  # of a class that became too small: set aside where the record names it
        if image.file not in kept and (directory / image.file).exists():
            atomic.make_dir((directory / image.origin).parent)
            atomic.rename(directory / image.file, directory / image.origin)
    atomic.write_file(directory / BATCH_FILE, rest.to_json().encode())
    return rest


def _gone(record: Batch, directory: Path) -> list[BatchImage]:
    base = str(directory)
    return [
        image
        for image in record.images
        if not os.path.exists(f"{base}/{image.file}")  # noqa: PTH110 - 100,000 Path objects take longer
        and not _is_file(f"{base}/{image.origin}")
    ]


def without(record: Batch, gone: Collection[BatchImage], *, min_images: int) -> Batch:
    """The record of what is left when these images are gone. Pure."""
    lost = {image.file for image in gone}
    aside = [SetAside(file=image.origin, reason=_GONE) for image in gone]
    images: list[BatchImage] = []
    classes = []
    by_class: dict[str, list[BatchImage]] = {}
    for image in record.images:
        by_class.setdefault(image.class_key, []).append(image)
    for entry in record.classes:
        of_class = by_class.get(entry.key, [])
        left = [image for image in of_class if image.file not in lost]
        if len(left) >= min_images and any(image.split == "train" for image in left):
            classes.append(entry)
            images += left
            continue
        reason = too_few(len(left), min_images)
        if len(left) >= min_images:
            reason = "none of the images left in it may be learnt from; add images and drop the folder again"
        folders = sorted({str(Path(image.origin).parent) for image in of_class})
        aside += [SetAside(file=folder, reason=reason) for folder in folders]
    changes = {
        "classes": classes,
        "images": images,
        "set_aside": [*record.set_aside, *aside],
        "content_sha256": content_sha256((image.class_key, image.sha256) for image in images),
    }
    return record.model_copy(update=changes)


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _flush_folder(folder: Path) -> None:
    with suppress(PermissionError, FileNotFoundError):
        atomic.fsync_dir(folder)


def _move_or_copy(source: Path, target: Path) -> None:
    if target.exists():
        return
    try:
        disk.rename(source, target)
    except OSError as error:
        if error.errno not in {errno.EACCES, errno.EPERM}:
            raise
        # A folder inside the drop belongs to somebody else and keeps its entries: the image is copied.
        atomic.write_file(target, source.read_bytes())
