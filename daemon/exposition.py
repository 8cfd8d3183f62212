"""Where the metrics are read: a port of this machine, a textfile for node_exporter, or both.

Trouble here is told in the log and tried again; it never becomes trouble of the daemon.
"""

import logging
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIServer

from daemon import logs
from daemon.config import MetricsConfig
from daemon.metrics import Metrics
from daemon.spool import Spool
from deploy import atomic, disk
from deploy.errors import DeployError
from deploy.store import VersionStore

ADDRESS = "127.0.0.1"
SHOW_SECONDS = 2.0  # between two looks at the home
RETRY_SECONDS = 30.0  # after a port or a folder could not be used


class Exposition:
    """Keeps the metrics of one home up to date and readable while it is configured."""

    def __init__(self, home: Path, config: MetricsConfig) -> None:
        self._config = config
        spool, store = Spool(home), VersionStore(home / "serving")
        self._metrics = Metrics(spool, store, version("dynlora"))
        self._server: tuple[WSGIServer, threading.Thread] | None = None
        self._shown_at = self._tried_at = float("-inf")
        self._why: str | None = None  # the last trouble, told once

    @property
    def port(self) -> int | None:
        """The port that is listened on; None while there is none."""
        return None if self._server is None else self._server[0].server_port

    def told(self, event: str, fields: dict[str, Any]) -> None:
        """Count an event."""
        self._metrics.told(event, fields)

    def show(self, content: dict[str, Any], now: float) -> None:
        """Take over what is going on, every two seconds; steps are counted each time."""
        self._metrics.count_steps(content["working"] or {})
        if 0 <= now - self._shown_at < SHOW_SECONDS:
            return
        self._shown_at = now
        try:
            self._metrics.show(content, now)
            if self._why is None or now - self._tried_at >= RETRY_SECONDS:
                self._tried_at = now
                self._publish()
                self._why = None
        except (OSError, DeployError) as error:
            if str(error) != self._why:
                logs.log("metrics not readable", level=logging.ERROR, why=str(error))
            self._why = str(error)

    def _publish(self) -> None:
        if self._config.textfile:
            path = Path(self._config.textfile)
            temporary = atomic.temporary_beside(path)
            try:
                disk.write_new(temporary, self._metrics.text())
                temporary.chmod(0o644)  # node_exporter has another user
                disk.rename(temporary, path)
            finally:
                disk.unlink(temporary, missing_ok=True)
        if self._config.port and self._server is None:
            from prometheus_client import start_http_server

            self._server = start_http_server(self._config.port, ADDRESS, self._metrics.registry)
            logs.log("metrics", address=f"http://{ADDRESS}:{self._config.port}/metrics")

    def stop(self) -> None:
        """Close the port. The textfile stays: what it says last is old, and an alert tells so."""
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            thread.join()
            server.server_close()
            self._server = None
