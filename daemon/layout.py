"""What a dropped folder means: which class folders it holds, and what in it is not learnt from.

Looks at names and kinds of files only; opens nothing but batch.toml. Links are never followed.

    <class>/*.jpg                  a class folder
    <batch>/<class>/*.jpg          a batch folder; loose files beside the class folders are set aside
    <batch>/batch.toml             optional: id, submitter, template, display names
"""

import os
import stat
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from daemon.config import check_template
from daemon.errors import InboxError
from daemon.plain_file import NotPlainError, open_plain
from deploy.manifest import class_key

NOTE_FILE = "batch.toml"
READY_FILE = ".ready"
SUBMITTED_FILE = ".submitted.json"
MAX_LEVELS = 64  # of folders in folders: far more than anybody means, and far from any limit of ours
_MAX_NOTE_BYTES = 1 << 20
_MOST_QUOTED = 80  # characters of what a stranger wrote, in a message
_JUNK = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found"}
_OWN_FILES = {NOTE_FILE, READY_FILE, SUBMITTED_FILE}


class ClassNote(BaseModel):
    """What batch.toml says of one class folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str | None = None  # shown instead of the folder's name
    template: str | None = None

    _template = field_validator("template")(lambda text: text and check_template(text))


class Note(BaseModel):
    """batch.toml. All optional."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str | None = None  # the producer's own key: the same one is never learnt twice
    submitter: str | None = None
    template: str | None = None  # for every class that has none of its own
    classes: dict[str, ClassNote] = {}  # by folder name, in any spelling

    _template = field_validator("template")(lambda text: text and check_template(text))

    def of(self, folder: str) -> ClassNote:
        """What it says of one folder."""
        key = class_key(folder)
        return next((note for name, note in self.classes.items() if class_key(name) == key), ClassNote())


@dataclass(frozen=True)
class ClassFolder:
    """One class folder and its files, images or not."""

    name: str
    path: Path
    files: list[Path]


@dataclass
class Layout:
    """What a drop holds. `set_aside` pairs a path with why it is not learnt from."""

    folders: list[ClassFolder] = field(default_factory=list)
    set_aside: list[tuple[Path, str]] = field(default_factory=list)
    note: Note = field(default_factory=Note)
    warnings: list[str] = field(default_factory=list)


@dataclass
class Entries:
    """One directory, sorted by name: what may be used, and what is passed over with the reason."""

    files: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    passed_over: list[tuple[Path, str]] = field(default_factory=list)


def is_junk(name: str) -> bool:
    """Whether an operating system or a file server left it there."""
    return name.casefold() in _JUNK


def is_text(name: str) -> bool:
    """Whether a file name is valid Unicode, and so can be shown, written down and found again."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_usable_name(name: str) -> bool:
    """Whether an entry of that name is looked at: valid text, not hidden, nobody's leftover."""
    return is_text(name) and not name.startswith(".") and not is_junk(name)


def is_own_file(name: str) -> bool:
    """Whether it is one of our marker files, which are neither learnt from nor told of."""
    return name in _OWN_FILES


def list_entries(directory: Path) -> Entries:
    """Sort a directory's entries into usable and passed over; our own marker files are neither."""
    entries = Entries()
    try:
        found = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        entries.passed_over.append((directory, f"it cannot be opened ({error.strerror}); correct its rights"))
        return entries
    for entry in found:
        path = Path(entry.path)
        if entry.name in _OWN_FILES:
            continue
        reason = _why_passed_over(entry)
        if reason is not None:
            entries.passed_over.append((path, reason))
        elif entry.is_dir(follow_symlinks=False):
            entries.folders.append(path)
        else:
            entries.files.append(path)
    return entries


def _why_passed_over(entry: os.DirEntry[str]) -> str | None:
    if not is_text(entry.name):
        return "its name is not valid UTF-8; rename it and send it again"
    if entry.name.startswith("."):
        return "ignored because its name starts with a dot; rename it if it was meant to be learnt"
    if is_junk(entry.name):
        return "ignored: the operating system or file server left it there, not a person"
    if entry.is_symlink():
        return "it is a link, and links are never followed; send a copy of the file itself"
    try:
        mode = entry.stat(follow_symlinks=False).st_mode
    except OSError:
        return "it disappeared while it was being read; send it again"
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return "it is neither a file nor a folder; send an image file"
    return None


def holds_files(folder: Path) -> bool:
    """Whether there is any usable file in it, at any depth.

    Raises:
        InboxError: its folders are nested too deeply to tell.
    """
    waiting = [(folder, 0)]
    while waiting:
        directory, level = waiting.pop()
        if level > MAX_LEVELS:
            raise InboxError(too_deep(folder.name))
        entries = list_entries(directory)
        if entries.files:
            return True
        waiting += [(sub, level + 1) for sub in entries.folders]
    return False


def passed_over(folder: Path) -> list[tuple[Path, str]]:
    """What lies in a folder without usable files, at any depth that counts, and why it is none of them."""
    found: list[tuple[Path, str]] = []
    waiting = [(folder, 0)]
    while waiting:
        directory, level = waiting.pop()
        entries = list_entries(directory)
        found += entries.passed_over
        waiting += [(sub, level + 1) for sub in entries.folders if level < MAX_LEVELS]
    return found


def tell_passed_over(found: Sequence[tuple[Path | str, str]]) -> str:
    """How many there are, and the first with its reason: "the 5 entries in it are passed over, ..."."""
    first, reason = found[0]
    name = Path(first).name.encode("utf-8", "backslashreplace").decode()
    if len(found) == 1:
        return f"the only entry in it is passed over: {name!r}: {reason}"
    return f"the {len(found):,} entries in it are passed over, the first of them {name!r}: {reason}"


def too_deep(name: str) -> str:
    """The sentence for folders in folders without end."""
    return (
        f"{name} has folders nested more than {MAX_LEVELS} deep; put the images into class folders directly"
    )


def kind_of(folder: Path) -> Literal["folders", "batch", "empty"]:
    """A class folder, a batch folder, or nothing to learn from (yet)."""
    entries = list_entries(folder)
    if any(holds_files(sub) for sub in entries.folders):
        return "batch"
    return "folders" if entries.files else "empty"


def read_class_folder(folder: Path, name: str | None = None) -> Layout:
    """A class folder, named after itself unless `name` is given."""
    entries = list_entries(folder)
    layout = Layout(set_aside=entries.passed_over)
    name = name or folder.name
    for sub in entries.folders:
        reason = f"it is a folder inside the class folder {name}; put its images directly into {name}"
        layout.set_aside.append((sub, reason))
    if (folder / NOTE_FILE).exists():
        reason = "batch.toml is read only in a batch folder, beside its class folders; move it there"
        layout.set_aside.append((folder / NOTE_FILE, reason))
    layout.folders.append(ClassFolder(name, folder, entries.files))
    return layout


def read_batch_folder(folder: Path, name: str | None = None) -> Layout:
    """A batch folder, called `name` in messages: its class folders and its note.

    Raises:
        InboxError: batch.toml cannot be used.
    """
    entries = list_entries(folder)
    layout = Layout(set_aside=entries.passed_over, note=read_note(folder, name))
    for file in entries.files:
        reason = "it lies beside class folders; put it into the folder of its class"
        layout.set_aside.append((file, reason))
    for sub in entries.folders:
        inner = read_class_folder(sub)
        layout.folders += inner.folders
        layout.set_aside += inner.set_aside
    if layout.folders and not any(inner.files for inner in layout.folders):
        batches = [sub.name for sub in entries.folders if holds_files(sub)]
        if batches:
            raise InboxError(
                f"{name or folder.name} holds no class folders but folders of class folders "
                f"({', '.join(batches)}); drop each of these on its own"
            )
    keys = {class_key(folder.name) for folder in layout.folders}
    layout.warnings += [
        f"batch.toml speaks of a class {name!r}, but there is no such folder beside it"
        for name in layout.note.classes
        if class_key(name) not in keys
    ]
    return layout


def read_tree(root: Path, name: str) -> Layout:
    """A folder or an unpacked archive of either kind; images at the top are of the class `name`.

    Raises:
        InboxError: batch.toml cannot be used.
    """
    if kind_of(root) != "batch":
        return read_class_folder(root, name)
    entries = list_entries(root)
    wraps = not entries.files and len(entries.folders) == 1 and not (root / NOTE_FILE).exists()
    if wraps and kind_of(entries.folders[0]) == "batch":  # packed with its own folder around it
        layout = read_batch_folder(entries.folders[0])
        layout.set_aside += entries.passed_over
        return layout
    return read_batch_folder(root, name)


def read_note(folder: Path, name: str | None = None) -> Note:
    """The batch.toml in `folder`, called `name` in messages; an empty note where there is none.

    Raises:
        InboxError: it cannot be used; says what is wrong.
    """
    path = folder / NOTE_FILE
    shown = f"{name or folder.name}/{NOTE_FILE}"
    try:
        with open_plain(path) as file:
            content = file.read(_MAX_NOTE_BYTES + 1)
        if len(content) > _MAX_NOTE_BYTES:
            raise InboxError(
                f"{shown} cannot be used: it is larger than {_MAX_NOTE_BYTES:,} bytes; shorten it"
            )
        return Note.model_validate(tomllib.loads(content.decode("utf-8")))
    except (FileNotFoundError, NotPlainError):
        return Note()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InboxError(f"{shown} cannot be read: {error}") from error
    except RecursionError as error:
        raise InboxError(f"{shown} cannot be read: it is nested too deeply; write it plainly") from error
    except ValidationError as error:
        problem = error.errors()[0]
        key = _cut(".".join(str(part) for part in problem["loc"]))
        if problem["type"] == "extra_forbidden":
            what = f"unknown key {key}; the keys are id, submitter, template and classes"
        else:
            what = f"{key} is {_cut(repr(problem['input']))}; {problem['msg'].removeprefix('Value error, ')}"
        raise InboxError(f"{shown} cannot be used: {what}") from error


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_QUOTED else f"{text[:_MOST_QUOTED]}…"
