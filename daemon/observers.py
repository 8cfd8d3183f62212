"""Who else hears what the daemon does: metrics. None of them can stop it or make it wait."""

from pathlib import Path
from typing import Any

from daemon.config import Config


class Observers:
    """What watches one home from outside, as its configuration says."""

    def __init__(self, home: Path, config: Config) -> None:
        self._exposition = None
        if config.metrics.port or config.metrics.textfile:
            from daemon.exposition import Exposition  # prometheus_client comes with the daemon extra only

            self._exposition = Exposition(home, config.metrics)

    def told(self, event: str, fields: dict[str, Any]) -> None:
        """Something happened, and its effect is on disk."""
        if self._exposition is not None:
            self._exposition.told(event, fields)

    def show(self, content: dict[str, Any], now: float) -> None:
        """What status.json says now; called with every round of the loop."""
        if self._exposition is not None:
            self._exposition.show(content, now)

    def stop(self) -> None:
        """The daemon ends."""
        if self._exposition is not None:
            self._exposition.stop()
