"""`dynlora submit`: hand a folder or an archive over complete, or say beforehand what would become of it.

A submitted drop is copied into the inbox under a name that is ignored, flushed to disk, and renamed: the
daemon sees all of it or nothing, and need not wait for it to settle.
"""

import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from daemon.batch import Batch
from daemon.claim import SOURCE_DIR, Claim, copy_tree, space_for
from daemon.compose import Context, Known, compose
from daemon.config import Config, check_template
from daemon.errors import InboxError
from daemon.inbox import ARCHIVE_SUFFIXES, is_archive
from daemon.layout import SUBMITTED_FILE, kind_of, passed_over, tell_passed_over
from daemon.source import UNPACKED_DIR, Submitted, read_one
from deploy import atomic, disk

Templates = str | Mapping[str, str]


@dataclass(frozen=True)
class CheckReport:
    """What would become of a drop. All lines are sentences for people."""

    classes: dict[str, int]  # name as it would be shown → usable images
    set_aside: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    refused: str | None = None  # why nothing could be learnt from it

    @property
    def is_accepted(self) -> bool:
        """Whether a batch would be queued."""
        return self.refused is None


def submit(
    path: Path,
    inbox: Path,
    *,
    producer_id: str | None = None,
    submitter: str | None = None,
    templates: Templates | None = None,
) -> str:
    """Copy a class folder, batch folder or archive into the inbox, complete; returns the producer's id.

    Args:
        producer_id: the same id is never learnt twice, and it wins over the one in batch.toml; a new one is
            made up when None.
        templates: one for all classes, or one per class name.

    Raises:
        InboxError: it cannot be submitted; nothing was left in the inbox.
        NoSpaceError: the disk is full; nothing was left in the inbox.
    """
    path = _submittable(path)
    _check_templates(templates)
    if not inbox.is_dir():
        raise InboxError(
            f"{inbox} is not a folder; give the home of a daemon, or make one with `dynlora init`"
        )
    identity = producer_id or str(uuid.uuid4())
    note = Submitted(
        id=identity,
        is_own_id=producer_id is not None,
        submitter=submitter,
        templates=templates if templates is None or isinstance(templates, str) else dict(templates),
    )
    short = uuid.uuid4().hex[:8]
    temporary = inbox / f"{atomic.TEMPORARY_PREFIX}{short}"
    try:
        with space_for(f"nothing of {path} was submitted; free some space and submit it again"):
            disk.mkdir(temporary)
            if not_copied := copy_tree(path, temporary / path.name, shown=path.name):
                raise InboxError(f"{path} was not submitted: {'; '.join(not_copied)}")
            atomic.write_file(temporary / SUBMITTED_FILE, (note.model_dump_json() + "\n").encode())
            _open_to_the_group(temporary)
            atomic.fsync_tree(temporary)
            atomic.rename(temporary, inbox / f"submit-{short}")
    except OSError as error:
        raise InboxError(f"{path} was not submitted: {error}; correct that and submit it again") from error
    finally:
        disk.remove_tree(temporary, ignore_errors=True)
    return identity


def check(path: Path, config: Config, known: Known | None = None) -> CheckReport:
    """Say what would be accepted and what set aside. Moves nothing; an archive is unpacked elsewhere.

    Raises:
        InboxError: there is no such folder or archive.
    """
    path = _submittable(path)
    try:
        with looked_at(path, config, known) as (_, batch):
            return _report(batch)
    except InboxError as error:
        return CheckReport({}, refused=str(error))
    except OSError as error:
        raise InboxError(f"{path} cannot be read: {error}; correct its rights") from error


@contextmanager
def looked_at(path: Path, config: Config, known: Known | None = None) -> Iterator[tuple[Path, Batch]]:
    """A drop as the batch it would be, where it lies: each image is its `origin` under the yielded folder.

    Raises:
        InboxError: there is no such folder or archive, or it cannot be used.
    """
    path = _submittable(path)
    with tempfile.TemporaryDirectory(prefix="dynlora-check-") as room:
        # The drop is seen as it would be in the spool: under source/, with what is unpacked beside it.
        base = Path(room)
        disk.symlink(base / SOURCE_DIR, path.parent)
        layout = read_one(base / SOURCE_DIR / path.name, base / f"{UNPACKED_DIR}-1", config=config.inbox)
        yield base, compose(_claim_for(path), [layout], base=base, context=Context(config, known or Known()))


def _report(batch: Batch) -> CheckReport:
    counts = {entry.key: 0 for entry in batch.classes}
    for image in batch.images:
        counts[image.class_key] += 1
    aside = [item.sentence for item in batch.set_aside]
    refused = None
    if not batch.classes:
        refused = aside[0] if len(aside) == 1 else "no class in it has enough usable images"
    return CheckReport({e.name: counts[e.key] for e in batch.classes}, aside, batch.warnings, refused)


def _submittable(path: Path) -> Path:
    path = path.expanduser().resolve()  # a link that a person names is meant to be followed
    if not path.exists():
        raise InboxError(f"{path} does not exist; give a folder or an archive")
    if path.is_dir():
        if kind_of(path) == "empty":
            what = "holds no files; give a folder of images, or of class folders"
            if found := passed_over(path):
                what = f"holds no usable file, {tell_passed_over(found)}"
            raise InboxError(f"{path} {what}")
    elif not is_archive(path.name):
        suffixes = ", ".join(ARCHIVE_SUFFIXES)
        raise InboxError(
            f"{path} is a single file; give a class folder, a batch folder or a {suffixes} archive"
        )
    return path


def _check_templates(templates: Templates | None) -> None:
    named = {"every class": templates} if isinstance(templates, str) else dict(templates or {})
    for name, template in named.items():
        try:
            check_template(template)
        except ValueError as error:
            raise InboxError(f"the template {template!r} for {name} cannot be used: {error}") from error


def _open_to_the_group(root: Path) -> None:
    """Let a daemon of another user, but of the inbox's group, move what was submitted."""
    for name, _, files in os.walk(root):
        directory = Path(name)
        directory.chmod(0o2775)
        for file in files:
            if not (directory / file).is_symlink():
                (directory / file).chmod(0o664)


def _claim_for(path: Path) -> Claim:
    return Claim(
        id="000000-check",
        seq=0,
        slug="check",
        kind="batch",
        inbox=str(path.parent),
        items=[path.name],
        submitter=None,
        received_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
