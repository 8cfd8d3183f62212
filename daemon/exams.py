"""`exams/<id>/`: the exam images of published batches, which grade every later candidate.

Nothing here is ever trained or tuned on; no learner code opens this directory. An exam is written whole or
not at all, and is never changed afterwards, apart from what versions answered to it (daemon.exam_embeddings).
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from daemon.batch import Batch, BatchImage
from daemon.exam_embeddings import EMBEDDINGS_NAME
from deploy import atomic, disk

EXAM_FILE = "exam.json"


class ExamImage(BaseModel):
    """One image: `file` relative to the exam's directory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    class_key: str
    sha256: str


class Exam(BaseModel):
    """exam.json: one batch's exam."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: str
    images: tuple[ExamImage, ...]


def exam_dir(home: Path, batch: str) -> Path:
    """Where a batch's exam lies."""
    return home / "exams" / batch


def keep_exam(home: Path, batch: Batch, batch_dir: Path, *, max_images_per_class: int) -> Path | None:
    """Copy a batch's exam images to exams/<id>/; the directory appears in one rename. Harmless to repeat.

    Args:
        max_images_per_class: what is over it is left out, by content: the same in any order of arrival.

    Returns:
        the exam's directory, or None where the batch has no exam images.
    """
    chosen = _capped(batch.split("exam"), max_images_per_class)
    target = exam_dir(home, batch.id)
    if not chosen or target.exists():
        return target if chosen else None
    atomic.make_dir(target.parent)
    staging = target.with_name(f"{atomic.TEMPORARY_PREFIX}{batch.id}")
    atomic.remove_tree(staging)
    images = []
    for image in chosen:
        copy = staging / image.file
        disk.make_dirs(copy.parent)
        disk.copy(batch_dir / image.file, copy)
        images.append(ExamImage(file=image.file, class_key=image.class_key, sha256=image.sha256))
    _copy_embeddings(batch_dir, staging)
    record = Exam(batch=batch.id, images=tuple(images))
    disk.write_new(staging / EXAM_FILE, (record.model_dump_json(indent=1) + "\n").encode())
    atomic.fsync_tree(staging)
    atomic.rename(staging, target)
    return target


def _copy_embeddings(batch_dir: Path, staging: Path) -> None:
    """What the worker kept of these images goes with them; where that cannot be, they are looked at again."""
    try:
        disk.copy(batch_dir / EMBEDDINGS_NAME, staging / EMBEDDINGS_NAME)
    except OSError:
        with contextlib.suppress(OSError):  # a part is recognised as damaged
            disk.unlink(staging / EMBEDDINGS_NAME, missing_ok=True)


def load_exams(home: Path, warn: Callable[[str], None] = lambda _: None) -> Iterator[tuple[Path, Exam]]:
    """Every kept exam with its directory, oldest batch first.

    One whose exam.json is missing or damaged is passed over: it must not block every later batch.

    Args:
        warn: called with a sentence for each exam passed over.

    Raises:
        OSError: the disk or the system failed; says nothing about the exam.
    """
    folder = home / "exams"
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for name in names:
        if name.startswith("."):
            continue  # a copy cut short; its batch is finished again by recovery
        path = folder / name / EXAM_FILE
        try:
            exam = Exam.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError, PermissionError, ValidationError) as error:
            why = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
            warn(f"{path} cannot be read: {why}; this exam is left out; restore it, or remove {path.parent}")
        else:
            yield path.parent, exam


def _capped(images: list[BatchImage], limit: int) -> list[BatchImage]:
    counts: Counter[str] = Counter()
    chosen = []
    for image in sorted(images, key=lambda image: (image.class_key, image.sha256)):
        counts[image.class_key] += 1
        if counts[image.class_key] <= limit:
            chosen.append(image)
    return chosen
