"""What `current` leads to, and what is known to be wrong with it. Reads directories, loads nothing."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from deploy.errors import DeployError
from deploy.manifest import MANIFEST_NAME
from deploy.store_reader import StoreReader

_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0


@dataclass(frozen=True)
class Target:
    """A version directory, resolved, and its manifest's hash: a version is never told by a time stamp."""

    directory: Path
    manifest_sha256: str


def resolve_current(serving_dir: Path) -> Target:
    """Follow `current` once; a manifest that is missing is left for whoever loads the version.

    Raises:
        StoreError: `current` is missing or leads nowhere.
    """
    store = StoreReader(serving_dir)
    directory = store.path(store.current()).resolve()
    try:
        manifest = (directory / MANIFEST_NAME).read_bytes()
    except FileNotFoundError:
        manifest = b""
    return Target(directory, hashlib.sha256(manifest).hexdigest())


def state_of(directory: Path) -> tuple[tuple[str, int, int, int, int], ...]:
    """Return what changes when a file is repaired; ctime shows a copy that kept the older mtime."""
    state = []
    for path in sorted(directory.iterdir()):
        stat = path.lstat()
        state.append((path.name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return tuple(state)


@dataclass(frozen=True)
class Failure:
    """What could not be loaded, as it was then, and when (monotonic seconds) to try it unchanged."""

    state: object
    retry_at: float
    pause_seconds: float

    @classmethod
    def of(cls, error: Exception, state: object, before: "Failure | None", now: float) -> Self:
        """Say when to try again: a busy machine may be well soon, a damaged version rarely heals by waiting.

        Rarely, not never: an error of ours may stand for one of the machine's, such as a lack of memory
        that ONNX Runtime told in words of its own.
        """
        if isinstance(error, DeployError):
            return cls(state, now + _LONGEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
        pause = _FIRST_PAUSE_SECONDS
        if before is not None and before.state == state:
            pause = min(2 * before.pause_seconds, _LONGEST_PAUSE_SECONDS)
        return cls(state, now + pause, pause)

    def covers(self, state: object, now: float) -> bool:
        """Tell whether this is the same failure still, and too early to try again."""
        return self.state == state and now < self.retry_at
