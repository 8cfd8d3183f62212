"""Walk through one entry of the inbox: has it changed, what kind of drop is it, how large is it.

Looks at names, sizes and times only, and follows no link. The walk is a generator that yields again and
again, so that whoever scans an inbox with a hundred thousand files in it can do something else in between.
"""

import hashlib
import os
import stat
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from daemon.errors import InboxError
from daemon.layout import MAX_LEVELS, is_own_file, is_usable_name, too_deep

_ENTRIES_PER_STEP = 256  # a few milliseconds


@dataclass
class _Inside:
    """Usable files of a folder of the first level: in it, and further down."""

    direct: int = 0
    below: int = 0


@dataclass
class Survey:
    """What a walk found.

    Attributes:
        fingerprint: changes with any name, size or time in the tree.
        entries: files and folders, the first one included.
        size_bytes: of all files.
    """

    fingerprint: str = ""
    entries: int = 0
    size_bytes: int = 0
    _files: int = 0  # usable ones at the top
    _folders: dict[str, _Inside] = field(default_factory=dict)  # usable ones at the top

    def kind(self, inside: str | None = None) -> Literal["folders", "batch", "empty"]:
        """A class folder, a batch folder, or nothing to learn from (yet), as layout.kind_of says.

        Args:
            inside: a folder at the top, to be judged instead of the whole.
        """
        if inside is not None:
            found = self._folders.get(inside, _Inside())
            return "batch" if found.below else "folders" if found.direct else "empty"
        if any(found.direct or found.below for found in self._folders.values()):
            return "batch"
        return "folders" if self._files else "empty"

    def count(self, relative: str, found: os.stat_result, *, is_usable: bool) -> None:
        """Take one more entry into account; its path begins with a slash, the first one's is empty."""
        self.entries += 1
        is_folder = stat.S_ISDIR(found.st_mode)
        self.size_bytes += 0 if is_folder else found.st_size
        if not is_usable or not relative:
            return
        _, top, *rest = relative.split("/", 2)
        if not rest and is_folder:
            self._folders[top] = _Inside()
        elif not rest:
            self._files += 1
        elif not is_folder:
            inside = self._folders[top]
            inside.below += "/" in rest[0]
            inside.direct += "/" not in rest[0]


def survey(path: Path) -> Survey:
    """Walk at once; raises as `surveying`."""
    steps = surveying(path)
    while True:
        try:
            next(steps)
        except StopIteration as ended:
            found: Survey = ended.value
            return found


def surveying(path: Path) -> Generator[None, None, Survey]:
    """Walk a few entries at a time; returns what was found.

    Raises:
        OSError: a part of it cannot be listed, or left meanwhile.
        InboxError: its folders are nested too deeply.
    """
    digest, result = hashlib.sha256(), Survey()
    waiting: list[tuple[os.DirEntry[str] | Path, str, bool]] = [(path, "", True)]
    while waiting:
        entry, relative, is_usable = waiting.pop()
        found = entry.lstat() if isinstance(entry, Path) else entry.stat(follow_symlinks=False)
        is_folder = stat.S_ISDIR(found.st_mode)
        is_usable &= is_folder or stat.S_ISREG(found.st_mode)
        # A directory's times change when the tree is renamed, which changes nothing in it.
        times = () if is_folder else (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        digest.update(repr((relative, found.st_mode, *times)).encode("utf-8", "surrogateescape"))
        result.count(relative, found, is_usable=is_usable)
        if is_folder:
            if relative.count("/") > MAX_LEVELS:
                raise InboxError(too_deep(path.name))
            for inner in sorted(os.scandir(entry), key=lambda inner: inner.name, reverse=True):
                counts = is_usable and is_usable_name(inner.name) and not is_own_file(inner.name)
                waiting.append((inner, f"{relative}/{inner.name}", counts))
        if result.entries % _ENTRIES_PER_STEP == 0:
            yield
    result.fingerprint = digest.hexdigest()
    return result


def is_larger(paths: Iterable[Path], *, entries: int, size_bytes: int) -> bool:
    """Whether trees have more than so many entries or bytes, without walking through all of them."""
    waiting, found = list(paths), 0
    while waiting:
        directory = waiting.pop()
        try:
            for entry in os.scandir(directory):
                found += 1
                size_bytes -= entry.stat(follow_symlinks=False).st_size
                if found > entries or size_bytes < 0:
                    return True
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
        except NotADirectoryError:
            found, size_bytes = found + 1, size_bytes - directory.lstat().st_size
        except OSError:
            continue  # gone, or closed to us: whoever takes it in will say so
    return found > entries or size_bytes < 0
