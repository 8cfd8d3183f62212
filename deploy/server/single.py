"""The server as a single process: deploy.client.Client follows `current`, this switches with it."""

import asyncio
import contextlib
import os
import socket
import time
from functools import partial

from deploy.client import Client, ClientEvent
from deploy.errors import ClientError
from deploy.server.banner import announce
from deploy.server.models import MODELS
from deploy.server.serving import Serving, on_signals, prepare_process, run_loop
from deploy.server.settings import Settings
from deploy.server.state import State
from deploy.server.telling import Teller
from deploy.server.versions import Slot


class Follower:
    """Brings what the client loads before the requests, on the event loop's thread."""

    def __init__(self, state: State, teller: Teller) -> None:
        self._state, self._teller = state, teller
        self._loop = asyncio.get_running_loop()
        self._client: Client | None = None

    async def start(self) -> None:
        """Load the first version.

        Raises:
            DeployError: it cannot be used.
        """
        settings = self._state.settings
        client = partial(Client, threads=1, trust=settings.trust, on_event=self._tell)
        self._client = await asyncio.to_thread(client, settings.serving_dir)
        self._adopt()

    async def stop(self) -> None:
        """Stop following; all slots must have been released."""
        if self._client is not None:
            await asyncio.to_thread(self._client.close)

    def _tell(self, event: ClientEvent) -> None:
        """Runs in the client's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(self._note, event)

    def _note(self, event: ClientEvent) -> None:
        metrics = self._state.metrics
        if event.kind == "loaded":
            metrics.swap_took("load", event.seconds)
            self._adopt()
        elif event.kind == "rejected":
            metrics.swap_failed()
            self._teller.rejected(event.version, event.detail)

    def _adopt(self) -> None:
        """Switch to the client's live version; holding it keeps it loaded until we let go."""
        if self._client is None:
            return
        held = contextlib.ExitStack()
        try:
            loaded = held.enter_context(self._client.hold())
        except ClientError:
            return
        versions = self._state.versions
        before = versions.loaded[0] if versions.loaded else None
        if before is not None and before.loaded is loaded:
            held.close()
            return
        started = time.monotonic()
        slot = Slot(loaded, held.close)
        versions.flip(slot)
        self._state.metrics.swapped(slot, before, MODELS)
        self._state.metrics.swap_took("switch", time.monotonic() - started)
        if before is not None:
            self._teller.serving(slot.version)


def serve_single(settings: Settings, listener: socket.socket) -> None:
    """Serve until a signal; returns when all is answered.

    Raises:
        DeployError: the live version cannot be used.
    """
    prepare_process()

    async def main() -> None:
        serving = Serving(settings, listener)
        teller = Teller(settings)
        follower = Follower(serving.state, teller)
        beating = asyncio.create_task(teller.beat())

        def stop() -> None:
            if serving.state.is_draining:
                os._exit(1)  # somebody asks a second time, and has reasons
            teller.stopping()
            serving.stop()

        on_signals(stop)
        try:
            teller.starting()
            await follower.start()

            async def say() -> None:
                version = serving.state.versions.live.version
                announce(settings, listener, version)
                teller.ready(version)

            await serving.run(say)
        finally:
            await serving.close()
            await follower.stop()
            beating.cancel()

    run_loop(main)
