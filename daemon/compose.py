"""From what a drop holds to the record of a batch: classes merged, bad files named, images split.

Reads image files, moves and writes nothing: `dynlora submit --check` runs the same code on a drop that stays.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from daemon.batch import Batch, BatchClass, BatchImage, SetAside, content_sha256, plain_name, sequence
from daemon.claim import Claim
from daemon.config import Config, InboxConfig
from daemon.errors import Stopped
from daemon.layout import ClassFolder, Layout, tell_passed_over
from daemon.pictures import Picture, examine
from daemon.split import History, split_images
from deploy.errors import ImageError
from deploy.manifest import class_key

IMAGES_DIR = "images"
_SUFFIX = re.compile(r"\.[a-z0-9]{1,5}")


@dataclass(frozen=True)
class KnownClass:
    """A class as it was first spelled, and its template."""

    name: str
    template: str


@dataclass(frozen=True)
class Known:
    """What the live version and all published manifests say; the service fills it in."""

    classes: Mapping[str, KnownClass] = field(default_factory=dict)  # by class key
    producer_ids: Mapping[str, str] = field(default_factory=dict)  # → batch id, every manifest
    contents: Mapping[str, str] = field(default_factory=dict)  # content sha256 → batch id, live lineage
    batch_ids: Sequence[str] = ()  # every manifest

    @cached_property
    def highest_seq(self) -> int:
        """The highest number of a published batch."""
        return max((sequence(name) or 0 for name in self.batch_ids), default=0)


@dataclass(frozen=True)
class Context:
    """What a drop is judged by."""

    config: Config
    known: Known = field(default_factory=Known)
    history: History = field(default_factory=History)


@dataclass
class _Class:
    """One class while it is put together from its folders."""

    name: str
    template: str
    folders: list[ClassFolder]
    pictures: dict[Path, Picture] = field(default_factory=dict)


class _Composition:
    """The work on one batch. `base` is the directory that files are named relative to."""

    def __init__(self, layouts: Sequence[Layout], base: Path, config: Config, known: Known) -> None:
        self.base, self.config, self.known = base, config, known
        self.set_aside: list[SetAside] = []
        self.warnings: list[str] = []
        self.classes: dict[str, _Class] = {}
        for layout in layouts:
            self.warnings += layout.warnings
            for path, reason in layout.set_aside:
                self.put_aside(path, reason)
            for folder in layout.folders:
                self._add_folder(folder, layout)

    def put_aside(self, path: Path, reason: str) -> None:
        name = str(path.relative_to(self.base)).encode("utf-8", "backslashreplace").decode()
        self.set_aside.append(SetAside(file=name, reason=reason))

    def _add_folder(self, folder: ClassFolder, layout: Layout) -> None:
        note = layout.note.of(folder.name)
        shown = display_name(note.name or folder.name)
        key = class_key(shown)
        if not key:
            self.put_aside(folder.path, "its name has no letters or digits; give it the name of its class")
            return
        known = self.known.classes.get(key)
        template = note.template or layout.note.template
        if key in self.classes:
            first = self.classes[key]
            first.folders.append(folder)
            self.warnings.append(
                f"{folder.name!r} and {first.folders[0].name!r} are one class, shown as {first.name!r}"
            )
            return
        if known is not None:
            self.warnings.append(f"{shown!r} exists already, as {known.name!r}; this batch adds images to it")
        self.classes[key] = _Class(
            known.name if known else shown,
            template or (known.template if known else self.config.inbox.template),
            [folder],
        )

    def take_over(self, found: Mapping[Path, Picture | str]) -> None:
        """Give every class the pictures in its folders, and set aside what is none."""
        for group in self.classes.values():
            for path in (path for folder in group.folders for path in folder.files):
                picture = found[path]
                if isinstance(picture, str):
                    self.put_aside(path, picture)
                else:
                    group.pictures[path] = picture

    def drop_doubles(self) -> None:
        """Keep each image once; an image under two classes says nothing about either."""
        keys: dict[str, set[str]] = {}
        for key, group in self.classes.items():
            for picture in group.pictures.values():
                keys.setdefault(picture.sha256, set()).add(key)
        for key, group in self.classes.items():
            first: dict[str, Path] = {}
            for path, picture in list(group.pictures.items()):
                others = keys[picture.sha256] - {key}
                if others:
                    names = " and ".join(repr(self.classes[other].name) for other in sorted(others))
                    reason = f"the same image is also in the class {names}; leave it in the right one only"
                elif picture.sha256 in first:
                    reason = f"it is a copy of {first[picture.sha256].name}, which is enough; nothing to do"
                else:
                    first[picture.sha256] = path
                    continue
                self.put_aside(path, reason)
                del group.pictures[path]

    def drop_small_classes(self) -> None:
        """Set aside the classes that have too few usable images."""
        needed = self.config.inbox.min_images_per_class
        for key, group in list(self.classes.items()):
            usable = len(group.pictures)
            if usable < needed:
                reason = too_few(usable, needed)
                if not usable and any(folder.files for folder in group.folders):
                    reason = too_few(usable, needed, found="none of its files is a usable image")
                elif not usable and (found := self._in_folders(group)):
                    told = f"it holds no usable file, {tell_passed_over(found)}"
                    reason = too_few(usable, needed, found=told)
                self._drop_class(key, reason)

    def _in_folders(self, group: _Class) -> list[tuple[Path | str, str]]:
        """What was passed over in the folders of one class."""
        folders = {str(folder.path.relative_to(self.base)) for folder in group.folders}
        return [(item.file, item.reason) for item in self.set_aside if str(Path(item.file).parent) in folders]

    def split(self, history: History) -> dict[str, str]:
        """The split of every image; classes with nothing left to learn from are set aside."""
        exam = self.config.exam
        splits = split_images(
            {key: [p.sha256 for p in group.pictures.values()] for key, group in self.classes.items()},
            history,
            exam_fraction=exam.fraction,
            tune_fraction=exam.tune_fraction,
            max_exam_images=exam.max_images_per_class,
        )
        for key, group in list(self.classes.items()):
            if not any(splits[picture.sha256] == "train" for picture in group.pictures.values()):
                self._drop_class(
                    key,
                    "all its images already grade earlier batches, so none may be learnt from; add others",
                )
        return dict(splits)

    def _drop_class(self, key: str, reason: str) -> None:
        for folder in self.classes.pop(key).folders:
            self.put_aside(folder.path, reason)


def examine_all(
    layouts: Sequence[Layout],
    config: InboxConfig,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    told: Callable[[int, int], None] = lambda _, __: None,
) -> dict[Path, Picture | str]:
    """Read every file of every class folder: a usable image, or why it is none.

    Args:
        should_stop: asked between two files.
        told: called after each file with how many are done, and of how many.

    Raises:
        Stopped: `should_stop` said so.
    """
    paths = [path for layout in layouts for folder in layout.folders for path in folder.files]
    found: dict[Path, Picture | str] = {}
    for number, path in enumerate(paths, 1):
        if should_stop():
            raise Stopped("intake was asked to stop; the drop is read again at the next start")
        try:
            found[path] = examine(path, config)
        except ImageError as error:
            found[path] = error.reason
        told(number, len(paths))
    return found


def compose(
    claim: Claim,
    layouts: Sequence[Layout],
    *,
    base: Path,
    context: Context,
    found: Mapping[Path, Picture | str] | None = None,
) -> Batch:
    """The record of the batch that these layouts make. Without classes where nothing is usable.

    Args:
        found: what `examine_all` said of their files, where they were read before.
    """
    work = _Composition(layouts, base, context.config, context.known)
    work.take_over(examine_all(layouts, context.config.inbox) if found is None else found)
    work.drop_doubles()
    work.drop_small_classes()
    splits = work.split(context.history)
    folders = _folder_names(work.classes)
    images = [
        BatchImage.model_validate(
            {
                "file": f"{IMAGES_DIR}/{folders[key]}/{picture.sha256[:24]}{_suffix(path)}",
                "origin": str(path.relative_to(base)),
                "class_key": key,
                "sha256": picture.sha256,
                "width": picture.width,
                "height": picture.height,
                "split": splits[picture.sha256],
            }
        )
        for key, group in work.classes.items()
        for path, picture in group.pictures.items()
    ]
    classes = [
        BatchClass(
            name=group.name,
            key=key,
            template=group.template,
            folder=folders[key],
            is_new=key not in context.known.classes,
        )
        for key, group in work.classes.items()
    ]
    notes = [layout.note for layout in layouts]
    return Batch(
        id=claim.id,
        seq=claim.seq,
        slug=claim.slug,
        kind=claim.kind,
        producer_id=next((note.id for note in notes if note.id), None),
        submitter=next((note.submitter for note in notes if note.submitter), claim.submitter),
        received_at=claim.received_at,
        content_sha256=content_sha256((image.class_key, image.sha256) for image in images),
        classes=classes,
        images=images,
        set_aside=work.set_aside,
        warnings=[*claim.warnings, *work.warnings],
    )


def too_few(usable: int, needed: int, *, found: str | None = None) -> str:
    """Why a class with so few usable images is set aside, and what to do."""
    plain = f"it has {usable} usable image{'' if usable == 1 else 's'}" if usable else "it holds no file"
    return (
        f"{found or plain}; a class needs at least {needed} (inbox.min_images_per_class): "
        f"add images and drop the folder again"
    )


def display_name(name: str) -> str:
    """A class name as it is shown: as spelled, without runs of white space or decomposed letters."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def _folder_names(keys: Mapping[str, object]) -> dict[str, str]:
    """A folder for each class that is safe in any path and unique in the batch."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for key in keys:
        plain = plain_name(key)[:40].rstrip("-") or "class"
        count = 1
        while (name := plain if count == 1 else f"{plain}-{count}") in taken:
            count += 1
        taken.add(name)
        names[key] = name
    return names


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    return suffix if _SUFFIX.fullmatch(suffix) else ""
