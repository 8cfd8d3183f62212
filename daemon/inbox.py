"""Look at the inbox and decide what has arrived completely. Reads only; moving is claim.py's part.

The scan is the truth, events only hasten it; it is made in steps, for an inbox may be large. An item is ready
when `dynlora submit` renamed it in, when its folder holds a .ready file, or when nothing in it has changed
between two scans and for settle_seconds. Class folders in the inbox root are gathered into one batch once all
of them have been quiet for gather_seconds.
"""

import os
import shlex
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from daemon.config import InboxConfig
from daemon.errors import InboxError
from daemon.hidden import Hidden, is_hidden_junk, looking_at, why_told
from daemon.layout import (
    READY_FILE,
    SUBMITTED_FILE,
    is_junk,
    is_text,
    list_entries,
    passed_over,
    tell_passed_over,
)
from daemon.survey import survey, surveying

Kind = Literal["folders", "batch", "archive", "empty"]
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
_OTHER_ARCHIVES = (".7z", ".rar", ".gz", ".bz2", ".xz", ".zst", ".tbz2", ".txz")
CLAIMED_PREFIX = ".claimed-"
INCOMPLETE_SUFFIX = ".incomplete"  # of a claimed drop that was copied only in part


@dataclass(frozen=True)
class Item:
    """One entry of the inbox root that can become (part of) a batch."""

    name: str
    title: str  # for people: the name that it was submitted under, without an archive's suffix
    kind: Kind
    mark: Literal["submitted", "ready"] | None
    fingerprint: str  # of names, sizes and times of everything in it
    quiet_since: float  # when this fingerprint was first seen, by the caller's clock
    arrived_ns: int  # when it was put under this name, by the file system's clock
    why_empty: str = ""  # of an empty one that is not: what is in it and cannot be used
    entries: int = 1  # files and folders in it


@dataclass(frozen=True)
class Problem:
    """Something in the inbox that is left where it is: `sentence` says why and what to do."""

    name: str
    sentence: str


@dataclass(frozen=True)
class Scan:
    """The inbox at one moment."""

    items: tuple[Item, ...] = ()
    problems: tuple[Problem, ...] = ()
    hidden: tuple[Hidden, ...] = ()
    _by_name: dict[str, Item] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {item.name: item for item in self.items})

    def find(self, name: str) -> Item | None:
        """The item of that name."""
        return self._by_name.get(name)


def is_archive(name: str) -> bool:
    """Whether it is an archive of a kind that is unpacked, by its name."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def archive_stem(name: str) -> str:
    """An archive's name without its suffix."""
    return next(
        (name[: -len(s)] for s in sorted(ARCHIVE_SUFFIXES, key=len) if name.lower().endswith(s)), name
    )


def scan_inbox(
    inbox: Path,
    now: float,
    *,
    previous: Scan | None = None,
    left_behind: Mapping[str, str] | None = None,
    unfinished: Collection[str] = (),
) -> Scan:
    """Look at everything in `inbox` at once; see `scanning`."""
    steps = scanning(inbox, now, previous=previous, left_behind=left_behind, unfinished=unfinished)
    while True:
        try:
            next(steps)
        except StopIteration as ended:
            scan: Scan = ended.value
            return scan


def scanning(
    inbox: Path,
    now: float,
    *,
    previous: Scan | None = None,
    left_behind: Mapping[str, str] | None = None,
    unfinished: Collection[str] = (),
) -> Generator[None, None, Scan]:
    """Look at everything in `inbox`, a few milliseconds at a time; returns what was found.

    Args:
        now: the caller's clock, in seconds; only differences matter.
        previous: the scan before, from which quiet times are carried on.
        left_behind: drops that were copied and could not be removed: not taken again. Name → fingerprint,
            and after a space the batch that got only a part of it.
        unfinished: names that an earlier claim has yet to take or to copy whole.

    Raises:
        OSError: the inbox itself cannot be read.
    """
    items: list[Item] = []
    problems: list[Problem] = []
    hidden: list[Hidden] = []
    for entry in sorted(os.scandir(inbox), key=lambda entry: entry.name):
        name = entry.name
        if name in unfinished:
            problems.append(Problem(name, f"{name} is being taken in; leave it as it is until that is done"))
        elif name.startswith(CLAIMED_PREFIX):
            problems.append(Problem(name, _claimed(Path(entry.path))))
        elif name.startswith("."):
            if entry.is_dir(follow_symlinks=False) and not is_hidden_junk(name):
                before = previous.hidden if previous else ()
                hidden.append((yield from looking_at(Path(entry.path), now, before)))
        elif is_junk(name):
            continue
        else:
            found = yield from _look_at(entry, now, previous, left=(left_behind or {}).get(name, ""))
            if isinstance(found, Item):
                items.append(found)
            elif found is not None:
                problems.append(Problem(name, found))
            yield
    return Scan(tuple(items), tuple(problems), tuple(hidden))


def _look_at(
    entry: os.DirEntry[str], now: float, previous: Scan | None, *, left: str
) -> Generator[None, None, Item | str | None]:
    """An item, or a sentence where it can be none; nothing where it left while we looked."""
    name = entry.name
    try:
        if (sentence := _why_left(entry)) is not None:
            return sentence
        item = yield from _item(entry, now, previous)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        return f"{name} cannot be read ({error.filename}: permission denied); correct its rights"
    except InboxError as error:
        return str(error)
    except OSError as error:
        return f"{name} cannot be read ({error}); correct that or remove it"
    fingerprint, _, batch = left.partition(" ")
    if fingerprint != item.fingerprint:
        return item
    return _partly_copied(Path(entry.path), batch) if batch else _copied(Path(entry.path))


def ready_items(previous: Scan | None, scan: Scan, now: float, config: InboxConfig) -> list[list[Item]]:
    """The groups that can be claimed, each of them one batch, in order of arrival. Pure."""

    def is_quiet(item: Item, seconds: float) -> bool:
        before = previous.find(item.name) if previous else None
        same = before is not None and before.fingerprint == item.fingerprint
        return same and now - item.quiet_since >= seconds

    groups = [
        [item]
        for item in scan.items
        if item.mark == "submitted"
        or (item.kind in {"batch", "archive"} and (item.mark or is_quiet(item, config.settle_seconds)))
    ]
    # A folder that is still empty may be about to become a class folder: it counts until it is quiet.
    loose = [item for item in scan.items if item.mark is None and item.kind in {"folders", "empty"}]
    seconds = max(config.gather_seconds, config.settle_seconds)
    gathered = loose if all(is_quiet(item, seconds) for item in loose) else []
    marked = [item for item in scan.items if item.mark == "ready" and item.kind == "folders"]
    if classes := [item for item in [*marked, *gathered] if item.kind == "folders"]:
        groups.append(sorted(classes, key=lambda item: item.name))
    return sorted(groups, key=lambda group: min((item.arrived_ns, item.name) for item in group))


def empty_folders(scan: Scan, now: float, config: InboxConfig) -> list[Problem]:
    """Folders that have been empty for so long that somebody should be told. Pure."""
    return [
        Problem(
            item.name,
            f"{item.name} holds no usable file, {item.why_empty}"
            if item.why_empty
            else f"{item.name} is an empty folder; put at least {config.min_images_per_class} images into it",
        )
        for item in scan.items
        if item.kind == "empty" and now - item.quiet_since >= config.gather_seconds
    ]


def hidden_folders(scan: Scan, now: float, config: InboxConfig) -> list[Problem]:
    """Folders with a leading dot that nobody has worked in for so long that somebody should be told. Pure."""
    told = [(folder.path.name, why_told(folder, now, config)) for folder in scan.hidden]
    return [Problem(name, sentence) for name, sentence in told if sentence is not None]


def _why_left(entry: os.DirEntry[str]) -> str | None:
    """A sentence where the entry can never become a batch as it is."""
    name = entry.name
    if not is_text(name):
        return f"{os.fsencode(name)!r} has a name that is not valid UTF-8; rename it"
    if entry.is_symlink():
        return (
            f"{name} is a link, and links are never followed; put a copy of what it points to into the inbox"
        )
    if entry.is_dir(follow_symlinks=False):
        return None
    if not entry.is_file(follow_symlinks=False):
        return f"{name} is neither a file nor a folder; remove it"
    if is_archive(name):
        return None
    if name.lower().endswith(_OTHER_ARCHIVES):
        return f"{name} is an archive of a kind that is not unpacked; use {', '.join(ARCHIVE_SUFFIXES)}"
    return f"{name} lies loose in the inbox; put it into a folder named after its class"


def _copied(path: Path) -> str:
    return (
        f"{path.name} was copied, because it could not be moved out of the inbox, and is not learnt again; "
        f"its owner can delete it with: rm -r {shlex.quote(str(path))}"
    )


def _partly_copied(path: Path, batch: str) -> str:
    return (
        f"{path.name} was only partly copied, because it could not be moved out of the inbox; keep it. "
        f"Batch {batch} says what is missing: correct that and drop it again"
    )


def _claimed(path: Path) -> str:
    if not path.name.endswith(INCOMPLETE_SUFFIX):
        return _copied(path)
    batch = path.name.removeprefix(CLAIMED_PREFIX).removesuffix(INCOMPLETE_SUFFIX).partition(".")[0]
    return _partly_copied(path, batch)


def _item(entry: os.DirEntry[str], now: float, previous: Scan | None) -> Generator[None, None, Item]:
    path = Path(entry.path)
    arrived_ns = path.lstat().st_ctime_ns
    found = yield from surveying(path)
    before = previous.find(entry.name) if previous else None
    if before is not None and before.fingerprint == found.fingerprint:
        return replace(before, quiet_since=min(before.quiet_since, now), arrived_ns=arrived_ns)
    content, mark = _content(path)
    kind: Kind = "archive"
    if content.is_dir():
        kind = found.kind(None if content == path else content.name)
    unusable = passed_over(content) if kind == "empty" else []
    return Item(
        name=entry.name,
        title=archive_stem(content.name),
        kind=kind,
        mark=mark,
        fingerprint=found.fingerprint,
        quiet_since=now,
        arrived_ns=arrived_ns,
        why_empty=tell_passed_over(unusable) if unusable else "",
        entries=found.entries,
    )


def _content(path: Path) -> tuple[Path, Literal["submitted", "ready"] | None]:
    """What is to be learnt from, which is within `path` where it was submitted, and how it is marked."""
    if (path / SUBMITTED_FILE).is_file() and not (path / SUBMITTED_FILE).is_symlink():
        return submitted_content(path), "submitted"
    return path, "ready" if (path / READY_FILE).exists() else None


def submitted_content(wrapper: Path) -> Path:
    """The folder or archive that `dynlora submit` wrapped."""
    entries = list_entries(wrapper)
    return next(iter([*entries.folders, *entries.files]), wrapper)


def tree_fingerprint(path: Path) -> str:
    """Changes with any name, size or time in the tree; links are not followed. Raises as `surveying`."""
    return survey(path).fingerprint
