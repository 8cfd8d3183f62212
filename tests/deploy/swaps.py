"""What the tests of the client share: versions made live by hand, and waiting for what follows."""

import contextlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deploy import atomic, client
from deploy.client import ClientEvent
from deploy.runtime import LoadedVersion

PUBLISHED = 3  # versions 0, 1 and 2
DEADLINE_SECONDS = 30


def _png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [_png(seed) for seed in range(3)]


def point(serving: Path, version: int) -> None:
    """Make a version live, as the publisher does."""
    atomic.replace_symlink(serving / "current", f"versions/{version}")


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until it holds, or fail."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def kinds(events: list[ClientEvent]) -> list[tuple[str, int | None]]:
    """Return what happened to which version, in order."""
    return [(event.kind, event.version) for event in events]


def count_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by a version's name whenever it is loaded."""
    loads: list[str] = []

    def load(directory: Path, **options: Any) -> LoadedVersion:
        loads.append(directory.name)
        return LoadedVersion(directory, **options)

    monkeypatch.setattr(client, "LoadedVersion", load)
    return loads


def opened(pid: int | str = "self") -> list[str]:
    """Return the paths a process has open; none where it has ended. What it closes meanwhile is left out."""
    paths = []
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                paths.append(str(link.readlink()))
    return paths


def open_below(directory: Path) -> list[str]:
    """Return this process's descriptors and memory maps that lead below a directory."""
    maps = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    return [name for name in opened() + maps if name.startswith(f"{directory}/")]
