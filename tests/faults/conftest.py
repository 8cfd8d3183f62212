"""Where lives are lived."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")


@pytest.fixture
def room() -> Iterator[Path]:
    """A folder in memory, where there is one: a life takes half the time there.

    Nothing is lost by it: what a power cut does is worked out from the calls, not tried on a disk.
    """
    with tempfile.TemporaryDirectory(prefix="dynlora-", dir=MEMORY if MEMORY.is_dir() else None) as path:
        yield Path(path)
