"""What the server tells the service manager: that it is ready, what it serves, that it is alive, its end."""

import asyncio

from deploy.notify import Notifier
from deploy.server.settings import Settings

START_SECONDS = 300.0  # a large version is read, hashed and warmed before the first answer
_CLOSING_SECONDS = 10.0  # beyond what requests may take: threads and sessions are freed
_BEAT_SECONDS = 1.0


class Teller:
    """Speaks for the one process that the service manager started; nobody is told where there is none."""

    def __init__(self, settings: Settings, notifier: Notifier | None = None) -> None:
        self._settings = settings
        self._notifier = notifier or Notifier()
        self._serves = ""
        self._is_stopping = False

    def starting(self) -> None:
        """The first version is being loaded."""
        self._notifier.starting(START_SECONDS)
        self._notifier.status("loading the first version")

    def ready(self, version: int) -> None:
        """The first version answers."""
        self.serving(version)  # whoever waits for the start may ask at once
        self._notifier.ready()

    def serving(self, version: int) -> None:
        """Another version answers."""
        workers = self._settings.workers
        self._serves = f"serving version {version}" + (f" in {workers} workers" if workers > 1 else "")
        self._notifier.status(self._serves)

    def rejected(self, version: int | str | None, reason: str) -> None:
        """A version could not be loaded; the one before it goes on answering."""
        what = "the next version" if version is None else f"version {version}"
        self._notifier.status(f"{self._serves}; {what} was rejected: {reason}")

    def stopping(self) -> None:
        """The last answers are being given; also how long that may take."""
        self._is_stopping = True
        settings = self._settings
        seconds = settings.drain_seconds + settings.limits.request_seconds + _CLOSING_SECONDS
        self._notifier.stopping(seconds)
        self._notifier.status("giving the last answers")

    async def beat(self) -> None:
        """Feed the watchdog for as long as the event loop goes round; at the end nobody watches any more."""
        while not self._is_stopping:
            self._notifier.alive()
            await asyncio.sleep(_BEAT_SECONDS)
