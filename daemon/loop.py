"""`dynlora run`: the service in a loop, from the first signal handler to the last log line."""

import contextlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from daemon import logs
from daemon.config import Config
from daemon.config_sources import load_config
from daemon.errors import ConfigError, DaemonError
from daemon.lifecycle import Launch
from daemon.lock import HomeLock
from daemon.progress import View
from daemon.service import Service
from deploy.decode import formats
from deploy.notify import Notifier

TICK_SECONDS = 0.2
LOCK_SECONDS = 1.0
START_SECONDS = 600.0  # what a start may take, which reads every staged version a crash left
STOP_MARGIN_SECONDS = 30.0  # beyond the worker's own time, for the rest of an orderly end


@dataclass
class Signals:
    """Flags that the handlers set; the work happens in the loop."""

    name: str | None = None
    is_forced: bool = False
    wants_reload: bool = False

    def ask_reload(self, _number: int, _frame: FrameType | None) -> None:
        """SIGHUP where nobody sits at a terminal that could hang up."""
        self.wants_reload = True

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """The first signal asks for an orderly end, the second ends the waiting."""
        self.is_forced = self.name is not None
        self.name = signal.Signals(number).name


@contextlib.contextmanager
def capturing() -> Iterator[Signals]:
    """SIGTERM, SIGINT and SIGHUP only set flags within the block; then the earlier handlers are put back."""
    signals = Signals()
    handlers: dict[signal.Signals, Any] = dict.fromkeys((signal.SIGTERM, signal.SIGINT), signals.handle)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup: the terminal's end says nothing
        handlers[signal.SIGHUP] = signals.handle if sys.stderr.isatty() else signals.ask_reload
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(home: Path, config: Config, *, config_path: Path | None, view: View, once: bool) -> dict[str, Any]:
    """Serve a home until a signal comes, or with `once` until nothing is left to do.

    Returns:
        `outcomes`: what became of every batch that was finished; `signal`: what ended it, or None; `pinned`;
        `rests`: why batches wait that could be learnt, or None.

    Raises:
        LockError: another daemon has this home.
        DeployError: the version store cannot be used.
        DaemonError: with `once`, what keeps a batch from going on (a full disk, say); it stays where it is.
    """
    from daemon.watcher import Watcher  # watchdog comes with the daemon extra only

    notifier = Notifier()
    notifier.starting(START_SECONDS)
    # A long command may be at work alone; a service manager would tell of failed starts, so we wait.
    patience_seconds = START_SECONDS if notifier.is_heard else LOCK_SECONDS
    with HomeLock(home, patience_seconds=patience_seconds), capturing() as signals:
        wake = threading.Event()
        launch = Launch(
            config_path=config_path, wake=wake.set, keeps_standby=config.learning.standby and not once
        )
        service = Service(home, config, view=view, launch=launch)

        def should_stop() -> bool:
            notifier.alive()  # asked between two images: a large drop is progress, too
            return signals.name is not None

        service.reception.should_stop = should_stop
        service.start()
        with Watcher(config.inbox_dir(home), service.reception.wake, wake) as watcher:
            notifier.status(service.summary)  # whoever waits for the start may ask at once
            notifier.ready()
            formats()  # Pillow's readers: the first drop would wait for them
            try:
                while signals.name is None:
                    if signals.wants_reload:
                        signals.wants_reload = False
                        _reload(service, home, config_path, notifier)
                    is_busy = service.tick(time.time(), steady=time.monotonic())
                    watcher.renew(time.monotonic())
                    notifier.status(service.summary)
                    notifier.alive()
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
                notifier.stopping(service.stop_seconds + STOP_MARGIN_SECONDS)
                service.stop(lambda: signals.is_forced)
        found = {"outcomes": service.outcomes, "signal": signals.name, "pinned": service.is_pinned()}
        return found | {"rests": service.why_rest}


def _reload(service: Service, home: Path, config_path: Path | None, notifier: Notifier) -> None:
    """Read the configuration again; one that cannot be used changes nothing."""
    notifier.reloading()
    try:
        service.reconfigure(load_config(config_path, home))
    except ConfigError as error:
        logs.log("reload refused", level=logging.ERROR, why=str(error))
    notifier.ready()
