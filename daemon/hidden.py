"""Folders in the inbox root whose names start with a dot: never learnt, so somebody should be told.

Such a folder may be about to be renamed, by `dynlora submit` or by a script that does alike. So it is told of
once nobody works in it any more.
"""

import hashlib
import os
import re
import shlex
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from daemon.config import InboxConfig
from deploy import atomic

_SUBMITTING = re.compile(re.escape(atomic.TEMPORARY_PREFIX) + "[0-9a-f]{8}")  # the name submit copies under
_SUBMIT_SECONDS = 900.0  # a large submission is flushed to the disk for minutes, and nothing in it changes
_ENTRIES_PER_STEP = 256  # a few milliseconds
_LEVELS = 3  # a drop has its files in the first three
# File servers, desktops and other programs keep these: nobody hid a drop there.
_JUNK = {
    ".appledouble", ".fseventsd", ".git", ".recycle", ".snapshot", ".snapshots", ".spotlight-v100",
    ".stfolder", ".stversions", ".trashes", ".zfs",
}  # fmt: skip


@dataclass(frozen=True)
class Hidden:
    """One such folder at one moment."""

    path: Path
    fingerprint: str  # of what a glance shows
    quiet_since: float  # when this fingerprint was first seen, by the caller's clock


def is_hidden_junk(name: str) -> bool:
    """Whether a program that has nothing to do with us keeps a folder of that name."""
    return name.casefold() in _JUNK or name.startswith(".Trash-")


def looking_at(path: Path, now: float, before: Sequence[Hidden]) -> Generator[None, None, Hidden]:
    """What it looks like now, a few entries at a time; quiet times are carried on from the look before."""
    digest = hashlib.sha256()
    for number, found in enumerate(_glance(path, _LEVELS), 1):
        digest.update(repr((found.st_ino, found.st_size, found.st_mtime_ns)).encode())
        if number % _ENTRIES_PER_STEP == 0:
            yield
    fingerprint = digest.hexdigest()
    same = (old.quiet_since for old in before if old.path == path and old.fingerprint == fingerprint)
    return Hidden(path, fingerprint, next(same, now))


def why_told(folder: Hidden, now: float, config: InboxConfig) -> str | None:
    """A sentence for people once it is quiet: what it is and what to do. Pure."""
    quiet_seconds = now - folder.quiet_since
    shown = folder.path.name.encode("utf-8", "backslashreplace").decode()
    if _SUBMITTING.fullmatch(folder.path.name):
        if quiet_seconds < _SUBMIT_SECONDS:
            return None
        return (
            f"{shown} was left by a `dynlora submit` that was cut short; nothing of it is learnt, and what "
            "was to be submitted is where it was: submit that again, and remove this with: "
            f"rm -r {shlex.quote(str(folder.path))}"
        )
    if quiet_seconds < max(config.gather_seconds, config.settle_seconds):
        return None
    return (
        f"{shown} is ignored because its name starts with a dot; rename it if it was meant to be learnt, "
        "else take it out of the inbox"
    )


def _glance(folder: Path, levels: int) -> Iterable[os.stat_result]:
    """What the first levels of a tree look like, as far as one is allowed to look."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        try:
            yield entry.stat(follow_symlinks=False)
            is_folder = entry.is_dir(follow_symlinks=False)
        except OSError:
            continue
        if is_folder and levels > 1:
            yield from _glance(Path(entry.path), levels - 1)
