"""One worker by itself: what it holds after its supervisor's orders came in an unlucky order."""

import asyncio
from pathlib import Path

from deploy.runtime import LoadedVersion
from deploy.server.metrics import Metrics
from deploy.server.serving import Serving
from deploy.server.settings import Settings
from deploy.server.state import State
from deploy.server.versions import Slot, Versions
from deploy.server.worker import Worker


class Held(Serving):
    """Versions and metrics, and no socket."""

    def __init__(self, serving_dir: Path) -> None:
        self.state = State(Settings(serving_dir), Versions(), engine=None, metrics=Metrics("test"))  # type: ignore[arg-type]


def test_a_worker_that_came_during_a_switch_serves_the_version_before_and_frees_the_one_before_that(
    published: Path,
) -> None:
    """It was told to load 1, with 0 beside it, and 2; 2 was agreed before it had loaded 1."""
    freed: list[int] = []

    def slot(version: int) -> Slot:
        loaded = LoadedVersion(published / "versions" / str(version), threads=1)

        def release() -> None:
            freed.append(version)
            loaded.close()

        return Slot(loaded, release)

    async def life() -> list[int]:
        serving = Held(published)
        worker = Worker(serving, writer=None)  # type: ignore[arg-type]
        worker._slots = {1: slot(1), 2: slot(2)}
        worker._previous = slot(0)
        worker._do({"verb": "flip", "epoch": 2, "counts": False})
        served = [each.version for each in serving.state.versions.loaded]
        await serving.state.versions.shut()
        return served

    assert asyncio.run(life()) == [2, 1]
    assert sorted(freed) == [0, 1, 2]
