"""Who else hears what the daemon does: metrics, hooks, MLflow. None of them can stop it or make it wait."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from daemon.config import Config
from daemon.hooks import Hooks
from daemon.tracking import Tracking


class Observers:
    """What watches one home from outside, as its configuration says.

    Args:
        tell: called with an event's name and fields, from `show` and `stop`.
    """

    def __init__(self, home: Path, config: Config, tell: Callable[..., None]) -> None:
        self._hooks = Hooks(home, config.hooks, tell)
        self._tracking = Tracking(home, config.mlflow, tell)
        self._exposition = None
        if config.metrics.port or config.metrics.textfile:
            from daemon.exposition import Exposition  # prometheus_client comes with the daemon extra only

            self._exposition = Exposition(home, config.metrics)

    @property
    def tracking_trouble(self) -> str | None:
        """Why MLflow does not get its runs at the moment; None when it does or need not."""
        return self._tracking.trouble

    @property
    def runs_waiting(self) -> int:
        """How many decided batches MLflow has no run of yet; 0 where it is to get none."""
        return self._tracking.waiting

    def reconfigure(self, config: Config) -> None:
        """The next event is told as this says; where metrics are read holds until the daemon ends."""
        self._hooks.config = config.hooks
        self._tracking.reconfigure(config.mlflow)

    def told(self, event: str, fields: dict[str, Any]) -> None:
        """Something happened, and its effect is on disk."""
        self._hooks.told(event, fields)
        self._tracking.told(event, fields)
        if self._exposition is not None:
            self._exposition.told(event, fields)

    def missed(self, event: dict[str, Any]) -> None:
        """Something had happened before a crash that nobody was told of."""
        self._tracking.told(event["event"], event)

    def show(self, content: dict[str, Any], now: float) -> None:
        """What status.json says now; called with every round of the loop."""
        self._hooks.report()
        self._tracking.tick(now)
        if self._exposition is not None:
            self._exposition.show(content | {"mlflow_waiting": self.runs_waiting}, now)

    def is_idle(self) -> bool:
        """Whether every hook was called that is to be, and every run logged that can be."""
        return self._hooks.is_idle() and self._tracking.is_idle()

    def stop(self) -> None:
        """The daemon ends."""
        self._hooks.stop()
        self._tracking.stop()
        if self._exposition is not None:
            self._exposition.stop()
