"""A home directory: what belongs in it, making one, and recognising one."""

from pathlib import Path

from daemon.errors import ConfigError
from daemon.spool import Spool
from deploy import atomic, disk
from deploy.store import VersionStore

FORMAT = "1"
FORMAT_FILE = "format"


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


def check_home(home: Path) -> None:
    """Tell whether commands can work here.

    Raises:
        ConfigError: there is no home, or one of another release.
    """
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
