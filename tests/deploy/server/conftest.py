"""One server for the tests that only ask, and the version that it serves, loaded here to compare with."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy.runtime import LoadedVersion
from tests.deploy.server.servers import Server, serving_process


@pytest.fixture(scope="session")
def server(published: Path) -> Iterator[Server]:
    """A server of a store that nobody changes."""
    with serving_process(published) as process:
        yield process


@pytest.fixture
def http(server: Server) -> httpx.Client:
    """Asks it."""
    return server.client


@pytest.fixture(scope="session")
def loaded(published: Path) -> Iterator[LoadedVersion]:
    """What it serves."""
    with LoadedVersion((published / "current").resolve()) as version:
        yield version
