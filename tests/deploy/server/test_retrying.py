"""The parent of several workers and a version that none of them can load."""

import asyncio
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from deploy.server.banner import listen
from deploy.server.settings import Settings
from deploy.server.supervisor import Supervisor
from deploy.target import Target
from tests.deploy.swaps import DEADLINE_SECONDS, point

PAUSE_SECONDS = 0.25
ATTEMPTS = 3


class Noting(Supervisor):
    """Notes when it proposes which version, and stops after so many attempts at the second one."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.proposed: list[tuple[str, float]] = []

    def _propose(self, target: Target) -> None:
        self.proposed.append((target.directory.name, time.monotonic()))
        super()._propose(target)

    def _tell(self, epoch: int) -> None:
        super()._tell(epoch)
        point(self._settings.serving_dir, 1)

    def _give_up(self, epoch: int) -> None:
        super()._give_up(epoch)
        if len(self.proposed) > ATTEMPTS:
            self._stop.set()


def test_a_version_that_nobody_can_load_is_tried_again_after_each_pause(
    serving: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Never without a pause; it is reported once, and nothing is kept of an attempt."""
    monkeypatch.setattr("deploy.target._LONGEST_PAUSE_SECONDS", PAUSE_SECONDS)
    monkeypatch.setattr("deploy.server.supervisor.POLL_SECONDS", 0.02)
    (serving / "versions/1/weights.safetensors").write_bytes(b"damaged")
    settings = Settings(serving, port=0, workers=2, drain_seconds=0.0)

    async def life() -> Noting:
        with listen(settings) as listener:
            supervisor = Noting(settings, listener, tmp_path)
            await asyncio.wait_for(supervisor.run(), DEADLINE_SECONDS)
            return supervisor

    supervisor = asyncio.run(life())

    names, times = zip(*supervisor.proposed, strict=True)
    assert names == ("0", *["1"] * ATTEMPTS)
    assert all(later - earlier > PAUSE_SECONDS for earlier, later in pairwise(times[1:]))
    assert caplog.text.count("rejected") == 1
    assert [target.directory.name for target in supervisor._targets.values()] == ["0"]
    assert len(supervisor._coordination.dropped) == 1
