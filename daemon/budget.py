"""Whether there is room for what is about to start: asked before, so that nothing is begun that cannot end.

Two limits hold at once: what is free on the file system, less what others are promised (disk.reserve_bytes),
and what the home may take altogether (disk.max_home_bytes).
"""

import os
from collections.abc import Mapping
from pathlib import Path

from daemon.config import DiskConfig
from deploy.errors import StoreError
from deploy.manifest import Manifest

_FREE = "Free some space: `dynlora prune` and `dynlora thin` remove weights that can be rebuilt"
_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's own is


def version_bytes(live: Manifest) -> int:
    """What one more version of the live one's architecture takes."""
    return sum(record.bytes for record in live.files.values())


def needs_of_learning(live: Manifest) -> dict[str, int]:
    """What learning a batch on top of the live version takes at most, in bytes, by what it is for."""
    size = version_bytes(live)
    return {"the staged version": size, "checkpoints and the delta": size}


def needed_bytes(live: Manifest, config: DiskConfig) -> int:
    """How much must be free on the file system for learning to start."""
    return sum(needs_of_learning(live).values()) + config.reserve_bytes


def free_bytes(path: Path) -> int:
    """Free space that an unprivileged process may use on the file system of `path`."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def used_bytes(directory: Path) -> int:
    """What a folder and all in it take on the disk, in bytes; links are not followed."""
    total, todo = 0, [directory]
    while todo:
        try:
            entries = list(os.scandir(todo.pop()))
        except FileNotFoundError:
            continue
        for entry in entries:
            try:
                total += entry.stat(follow_symlinks=False).st_blocks * _BLOCK_BYTES
            except FileNotFoundError:
                continue
            if entry.is_dir(follow_symlinks=False):
                todo.append(Path(entry.path))
    return total


def check_space(
    home: Path, config: DiskConfig, needs: Mapping[str, int], what: str, *, waits: str = ""
) -> None:
    """Refuse to start what cannot be finished.

    Args:
        needs: bytes, by what they are for.
        what: is to be done; ends the sentence "the disk is too full to …".
        waits: a sentence on what becomes of it meanwhile.

    Raises:
        StoreError: there is less room than is needed; says for what, how much there is, and what to do.
    """
    needed = sum(needs.values())
    parts = ", ".join(f"{size:,} for {name}" for name, size in needs.items())
    need = f"{needed:,} bytes are needed" + (f" ({parts})" if len(needs) > 1 else "")
    then = f". {waits}" if waits else "."
    free = free_bytes(home)
    if free - config.reserve_bytes < needed:
        kept, lower = "", ""
        if config.reserve_bytes:
            kept = f", of which {config.reserve_bytes:,} stay free (disk.reserve_bytes)"
            lower = ", or lower disk.reserve_bytes"
        raise StoreError(
            f"the disk is too full to {what}: {need}, {free:,} are free on the file system of {home}"
            f"{kept}{then} {_FREE}{lower}."
        )
    if config.max_home_bytes and (used := used_bytes(home)) + needed > config.max_home_bytes:
        raise StoreError(
            f"the home is too full to {what}: {need}, it takes {used:,} already, and "
            f"{config.max_home_bytes:,} are allowed (disk.max_home_bytes){then} {_FREE}, or raise "
            "disk.max_home_bytes."
        )
