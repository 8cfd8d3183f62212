"""Fixtures of the client's tests: a store of three versions, and a client that follows it."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.client import Client, ClientEvent
from tests.deploy.swaps import PUBLISHED, point


@pytest.fixture(scope="session")
def published(
    version_dir: Path,
    publish_random_version: Callable[[Path, int], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A store with versions 0, 1 and 2 of different weights; not to be changed."""
    serving = tmp_path_factory.mktemp("published") / "serving"
    shutil.copytree(version_dir.parent.parent, serving, symlinks=True)
    for seed in range(1, PUBLISHED):
        publish_random_version(serving, seed)
    return serving


@pytest.fixture
def serving(published: Path, tmp_path: Path) -> Path:
    """A copy of it that points at version 0."""
    own = tmp_path / "serving"
    shutil.copytree(published, own, symlinks=True)
    point(own, 0)
    return own


@pytest.fixture
def events() -> list[ClientEvent]:
    """What the client reports."""
    return []


@pytest.fixture
def following(serving: Path, events: list[ClientEvent]) -> Iterator[Client]:
    """A client of `serving` that polls quickly."""
    with Client(serving, poll_seconds=0.02, on_event=events.append) as own:
        yield own
