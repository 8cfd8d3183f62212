"""A version gives its large files back to the disk, and keeps what its history needs.

Knows one directory; which versions may be pruned is the store's decision.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from deploy import atomic, disk
from deploy.manifest import (
    CLASS_EMBEDDINGS_NAME,
    CLASSES_NAME,
    DELTA_NAME,
    GRAPH_NAMES,
    MANIFEST_NAME,
    REFERENCE_NAME,
    SIGNATURE_NAME,
    WEIGHTS_NAME,
    load_manifest,
)

# Enough to tell the history, to recognise a batch, and to rebuild the version from version 0.
KEPT_WHEN_PRUNED = (
    MANIFEST_NAME,
    DELTA_NAME,
    CLASSES_NAME,
    CLASS_EMBEDDINGS_NAME,
    REFERENCE_NAME,
    SIGNATURE_NAME,
)


def prune_version(directory: Path) -> bool:
    """Remove a version's large files.

    Returns False where there is nothing to remove, or a client holds the shared lock on manifest.json.

    Raises:
        OSError: a file cannot be removed; what was begun is finished by the next call.
    """
    return _remove(directory, large_files(directory))


def large_files(directory: Path) -> list[Path]:
    """Return what pruning a version removes.

    A version that brought new graphs keeps them: those after it are rebuilt with copies.
    """
    large = [path for path in directory.iterdir() if path.name not in KEPT_WHEN_PRUNED]
    # Of a version that was pruned already no manifest is read: there may be hundreds of them.
    if any(path.name in GRAPH_NAMES for path in large) and load_manifest(directory).kind == "regraph":
        large = [path for path in large if path.name not in GRAPH_NAMES]
    return large


def thin_version(directory: Path) -> bool:
    """Remove a version's weights and nothing else; as prune_version."""
    return _remove(directory, [path for path in (directory / WEIGHTS_NAME,) if path.exists()])


def is_open(directory: Path) -> bool:
    """Tell whether a client has the version open."""
    with _exclusive(directory / MANIFEST_NAME) as is_free:
        return not is_free


def _remove(directory: Path, doomed: list[Path]) -> bool:
    if not doomed:
        return False
    with _exclusive(directory / MANIFEST_NAME) as is_free:
        # Without its weights a version is not full: so they go first, and a crash leaves no doubt.
        for path in sorted(doomed, key=lambda path: path.name != WEIGHTS_NAME) if is_free else ():
            disk.unlink(path)
        atomic.fsync_dir(directory)
    return is_free


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[bool]:
    """Take the exclusive lock of a file unless a client holds the shared one; tell whether it was taken."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
