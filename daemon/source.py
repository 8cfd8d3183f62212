"""Read what a claim brought: folders as they lie, archives unpacked beside them."""

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from daemon.archive import extract
from daemon.claim import SOURCE_DIR, Claim
from daemon.config import InboxConfig
from daemon.errors import InboxError
from daemon.inbox import archive_stem, is_archive, submitted_content
from daemon.layout import SUBMITTED_FILE, ClassNote, Layout, Note, read_tree
from daemon.plain_file import NotPlainError, open_plain
from deploy import atomic, disk

UNPACKED_DIR = "unpacked"
_MAX_SUBMITTED_BYTES = 1 << 20


class Submitted(BaseModel):
    """.submitted.json: what `dynlora submit` puts beside the drop."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    is_own_id: bool = False  # given by the producer, and not made up for this drop
    submitter: str | None = None
    templates: str | dict[str, str] | None = None  # one for all, or by class name

    def over(self, note: Note) -> Note:
        """The note with what was said on the command line put over it."""
        changes: dict[str, object] = {
            "id": self.id if self.is_own_id else note.id or self.id,
            "submitter": self.submitter or note.submitter,
        }
        if isinstance(self.templates, str):
            changes["template"] = self.templates
        elif self.templates:
            named = {
                name: ClassNote(name=note.of(name).name, template=template)
                for name, template in self.templates.items()
            }
            changes["classes"] = {**named, **{k: v for k, v in note.classes.items() if k not in named}}
        return note.model_copy(update=changes)


def read_source(claim: Claim, directory: Path, *, config: InboxConfig) -> list[Layout]:
    """The layouts of everything in source/, archives unpacked beside it.

    Raises:
        InboxError: an archive or a note cannot be used.
        NoSpaceError: the disk is full.
    """
    layouts = []
    for number, name in enumerate(claim.items, 1):
        path = directory / SOURCE_DIR / name
        if not os.path.lexists(path):
            continue  # it disappeared before it could be taken: among the claim's warnings
        submitted = read_submitted(path)
        if submitted is not None:
            path = submitted_content(path)
        layout = read_one(path, directory / f"{UNPACKED_DIR}-{number}", config=config)
        if submitted is not None:
            layout.note = submitted.over(layout.note)
        layouts.append(layout)
    return layouts


def read_one(path: Path, unpacked: Path, *, config: InboxConfig) -> Layout:
    """The layout of a folder, or of an archive after unpacking it into the new directory `unpacked`.

    Raises:
        InboxError: it is neither, or cannot be used.
        NoSpaceError: the disk is full.
    """
    if path.is_dir():
        return read_tree(path, path.name)
    if not is_archive(path.name):
        raise InboxError(f"{path.name} is neither a folder nor an archive")
    passed_over: list[tuple[str, str]] = []
    temporary = unpacked.with_name(f"{atomic.TEMPORARY_PREFIX}{unpacked.name}")
    if unpacked.exists():  # before a crash: unpacked again, which is cheap and the same every time
        atomic.remove_tree(unpacked)
    disk.mkdir(temporary)
    try:
        passed_over = extract(path, temporary, config=config)
    except Exception:
        atomic.remove_tree(temporary)  # a copy: the archive itself is kept
        raise
    disk.rename(temporary, unpacked)
    layout = read_tree(unpacked, archive_stem(path.name))
    layout.set_aside += [(path / member.lstrip("/"), reason) for member, reason in passed_over]
    return layout


def read_submitted(wrapper: Path) -> Submitted | None:
    """What `dynlora submit` said of the drop in this folder; None where it is none of its making.

    A stranger may have put the file there: no link is followed, no pipe waited for, and no content quoted.

    Raises:
        InboxError: there is such a file and it cannot be used.
    """
    shown = f"{wrapper.name}/{SUBMITTED_FILE}"
    try:
        with open_plain(wrapper / SUBMITTED_FILE) as file:
            content = file.read(_MAX_SUBMITTED_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        what = error if isinstance(error, NotPlainError) else error.strerror
        raise InboxError(f"{shown} cannot be used: {what}; submit it again") from error
    if len(content) > _MAX_SUBMITTED_BYTES:
        raise InboxError(
            f"{shown} cannot be used: it is larger than {_MAX_SUBMITTED_BYTES:,} bytes; submit it again"
        )
    try:
        return Submitted.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(str(part) for part in problem["loc"])[:80]
        what = f"{key}: {problem['msg']}" if key else problem["msg"]
        raise InboxError(f"{shown} cannot be used: {what}; submit it again") from error
