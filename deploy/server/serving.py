"""One server process: uvicorn around the application, from the first version to the last answer.

The end is graceful. On SIGTERM or SIGINT the server says that it is not ready and asks every
connection to close after its next answer, for ``drain_seconds``; then it stops listening, answers what
it has taken on, and is done. A socket that systemd holds is let go of at once: who connects from then on is
answered by the next process, and who is connected already has ``drain_seconds`` to ask.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from deploy.server.app import build_app
from deploy.server.connections import connections_within
from deploy.server.engine import Engine
from deploy.server.metrics import Metrics
from deploy.server.settings import Settings
from deploy.server.state import State, release
from deploy.server.versions import Versions

_SWITCH_SECONDS = 0.001

_log = logging.getLogger("dynlora.server")


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: they would end the process by the signal, not by status 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to us."""
        yield

    def stop_accepting(self) -> None:
        """Leave new connections in the kernel's queue; those that are there go on."""
        for server in getattr(self, "servers", ()):  # there are none before the start
            server.close()


class Serving:
    """Serves one state on one listening socket until it is told to stop."""

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self.state = State(settings, Versions(), Engine(settings), Metrics(release()))
        self._listener = listener
        self._server = _Server(_uvicorn_config(build_app(self.state), settings))
        self._draining: asyncio.Task[None] | None = None

    async def run(self, started: Callable[[], Awaitable[None]] | None = None) -> None:
        """Serve; returns when the last answer is given. A version must be live already."""
        gc.collect()
        gc.freeze()  # what was imported and loaded stays: the collector need not look at it again and again
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        while not self._server.started and not serving.done():  # noqa: ASYNC110 - uvicorn sets a flag
            await asyncio.sleep(0.001)
        if started is not None:
            await started()
        await serving

    def stop(self) -> None:
        """Begin to drain, if that has not begun."""
        if not self.state.is_draining:
            self.state.is_draining = True
            self.state.versions.wake()  # whoever waits for another version would hold up the end
            if self.state.settings.is_inherited:
                self._server.stop_accepting()
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        seconds = self.state.settings.drain_seconds
        _log.info("draining: not ready any more, listening for another %g seconds", seconds)
        await asyncio.sleep(seconds)
        self._server.should_exit = True

    async def close(self) -> None:
        """Free versions and threads; nothing may be running."""
        await self.state.versions.shut()
        await asyncio.to_thread(self.state.engine.close)


def _uvicorn_config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=connections_within(settings.limits),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(settings.limits.request_seconds) + 1,
    )


def prepare_process() -> None:
    """Set up what counts for a whole process that serves."""
    # A thread that comes back from ONNX Runtime asks for Python's lock; the default is to let it wait 5 ms.
    sys.setswitchinterval(_SWITCH_SECONDS)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


def on_signals(handler: Callable[[], None]) -> None:
    """Call ``handler`` in the event loop on SIGTERM and SIGINT."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handler)


def run_loop(main: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine on uvloop."""
    import uvloop

    async def wrapped() -> None:
        await main()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(wrapped())
