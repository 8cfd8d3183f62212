"""Who else hears what the daemon does: metrics and hooks. None of them can stop it or make it wait."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from daemon.config import Config
from daemon.hooks import Hooks


class Observers:
    """What watches one home from outside, as its configuration says.

    Args:
        tell: called with an event's name and fields, from `show` and `stop`.
    """

    def __init__(self, home: Path, config: Config, tell: Callable[..., None]) -> None:
        self._hooks = Hooks(home, config.hooks, tell)
        self._exposition = None
        if config.metrics.port or config.metrics.textfile:
            from daemon.exposition import Exposition  # prometheus_client comes with the daemon extra only

            self._exposition = Exposition(home, config.metrics)

    def reconfigure(self, config: Config) -> None:
        """The next event goes to these hooks; where metrics are read holds until the daemon ends."""
        self._hooks.config = config.hooks

    def told(self, event: str, fields: dict[str, Any]) -> None:
        """Something happened, and its effect is on disk."""
        self._hooks.told(event, fields)
        if self._exposition is not None:
            self._exposition.told(event, fields)

    def show(self, content: dict[str, Any], now: float) -> None:
        """What status.json says now; called with every round of the loop."""
        self._hooks.report()
        if self._exposition is not None:
            self._exposition.show(content, now)

    def is_idle(self) -> bool:
        """Whether every hook was called that is to be."""
        return self._hooks.is_idle()

    def stop(self) -> None:
        """The daemon ends."""
        self._hooks.stop()
        if self._exposition is not None:
            self._exposition.stop()
