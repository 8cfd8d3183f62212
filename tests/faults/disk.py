"""A disk that fails, or loses power, at the Nth call that changes it; shared by a daemon and its workers.

`install` replaces the functions of `os` in this process, and what it forks inherits that; pathlib and shutil
end there, too. Every call takes the next number from a journal that all processes of a life append to. At the
chosen one the whole process group is killed, or the call fails. `lose_power` then does to a home what a power
cut may do at worst: content that no fsync followed is gone, and entries that no fsync of their directory
followed are as before. A write at which it happens is torn: the first half of it is on the disk.
"""
# ruff: noqa: PTH102, PTH104, PTH108, PTH109, PTH112, PTH114, PTH115, PTH118, PTH120

import fcntl
import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

REAL = {
    name: getattr(os, name)
    for name in (
        "open",
        "write",
        "ftruncate",
        "posix_fallocate",
        "fsync",
        "rename",
        "replace",
        "link",
        "symlink",
        "unlink",
        "remove",
        "rmdir",
        "mkdir",
    )
}
_ON_DESCRIPTORS = ("write", "ftruncate", "posix_fallocate", "fsync")
_WRITES = os.O_CREAT | os.O_WRONLY | os.O_RDWR


class Disk:
    """The calls of one life on `home`; `journal` lies outside of it.

    Args:
        at: the call that does not happen; 0 for none.
        how: "kill" the process group there, or the error number the call fails with.
        skips: called with a call's name and path; true where a broken build leaves that call out.
    """

    def __init__(
        self, home: Path, journal: Path, *, at: int = 0, how: Any = "kill", skips: Any = None
    ) -> None:
        self.home, self.journal, self.at, self.how, self.skips = str(home), journal, at, how, skips
        self.graves = journal.with_name("graves")
        self.graves.mkdir(exist_ok=True)

    def install(self) -> None:
        """From now on, in this process and its children."""
        for name in REAL:
            setattr(os, name, self._over(name))

    def _over(self, name: str) -> Any:
        real = REAL[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            entry = self._entry(name, args, kwargs)
            if entry is None:
                return real(*args, **kwargs)
            if self.skips is not None and self.skips(name, entry["path"]):
                return None
            number = self._count(entry)
            if number == self.at:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                if self.how == "kill":
                    os.killpg(0, signal.SIGKILL)
                raise OSError(self.how, os.strerror(self.how), entry["path"])
            return real(*args, **kwargs)

        return call

    def _entry(self, name: str, args: Any, kwargs: Any) -> dict[str, Any] | None:
        """What the journal says of a call; None where it does not change the home."""
        if name in _ON_DESCRIPTORS:
            path = os.readlink(f"/proc/self/fd/{args[0]}")
            state = os.fstat(args[0])
            entry = {"path": path, "ino": state.st_ino, "size": state.st_size}
        elif name == "open":
            path = _where(args[0], kwargs.get("dir_fd"))
            flags = args[1] if len(args) > 1 else kwargs["flags"]
            if not flags & _WRITES:
                return None
            entry = {"path": path, "is_new": not os.path.lexists(path)}
        elif name in ("rename", "replace"):
            entry = {"path": _where(args[0], None), "to": _where(args[1], None)}
            path = entry["to"]
        elif name in ("symlink", "link"):
            path = _where(args[1], None)
            entry = {"path": path}
        else:
            path = _where(args[0], kwargs.get("dir_fd"))
            entry = {"path": path}
        return {"op": name} | entry if f"{path}/".startswith(f"{self.home}/") else None

    def _count(self, entry: dict[str, Any]) -> int:
        """Append to the journal; the number of this call. What the call removes is kept for `lose_power`."""
        with self.journal.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            number = sum(1 for _ in file) + 1
            victim = entry.get("to") or entry["path"]
            if entry["op"] in ("unlink", "remove", "rename", "replace") and os.path.lexists(victim):
                grave = self.graves / str(number)
                if not os.path.isdir(victim) or os.path.islink(victim):
                    REAL["link"](victim, grave, follow_symlinks=False)
                    entry["grave"] = str(grave)
            file.write(json.dumps(entry) + "\n")
        return number


def _where(path: Any, dir_fd: int | None) -> str:
    path = os.fsdecode(path)
    base = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
    return os.path.normpath(os.path.join(base, path))


def inodes(home: Path) -> dict[int, int]:
    """What is safely on the disk at the start: inode → size."""
    return {path.lstat().st_ino: path.lstat().st_size for path in home.rglob("*") if path.is_file()}


def lose_power(home: Path, journal: Path, before: dict[int, int], *, at: int) -> None:
    """Undo what was not brought to the disk. The call number `at` itself never happened."""
    entries = [json.loads(line) for line in journal.read_text().splitlines()][: at - 1]
    safe = dict(before)
    pending: list[dict[str, Any]] = []
    for entry in entries:
        if entry["op"] == "fsync":
            safe[entry["ino"]] = entry["size"]
            pending = [p for p in pending if os.path.dirname(p.get("to") or p["path"]) != entry["path"]]
        elif entry["op"] not in _ON_DESCRIPTORS and (entry["op"] != "open" or entry["is_new"]):
            pending.append(entry)
    for path in home.rglob("*"):
        if path.is_file() and not path.is_symlink():
            size = safe.get(path.stat().st_ino, 0)
            if path.stat().st_size > size:
                os.truncate(path, size)
    for entry in reversed(pending):
        with suppress(FileNotFoundError, FileExistsError, NotADirectoryError):
            _undo(entry)


def _undo(entry: dict[str, Any]) -> None:
    path, op = entry["path"], entry["op"]
    if op in ("open", "link", "symlink"):
        os.unlink(path)
    elif op == "mkdir":
        shutil.rmtree(path)
    elif op == "rmdir":
        os.mkdir(path)
    elif op in ("rename", "replace"):
        os.rename(entry["to"], path)
        if "grave" in entry:
            os.link(entry["grave"], entry["to"], follow_symlinks=False)
    elif "grave" in entry:
        os.link(entry["grave"], path, follow_symlinks=False)
