"""Grade versions on exam images, through ONNX Runtime, as clients will ask them. No torch.

Always over the union of all known names, the new ones included: that is what a deployed model faces.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from daemon.batch import Batch
from daemon.errors import BatchError, WorkerError
from daemon.exam_embeddings import Memory, Rows
from daemon.exams import load_exams
from daemon.pixels import blaming
from daemon.report import ExamResult
from deploy.decode import read_image
from deploy.manifest import ClassEntry, load_classes
from deploy.preprocess import Preprocessing, decode_image
from deploy.runtime import LoadedVersion
from deploy.vision_digest import is_same_tower, vision_digest

_CHUNK = 64  # images in memory at a time, of the model's size: whatever the number of exams
_KEPT_BYTES = 64 << 20  # of images that are not decoded again for the next version; 1300 of bundled's

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Sheet:
    """One batch's exam: the directory that it lies in, files and the keys of their right answers."""

    batch: str
    directory: Path
    files: tuple[Path, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Grades:
    """What one version answered: per exam the embeddings (images, dim) and the row chosen (images,)."""

    embeddings: dict[str, Float32]
    answers: dict[str, Int64]
    names: Float32  # (classes, dim)
    keys: tuple[str, ...]  # of the classes

    def right(self, sheet: Sheet) -> NDArray[np.bool_]:
        """Which answers to an exam were right, (images,)."""
        rows = {key: row for row, key in enumerate(self.keys)}
        truth = np.array([rows.get(key, -1) for key in sheet.answers], np.int64)
        right: NDArray[np.bool_] = self.answers[sheet.batch] == truth
        return right

    def cosines_with(self, later: "Grades") -> dict[str, float | None]:
        """Mean cosine between this version's embeddings and a later one's: 1 is no change at all.

        Of the names, those that both were asked about.
        """
        images = [(e * later.embeddings[batch]).sum(axis=1) for batch, e in self.embeddings.items()]
        cosines = np.concatenate(images) if images else np.empty(0)
        common = [key for key in self.keys if key in later.keys]
        rows = [[grades.keys.index(key) for key in common] for grades in (self, later)]
        texts = (self.names[rows[0]] * later.names[rows[1]]).sum(axis=1)
        return {
            "mean_image_cosine": float(cosines.mean()) if len(cosines) else None,
            "mean_text_cosine": float(texts.mean()) if len(texts) else None,
        }


@dataclass
class Examiner:
    """All exams there are: the batch's own first, then those of the batches kept before it.

    What cannot be read of those kept before is left out, of the grades of all versions alike.

    Args:
        batch: the one whose own exam comes first; None where it is taken out, or has no images any more.
        work_dir: where its images lie.
        classes: the union of known names, in the order of the version to come.
        threads: so many images are looked at at once.
        without: batches whose exams do not count.

    Attributes:
        warnings: a sentence for each exam, or image of one, that was left out.
    """

    home: Path
    batch: Batch | None
    work_dir: Path
    classes: Sequence[ClassEntry]
    threads: int
    without: frozenset[str] = frozenset()
    warnings: list[str] = field(default_factory=list, init=False)
    _is_settled: bool = field(default=False, init=False)  # a version was graded; no image may drop out now
    _kept: dict[tuple[Path, Preprocessing], Float32] = field(default_factory=dict, init=False)
    _kept_bytes: int = field(default=0, init=False)
    # Rows (dim,) by what the vision tower computes: a version with the same one would answer the same.
    _seen: dict[tuple[str, Path], Float32] = field(default_factory=dict, init=False)
    _asked: tuple[Path, str] | None = field(default=None, init=False)  # last: directory, digest of the tower
    _hashes: dict[Path, str] = field(default_factory=dict, init=False)  # sha256 of what was looked at

    def __post_init__(self) -> None:
        self._memory = Memory(self.warnings.append)
        keys = {entry.key for entry in self.classes}
        self.sheets: list[Sheet] = []
        if self.batch is not None:
            own = self.batch.split("exam")
            files = tuple(self.work_dir / image.file for image in own)
            answers = tuple(image.class_key for image in own)
            self.sheets.append(Sheet(self.batch.id, self.work_dir, files, answers))
        for directory, exam in load_exams(self.home, self.warnings.append):
            # A name that left with a roll-back cannot be answered; its images wait until it is back.
            known = [image for image in exam.images if image.class_key in keys]
            if known and exam.batch not in {self._own, *self.without}:
                files = tuple(directory / image.file for image in known)
                answers = tuple(image.class_key for image in known)
                self.sheets.append(Sheet(exam.batch, directory, files, answers))

    @property
    def _own(self) -> str | None:
        return self.batch.id if self.batch is not None else None

    def grade(self, version_dir: Path, classes: Sequence[ClassEntry] | None = None) -> Grades:
        """Load one version and ask it everything; arguments and errors as of ``ask``.

        Raises:
            VerifyError: the version cannot be loaded.
        """
        with LoadedVersion(version_dir, threads=1, runs_at_once=self.threads) as version:
            return self.ask(version, classes)

    def ask(
        self,
        version: LoadedVersion,
        classes: Sequence[ClassEntry] | None = None,
        *,
        tower: str | None = None,
        before_keeping: Callable[[], None] = lambda: None,
    ) -> Grades:
        """Ask one version everything. It need not be published, but be complete, manifest.json included.

        Args:
            classes: the names to choose from; by default those of the version to come.
            tower: digest of its vision tower, where that is known.
            before_keeping: called before an answer is kept for later versions; what it raises ends all.

        Raises:
            BatchError: an image of the batch's own exam cannot be read.
            WorkerError: an image of an older exam can no longer be read; the next attempt leaves it out.
        """
        asked = self.classes if classes is None else classes
        names = _embed_names(version, asked)
        tower = tower or self._tower_of(version.directory)
        self._asked = version.directory, tower
        graded = [self._embed(version, sheet, tower, before_keeping) for sheet in self.sheets]
        self.sheets = [sheet for sheet, _ in graded if sheet.files or sheet.batch == self._own]
        self._is_settled = True
        embeddings = {sheet.batch: rows for sheet, rows in graded if sheet in self.sheets}
        answers = {batch: (e @ names.T).argmax(axis=1) for batch, e in embeddings.items() if len(e)}
        answers |= {batch: np.zeros(0, np.int64) for batch, e in embeddings.items() if not len(e)}
        return Grades(embeddings, answers, names, tuple(entry.key for entry in asked))

    def compare(self, before: Grades, after: Grades) -> list[ExamResult]:
        """Right, gained and lost per exam, the batch's own first."""
        return [self._result(sheet, before, after) for sheet in self.sheets]

    def _result(self, sheet: Sheet, before: Grades, after: Grades) -> ExamResult:
        was, now = before.right(sheet), after.right(sheet)
        return ExamResult(
            batch=sheet.batch,
            images=len(sheet.answers),
            correct_before=int(was.sum()),
            correct_after=int(now.sum()),
            gained=int((~was & now).sum()),
            lost=int((was & ~now).sum()),
        )

    def _tower_of(self, directory: Path) -> str:
        """Digest of a vision tower; mostly it is that of the version that was asked before."""
        if self._asked is not None and is_same_tower(directory, self._asked[0]):
            return self._asked[1]
        return vision_digest(directory)

    def _embed(
        self, version: LoadedVersion, sheet: Sheet, tower: str, before_keeping: Callable[[], None]
    ) -> tuple[Sheet, Float32]:
        """Embeddings (images, dim), and the sheet they are of: without what had to be left out."""
        kept: list[int] = []
        dim, is_new = version.manifest.embed_dim, False
        is_known = all((tower, path) in self._seen for path in sheet.files)
        remembered = {} if is_known else self._memory.load(sheet.directory, tower, dim)
        for start in range(0, len(sheet.files), _CHUNK):
            fresh: dict[Path, Float32] = {}
            for index, path in enumerate(sheet.files[start : start + _CHUNK], start):
                try:
                    if not self._is_remembered(tower, path, sheet, remembered):
                        fresh[path] = self._pixels(path, version.preprocessing)
                except BatchError as error:
                    self._leave_out(sheet, error)
                else:
                    kept.append(index)
            if fresh:
                is_new = True
                rows = version.encode_pixels(np.stack(list(fresh.values())))
                self._seen |= {(tower, path): row for path, row in zip(fresh, rows, strict=True)}
        left = replace(
            sheet,
            files=tuple(sheet.files[index] for index in kept),
            answers=tuple(sheet.answers[index] for index in kept),
        )
        if is_new:
            before_keeping()
            # Besides what was asked now: images of a name that left for a while keep their rows.
            self._memory.save(sheet.directory, tower, {**remembered, **self._rows(left, tower)})
        none = np.zeros((0, dim), np.float32)
        return left, np.stack([self._seen[tower, path] for path in left.files]) if kept else none

    def _is_remembered(self, tower: str, path: Path, sheet: Sheet, remembered: Rows) -> bool:
        """Whether the row of an image is known; one kept earlier counts if the file is what it was then.

        Raises:
            BatchError: the image cannot be read.
        """
        if (tower, path) in self._seen:
            return True
        known = remembered.get(_name(sheet, path))
        if known is None:
            return False
        with blaming(path):
            content = read_image(path)
        sha256, row = known
        if hashlib.sha256(content).hexdigest() != sha256:
            return False
        self._check_same(path, sha256)
        self._seen[tower, path] = row
        return True

    def _pixels(self, path: Path, preprocessing: Preprocessing) -> Float32:
        """One image, (3, height, width), decoded once for all versions with this preprocessing."""
        kept = self._kept.get((path, preprocessing))
        if kept is not None:
            return kept
        with blaming(path):
            content = read_image(path)
            pixels: Float32 = preprocessing([decode_image(content)])[0]
        self._check_same(path, hashlib.sha256(content).hexdigest())
        if self._kept_bytes + pixels.nbytes <= _KEPT_BYTES:
            self._kept[path, preprocessing] = pixels
            self._kept_bytes += pixels.nbytes
        return pixels

    def _check_same(self, path: Path, sha256: str) -> None:
        """All versions are asked about the same content.

        Raises:
            BatchError: this is another content than before.
        """
        if self._hashes.setdefault(path, sha256) != sha256:
            raise BatchError(f"{path} cannot be used: it was changed between the grades of two versions")

    def _rows(self, sheet: Sheet, tower: str) -> Rows:
        return {_name(sheet, p): (self._hashes[p], self._seen[tower, p]) for p in sheet.files}

    def _leave_out(self, sheet: Sheet, error: BatchError) -> None:
        if sheet.batch == self._own:
            raise error
        if self._is_settled:
            raise WorkerError(f"{error}, though it was a moment ago") from error
        self.warnings.append(f"{error}; it is left out of the exam of {sheet.batch}")


def _name(sheet: Sheet, path: Path) -> str:
    return path.relative_to(sheet.directory).as_posix()


def _embed_names(version: LoadedVersion, asked: Sequence[ClassEntry]) -> Float32:
    """(classes, dim), as clients have them: known ones by class_embeddings.npy, the others asked.

    Embedding a name takes a fifth of what an image takes, and versions know thousands.
    """
    known = load_classes(version.directory).classes
    rows = {(entry.name, entry.template): row for row, entry in enumerate(known)}
    new = [entry for entry in asked if (entry.name, entry.template) not in rows]
    embedded = version.embed_classes([entry.name for entry in new], [entry.template for entry in new])
    every = np.concatenate([version.class_embeddings, embedded])
    rows |= {(entry.name, entry.template): row for row, entry in enumerate(new, len(known))}
    return every[[rows[entry.name, entry.template] for entry in asked]]
