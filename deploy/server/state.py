"""What the handlers of one server process share."""

import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from starlette.requests import Request

from deploy.server.engine import Engine
from deploy.server.metrics import Metrics
from deploy.server.settings import Settings
from deploy.server.versions import Versions


@dataclass
class State:
    """Settings, the loaded versions, what computes, what counts, and whether the end has come."""

    settings: Settings
    versions: Versions
    engine: Engine
    metrics: Metrics
    is_draining: bool = False
    in_flight: int = 0
    body_bytes: int = 0  # of all requests in flight
    waiting: int = 0  # for another version
    started_at: float = field(default_factory=time.time)

    @property
    def is_ready(self) -> bool:
        """Tell whether new requests should come here."""
        return bool(self.versions.loaded) and not self.is_draining


def state_of(request: Request) -> State:
    """Return the state of the server that got this request."""
    state: State = request.app.state.server
    return state


def release() -> str:
    """Return the release of dynlora that runs."""
    try:
        return version("dynlora")
    except PackageNotFoundError:
        return "unknown"
