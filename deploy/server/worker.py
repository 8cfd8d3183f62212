"""One of several server processes. Does what the supervisor orders over a socket, and serves meanwhile.

    python -m deploy.server.worker CONTROL_DESCRIPTOR LISTENER_DESCRIPTOR

Lines of JSON go both ways. The first one brings the settings, the token among them, so that it stands on
no command line. Without a supervisor nobody could say which version is agreed: then the worker drains.
"""

import asyncio
import contextlib
import json
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.runtime import LoadedVersion
from deploy.server.models import MODELS
from deploy.server.serving import Serving, on_signals, prepare_process, run_loop
from deploy.server.settings import Settings
from deploy.server.versions import Slot
from deploy.signing import TrustedKeys

_MAX_LINE_BYTES = 1 << 20
_LABEL_SECONDS = 2.0  # below what the supervisor grants a worker beyond what the first one took to load
_LABELS_AT_ONCE = 8  # in one run; the clock is looked at in between


class Worker:
    """Carries out orders, in the order in which they come; see deploy.server.coordination."""

    def __init__(self, serving: Serving, writer: asyncio.StreamWriter) -> None:
        self._serving = serving
        self._writer = writer
        self._slots: dict[int, Slot] = {}
        self._previous: Slot | None = None  # what a worker that this one replaces had beside its live version
        self._trust: TrustedKeys | None = None  # read with the first version, and kept like a client's
        self._loading = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def follow(self, reader: asyncio.StreamReader) -> None:
        """Carry out orders until the supervisor is gone."""
        while line := await reader.readline():
            self._do(json.loads(line))
        self._leave()

    async def serve(self) -> None:
        """Serve from the first flip on, until told to leave."""
        await self._started
        if not self._serving.state.is_draining:
            await self._serving.run()

    def _do(self, order: dict[str, Any]) -> None:
        versions, epoch = self._serving.state.versions, int(order["epoch"])
        match order["verb"]:
            case "load":
                task = asyncio.create_task(self._load(epoch, order))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case "close":
                versions.close()
                self._say("closed", epoch)
            case "flip":
                self._flip(epoch, counts=order["counts"])
            case "drop":
                if slot := self._slots.pop(epoch, None):
                    slot.release()
            case "leave":
                self._leave()

    async def _load(self, epoch: int, order: dict[str, Any]) -> None:
        started = time.monotonic()
        labels = [label for slot in self._serving.state.versions.loaded[:1]
                  for label in slot.loaded.remembered_labels()]  # fmt: skip
        async with self._loading:
            try:
                self._slots[epoch] = await asyncio.to_thread(self._load_trusted, order["directory"], labels)
            except Exception as error:  # noqa: BLE001 - whatever it is, the supervisor decides what follows
                if order["counts"]:
                    self._serving.state.metrics.swap_failed()
                self._say("failed", epoch, reason=str(error) or type(error).__name__)
                return
            if order.get("previous"):
                with contextlib.suppress(Exception):  # pruned meanwhile: then nobody may ask for it
                    self._previous = await asyncio.to_thread(self._load_trusted, order["previous"], ())
        self._serving.state.metrics.swap_took("load", time.monotonic() - started)
        self._say("loaded", epoch)

    def _load_trusted(self, directory: str, labels: Sequence[str]) -> Slot:
        """Load a version, if one of the keys that are trusted has signed it, where there are such keys."""
        path = self._serving.state.settings.trust
        if path is not None and self._trust is None:
            self._trust = TrustedKeys.load(path)
        return _load_slot(Path(directory), labels, self._trust)

    def _flip(self, epoch: int, *, counts: bool) -> None:
        started = time.monotonic()
        versions = self._serving.state.versions
        before = versions.loaded[0] if versions.loaded else None
        slot = self._slots.pop(epoch)
        # A worker that came while this epoch was brought in may have loaded the one before for nothing.
        earlier = [self._slots.pop(number) for number in sorted(self._slots) if number < epoch]
        held = [*([self._previous] if self._previous else []), *earlier]
        self._previous = None
        versions.flip(slot)
        if before is None and held:
            versions.keep_previous(held.pop())
        for passed_over in held:
            passed_over.release()
        self._serving.state.metrics.swapped(slot, before, MODELS, counts=counts)
        self._serving.state.metrics.swap_took("switch", time.monotonic() - started)
        if not self._started.done():
            self._started.set_result(None)

    def _leave(self) -> None:
        if self._started.done():
            self._serving.stop()
        else:
            self._serving.state.is_draining = True
            self._started.set_result(None)

    def stop(self) -> None:
        """Leave, because of a signal."""
        self._leave()

    def _say(self, event: str, epoch: int, **more: Any) -> None:
        self._writer.write(json.dumps({"event": event, "epoch": epoch, **more}).encode() + b"\n")


def _load_slot(directory: Path, labels: Sequence[str], trust: TrustedKeys | None = None) -> Slot:
    """Load, check and warm a version; ``labels`` were asked about lately, the latest last.

    Raises:
        DeployError: it cannot be used.
    """
    loaded = LoadedVersion(directory, threads=1, trust=trust)
    try:
        loaded.check_parity()
        loaded.warm_up()
        _embed_latest(loaded, labels)
    except BaseException:
        loaded.close()
        raise
    return Slot(loaded, loaded.close)


def _embed_latest(loaded: LoadedVersion, labels: Sequence[str]) -> None:
    """Embed labels, the latest first, for so long that no worker is late because it was asked about many.

    What is left over is embedded when somebody asks about it, like any new label.
    """
    ends = time.monotonic() + _LABEL_SECONDS
    left = len(labels)
    while left and time.monotonic() < ends:
        begin = max(0, left - _LABELS_AT_ONCE)
        loaded.warm_up((), labels[begin:left])
        left = begin
    loaded.warm_up((), labels[left:])  # computes nothing: the latest are to be remembered as the latest


def main(control_descriptor: int, listener_descriptor: int) -> None:
    """Serve until told to leave."""
    prepare_process()
    control = socket.socket(fileno=control_descriptor)
    listener = socket.socket(fileno=listener_descriptor)

    async def run() -> None:
        reader, writer = await asyncio.open_connection(sock=control, limit=_MAX_LINE_BYTES)
        settings = Settings.from_json(json.loads(await reader.readline()))
        serving = Serving(settings, listener)
        worker = Worker(serving, writer)
        on_signals(worker.stop)
        following = asyncio.create_task(worker.follow(reader))
        await worker.serve()
        await serving.close()
        following.cancel()
        writer.close()

    run_loop(run)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
