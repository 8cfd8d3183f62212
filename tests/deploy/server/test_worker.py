"""One worker by itself: what it holds after its supervisor's orders came in an unlucky order."""

import asyncio
from pathlib import Path

import pytest

from deploy.runtime import LoadedVersion
from deploy.server.metrics import Metrics
from deploy.server.serving import Serving
from deploy.server.settings import Settings
from deploy.server.state import State
from deploy.server.versions import Slot, Versions
from deploy.server.worker import Worker, _load_slot


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


def test_a_worker_asked_about_many_labels_embeds_the_latest_and_is_not_late(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would wait for it, and take it for one that hangs."""
    monkeypatch.setattr("deploy.server.worker._LABEL_SECONDS", 0.02)
    labels = [f"thing {number}" for number in range(4096)]

    with _load_slot(published / "versions/1", labels).loaded as loaded:
        ready = loaded.remembered_labels()

    assert 0 < len(ready) < len(labels)
    assert ready == labels[-len(ready) :]


def test_a_few_labels_are_all_ready_in_the_next_version(published: Path) -> None:
    """In the order in which they were asked about."""
    labels = [f"thing {number}" for number in range(20)]

    with _load_slot(published / "versions/1", labels).loaded as loaded:
        assert loaded.remembered_labels() == labels
