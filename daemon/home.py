"""A home directory: what belongs in it, making one, and recognising one."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from daemon.errors import ConfigError
from daemon.lock import owner_of
from daemon.spool import Spool
from deploy import atomic, disk
from deploy.store import VersionStore

FORMAT = "1"
FORMAT_FILE = "format"
WORKER_LOG = "worker.log"
# What `dynlora init` may have made when it fails.
_MADE = (
    *("inbox", "exams", "requests", "spool", "serving", "image_moments.safetensors"),
    *("worker.lock", "daemon.lock", WORKER_LOG),
)


def create_home(home: Path) -> None:
    """Make the directories of an empty home; harmless where they exist. The store gets its version 0
    elsewhere.

    Raises:
        ConfigError: the path is a file, or the home of another release.
        OSError: the directory cannot be made.
    """
    if home.exists() and not home.is_dir():
        raise ConfigError(f"{home} is a file; expected a directory to make a home in, or a path that is free")
    disk.make_dirs(home)
    if (home / FORMAT_FILE).exists():
        _check_format(home)
    for name in ("inbox", "exams", "requests/done"):
        atomic.make_dir(home / name)
    Spool(home).create()
    VersionStore(home / "serving").create()
    # Last: a home with this file is whole.
    atomic.write_text(home / FORMAT_FILE, f"{FORMAT}\n")


def names_in(home: Path) -> frozenset[str]:
    """What lies there before a home is made; nothing where there is no directory."""
    return frozenset(path.name for path in home.iterdir()) if home.is_dir() else frozenset()


@contextmanager
def unmade_where_it_fails(home: Path, before: Collection[str]) -> Iterator[None]:
    """Take a home away again that could not be given its version 0: half of one would be taken for a home.

    What lay there before stays, and so does an inbox with something in it. The worker's log stays where no
    usage was wrong: it may be all there is to find out why.

    Args:
        before: `names_in` of the directory before `create_home`; with a home in it nothing is removed.
    """
    try:
        yield
    except BaseException as error:
        if FORMAT_FILE not in before:
            with suppress(OSError):  # what went wrong before is what there is to tell
                _unmake(home, before, keeps_log=not isinstance(error, ConfigError | KeyboardInterrupt))
        raise


def _unmake(home: Path, before: Collection[str], *, keeps_log: bool) -> None:
    """The file that makes it a home goes first."""
    leftovers = (path.name for path in home.glob(f"{atomic.TEMPORARY_PREFIX}*"))
    for name in (FORMAT_FILE, *_MADE, *leftovers):
        path = home / name
        if name in before or not path.exists() or (name == WORKER_LOG and keeps_log):
            continue
        if name == "inbox" and any(path.iterdir()):
            continue
        atomic.remove_tree(path)
    if not before and not any(home.iterdir()):
        atomic.remove_tree(home)


def check_home(home: Path) -> None:
    """Tell whether commands can work here.

    Raises:
        ConfigError: there is no home, one of another release, or one that we may not look into.
    """
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            (home / FORMAT_FILE).stat()
    except PermissionError as error:
        raise ConfigError(
            f"{home} cannot be looked into: {error.strerror}; run this as the home's user "
            f"(`sudo -u {owner_of(home)} …`)"
        ) from error
    if not (home / FORMAT_FILE).is_file():
        raise ConfigError(
            f"{home} is no dynlora home: it has no file named {FORMAT_FILE}. "
            f"Make one with `dynlora init {home}`, or name another with --home."
        )
    _check_format(home)


def _check_format(home: Path) -> None:
    found = (home / FORMAT_FILE).read_text(encoding="utf-8", errors="replace").strip()
    if found.isdecimal() and int(found) > int(FORMAT):
        raise ConfigError(
            f"{home} has format {found!r}, and this release of dynlora knows {FORMAT!r}: a newer one has "
            "used it. Install that release or a later one, or restore the backup from before the upgrade."
        )
    if found != FORMAT:
        raise ConfigError(
            f"{home} has format {found!r}, expected {FORMAT!r}: it belongs to another release of dynlora. "
            "Use that one."
        )
