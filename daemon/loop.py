"""`dynlora run`: the service in a loop, from the first signal handler to the last log line."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from daemon import logs
from daemon.config import Config
from daemon.errors import DaemonError
from daemon.lifecycle import Launch
from daemon.lock import HomeLock
from daemon.progress import View
from daemon.service import Service

TICK_SECONDS = 0.2


@dataclass
class Signals:
    """Flags that the handlers set; the work happens in the loop."""

    name: str | None = None
    is_forced: bool = False

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """The first signal asks for an orderly end, the second ends the waiting."""
        self.is_forced = self.name is not None
        self.name = signal.Signals(number).name


@contextlib.contextmanager
def capturing() -> Iterator[Signals]:
    """SIGTERM and SIGINT only set flags within the block; then the earlier handlers are put back."""
    signals = Signals()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, signals.handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(home: Path, config: Config, *, config_path: Path | None, view: View, once: bool) -> dict[str, Any]:
    """Serve a home until a signal comes, or with `once` until nothing is left to do.

    Returns:
        `outcomes`: what became of every batch that was finished; `signal`: what ended it, or None; `pinned`.

    Raises:
        LockError: another daemon has this home.
        DeployError: the version store cannot be used.
        DaemonError: with `once`, what keeps a batch from going on (a full disk, say); it stays where it is.
    """
    from daemon.watcher import Watcher  # watchdog comes with the daemon extra only

    with HomeLock(home), capturing() as signals:
        wake = threading.Event()
        launch = Launch(
            config_path=config_path, wake=wake.set, keeps_standby=config.learning.standby and not once
        )
        service = Service(home, config, view=view, launch=launch)
        service.reception.should_stop = lambda: signals.name is not None
        service.start()
        with Watcher(config.inbox_dir(home), service.reception.wake, wake):
            try:
                while signals.name is None:
                    is_busy = service.tick(time.time())
                    if once and signals.name is None and (why := service.why_stuck()) is not None:
                        raise DaemonError(why)
                    if once and service.is_idle():
                        break
                    if not is_busy:
                        wake.wait(TICK_SECONDS)
                    wake.clear()
            finally:
                if signals.name is not None:
                    logs.log("stopping", signal=signals.name)
                service.stop(lambda: signals.is_forced)
        return {"outcomes": service.outcomes, "signal": signals.name, "pinned": service.is_pinned()}
