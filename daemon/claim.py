"""Take ready items out of the inbox and into spool/incoming/<id>/source/, so that a crash loses nothing.

claim.json is on disk before anything moves; `gather` is then repeated until every item is in, and doing it
again changes nothing. An item that cannot be moved (another file system, or a folder whose owner keeps it)
is parked under .claimed-<id> in the inbox and copied; where even that is not allowed it is copied and
remembered.
"""

import errno
import os
import pwd
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from daemon.batch import Kind, batch_id, slug
from daemon.errors import InboxError, NoSpaceError
from daemon.inbox import CLAIMED_PREFIX, INCOMPLETE_SUFFIX, Item, tree_fingerprint
from daemon.layout import MAX_LEVELS
from daemon.spool import CLAIM_FILE, Spool
from deploy import atomic, disk

SOURCE_DIR = "source"
NOT_MOVED = "could not be moved out of the inbox"
LATER = "and is taken in once there is space; free some"
_NOT_MOVABLE = {errno.EXDEV, errno.EACCES, errno.EPERM, errno.EBUSY, errno.EROFS}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


class Claim(BaseModel):
    """claim.json: which items of the inbox this batch is made of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    seq: int
    slug: str
    kind: Kind
    inbox: str
    items: list[str]  # names in the inbox, and then in source/
    submitter: str | None
    received_at: str  # UTC, ISO 8601
    warnings: list[str] = []
    attempts: int = 0  # begun to read it and not ended, neither well nor badly: the process was gone


def read_claim(directory: Path) -> Claim:
    """The claim in `directory`.

    Raises:
        InboxError: it is damaged.
    """
    try:
        return Claim.model_validate_json((directory / CLAIM_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise InboxError(
            f"{directory / CLAIM_FILE} cannot be read: {error}; drop the images again"
        ) from error


def stake(items: Sequence[Item], inbox: Path, *, spool: Spool, seq: int, received_at: str) -> Claim:
    """Write down what is to be taken; nothing moves yet.

    Raises:
        NoSpaceError: the disk is full; everything is still in the inbox.
    """
    kind: Kind = (
        "archive" if items[0].kind == "archive" else "batch" if items[0].kind == "batch" else "folders"
    )
    short = slug(item.title for item in items)
    claim = Claim(
        id=batch_id(seq, short),
        seq=seq,
        slug=short,
        kind=kind,
        inbox=str(inbox),
        items=[item.name for item in items],
        submitter=_owner(inbox / items[0].name),
        received_at=received_at,
    )
    directory = spool.state_dir("incoming") / claim.id
    with space_for(f"{', '.join(claim.items)} stays in the inbox {LATER}"):
        try:
            # All that is made beforehand: a disk that fails here is none of the drop's fault.
            atomic.make_dir(directory / SOURCE_DIR)
            write_claim(claim, directory)
        except OSError:
            disk.remove_tree(directory, ignore_errors=True)
            raise
    return claim


def gather(claim: Claim, spool: Spool) -> Claim:
    """Bring every item into source/; returns the claim with what there is to tell.

    Raises:
        NoSpaceError: the disk is full; what is not in source/ is still in the inbox.
        OSError: the inbox or the spool failed.
    """
    directory = spool.state_dir("incoming") / claim.id
    with space_for(f"{', '.join(claim.items)} is kept where it is {LATER}"):
        atomic.make_dir(directory / SOURCE_DIR)
        for number, name in enumerate(claim.items, 1):
            warnings = _take(claim, number, name, spool)
            if warnings:
                claim = claim.model_copy(update={"warnings": [*claim.warnings, *warnings]})
                write_claim(claim, directory)
    return claim


def unfinished(spool: Spool) -> set[str]:
    """The entries of the inbox, parked ones included, that a claim has yet to take or to copy whole."""
    names: set[str] = set()
    for batch in spool.ids("incoming"):
        directory = spool.state_dir("incoming") / batch
        try:
            claim = read_claim(directory)
        except InboxError:
            continue
        for number, name in enumerate(claim.items, 1):
            if not os.path.lexists(directory / SOURCE_DIR / name):
                parked = _parked(claim, number)
                names |= {name, parked.name, _incomplete(parked).name}
    return names


@contextmanager
def space_for(what: str) -> Iterator[None]:
    """Turn "no space left" into a sentence that ends in what happens to the data."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        where = f" at {error.filename}" if error.filename else ""
        raise NoSpaceError(f"the disk is full{where}; {what}") from error


def write_claim(claim: Claim, directory: Path) -> None:
    """Put claim.json into `directory`, durably."""
    atomic.write_file(directory / CLAIM_FILE, (claim.model_dump_json(indent=1) + "\n").encode())


def _take(claim: Claim, number: int, name: str, spool: Spool) -> list[str]:
    source = Path(claim.inbox) / name
    target = spool.state_dir("incoming") / claim.id / SOURCE_DIR / name
    parked = _parked(claim, number)
    if os.path.lexists(target):
        return []
    if os.path.lexists(_incomplete(parked)):  # a crash came between this name and the end of the copy
        atomic.rename(_incomplete(parked), parked)
    fingerprint = None
    try:
        if not os.path.lexists(parked):
            try:
                atomic.rename(source, target)
            except FileNotFoundError:
                return [f"{name} disappeared from the inbox before it could be taken; drop it again"]
            except OSError as error:
                if error.errno in _NO_SPACE:
                    raise
                fingerprint = tree_fingerprint(source)  # what comes after this is no part of the copy
                if error.errno not in _NOT_MOVABLE:
                    raise
            else:
                return []
            parked = _park(source, parked)
        return _copy(claim, number, parked, spool=spool, fingerprint=fingerprint)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            there = parked if os.path.lexists(parked) else source
            _leave(claim, there, spool=spool, fingerprint=fingerprint, is_whole=False)
        raise


def _copy(claim: Claim, number: int, parked: Path, *, spool: Spool, fingerprint: str | None) -> list[str]:
    """Copy an item that cannot be moved, and see to it that what is left of it is not taken again."""
    directory, name = spool.state_dir("incoming") / claim.id, claim.items[number - 1]
    owner = _owner(parked) or "its owner"
    temporary = directory / f"{atomic.TEMPORARY_PREFIX}{number}"
    try:
        not_copied = copy_tree(parked, temporary, shown=name)
        if os.path.lexists(temporary):
            (atomic.fsync_tree if temporary.is_dir() else atomic.fsync_file)(temporary)
    except OSError:
        if os.path.lexists(temporary):
            atomic.remove_tree(temporary)  # half a copy fills a full disk and helps nobody
        raise
    # Before the copy counts, so that no crash makes it count twice.
    left = _leave(claim, parked, spool=spool, fingerprint=fingerprint, is_whole=not not_copied)
    if not os.path.lexists(temporary):
        return not_copied
    atomic.rename(temporary, directory / SOURCE_DIR / name)
    told = f"{name} belongs to {owner} and {NOT_MOVED}, "
    if not_copied:
        told += f"so it was copied, but only partly: keep {left}; see what is missing in batch {claim.id}"
    else:
        told += f"so it was copied and will not be taken again; delete {left} when you like"
    return [told, *not_copied]


def _leave(claim: Claim, source: Path, *, spool: Spool, fingerprint: str | None, is_whole: bool) -> Path:
    """Mark what stays in the inbox as taken, wholly or in part; returns where it is."""
    if source.name.startswith(CLAIMED_PREFIX):
        if is_whole or not os.path.lexists(source):
            return source
        atomic.rename(source, _incomplete(source))
        return _incomplete(source)
    if fingerprint is not None:
        inbox = Path(claim.inbox)
        with spool.changing_left_behind() as left:
            for name in [name for name in left if not os.path.lexists(inbox / name)]:
                del left[name]
            left[source.name] = fingerprint if is_whole else f"{fingerprint} {claim.id}"
    return source


def _incomplete(parked: Path) -> Path:
    return parked.with_name(f"{parked.name}{INCOMPLETE_SUFFIX}")


def _parked(claim: Claim, number: int) -> Path:
    return Path(claim.inbox) / f"{CLAIMED_PREFIX}{claim.id}{'' if number == 1 else f'.{number}'}"


def _park(source: Path, parked: Path) -> Path:
    """Hide the item under the claim's name if the inbox allows it; returns where it is."""
    try:
        atomic.rename(source, parked)
    except OSError as error:
        if error.errno not in _NOT_MOVABLE:
            raise
        return source
    return parked


def copy_tree(source: Path, target: Path, *, shown: str) -> list[str]:
    """Copy files, folders, and links as links; returns a sentence for each entry that could not be.

    Raises:
        OSError: the disk is full.
    """
    if shown.count("/") > MAX_LEVELS:
        return [f"{shown.partition('/')[0]} was not copied whole: its folders are nested too deeply"]
    try:
        mode = source.lstat().st_mode
        if stat.S_ISLNK(mode):
            disk.symlink(target, source.readlink())
        elif stat.S_ISDIR(mode):
            entries = sorted(source.iterdir())
            disk.mkdir(target)
            return [
                s
                for entry in entries
                for s in copy_tree(entry, target / entry.name, shown=f"{shown}/{entry.name}")
            ]
        elif stat.S_ISREG(mode):
            _copy_file(source, target)
        else:
            return [f"{shown} was not copied: it is neither a file nor a folder"]
    except FileNotFoundError:
        return [f"{shown} disappeared while it was being copied; drop it again"]
    except PermissionError:
        return [f"{shown} was not copied: permission denied; correct its rights and drop it again"]
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise
        return [f"{shown} was not copied: {error.strerror}; correct that and drop it again"]
    return []


def _copy_file(source: Path, target: Path) -> None:
    try:
        disk.copy(source, target)
    except OSError:
        disk.unlink(target, missing_ok=True)  # half an image is none
        raise


def _owner(path: Path) -> str | None:
    try:
        uid = path.lstat().st_uid
    except OSError:
        return None
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
