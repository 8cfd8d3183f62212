"""One daemon per home: an exclusive flock on `daemon.lock`.

The kernel drops the lock when its holder dies, however it dies, so there is no stale lock to clean up. Python
opens the file close-on-exec: a worker never inherits the lock of the daemon that started it.
"""

import fcntl
import os
import pwd
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from daemon.errors import DaemonError, LockError
from deploy import disk

LOCK_NAME = "daemon.lock"


class HomeLock:
    """The right to change the state of one home; a context manager.

    Args:
        home: the home directory; it must exist.
        patience_seconds: how long `acquire` keeps trying. A command holds the lock only for moments, and
            asking who holds it (`holder`) takes it for an instant, so the first refusal is not yet a second
            daemon.
    """

    def __init__(self, home: Path, *, patience_seconds: float = 1.0) -> None:
        self._path = home / LOCK_NAME
        self._patience_seconds = patience_seconds
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the lock and write our pid into it.

        Raises:
            LockError: another process holds it; the message names its pid.
            DaemonError: we may not open it.
        """
        try:
            fd = disk.open_file(self._path, os.O_RDWR | os.O_CREAT)
        except PermissionError as error:
            raise _not_ours(self._path, error) from error
        deadline = time.monotonic() + self._patience_seconds
        while not _try_lock(fd, fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                pid = _read_pid(fd)
                os.close(fd)
                raise LockError(
                    f"{self._path.parent} is already used by the process with pid {pid or 'unknown'}; "
                    "only one may change it. Stop that one first, or use another --home."
                )
            time.sleep(0.02)
        disk.truncate(fd, 0)
        disk.write(fd, f"{os.getpid()}\n".encode())
        self._fd = fd

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def holder(home: Path) -> int | None:
    """Pid of the process that holds the home's lock now (0 where unreadable); None when nobody does.

    Raises:
        DaemonError: we may not open it.
    """
    try:
        fd = os.open(home / LOCK_NAME, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise _not_ours(home / LOCK_NAME, error) from error
    try:
        return None if _try_lock(fd, fcntl.LOCK_SH) else _read_pid(fd)
    finally:
        os.close(fd)


def owner_of(path: Path) -> str:
    """The user that a file or folder belongs to, as `sudo -u` takes it."""
    number = path.stat().st_uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"#{number}"


def _not_ours(path: Path, error: PermissionError) -> DaemonError:
    """No LockError: nobody holds the lock who could let go of it."""
    user = owner_of(path.parent)
    return DaemonError(
        f"{path} cannot be opened: {error.strerror}; run this as the home's user (`sudo -u {user} …`)"
    )


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_pid(fd: int) -> int:
    text = os.pread(fd, 32, 0).decode(errors="replace").strip()
    return int(text) if text.isdigit() else 0
