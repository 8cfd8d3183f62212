"""The parent of several workers: follows `current`, lets them switch together, replaces those that die.

Loads no version itself. What follows from what is in deploy.server.coordination; here are the processes,
the sockets and the clock.
"""

import asyncio
import json
import logging
import os
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.errors import DeployError, ServerError
from deploy.server.banner import announce
from deploy.server.coordination import Coordination, Order
from deploy.server.metrics import MULTIPROCESS_VARIABLE
from deploy.server.serving import on_signals, prepare_process, run_loop
from deploy.server.settings import Settings
from deploy.server.telling import Teller
from deploy.target import Failure, Target, resolve_current, state_of

POLL_SECONDS = 0.25
_LOAD_SECONDS = 300.0  # a worker that has not loaded a version by then is replaced,
_LATE_SECONDS = 5.0  # and once another one has, by so much and twice the time that one took
_CLOSE_SECONDS = 5.0  # one that has not closed by then hangs: it is killed, and cannot answer any more
_LONGEST_PAUSE_SECONDS = 30.0

_log = logging.getLogger("dynlora.server")


@dataclass(eq=False)
class _Child:
    process: asyncio.subprocess.Process
    writer: asyncio.StreamWriter


class Supervisor:
    """Runs ``settings.workers`` processes on one listening socket."""

    def __init__(self, settings: Settings, listener: socket.socket, metrics_dir: Path) -> None:
        self._settings, self._listener, self._metrics_dir = settings, listener, metrics_dir
        self._teller = Teller(settings)
        self._coordination = Coordination()
        self._targets: dict[int, Target] = {}  # by epoch: what is agreed, the one before, what is proposed
        self._reasons: dict[int, str] = {}  # why an epoch could not be loaded, by epoch
        self._children: dict[int, _Child] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = 0  # workers so far
        self._epoch = 0
        self._failure: Failure | None = None
        self._attempt: object = None  # the state of what is proposed, to tell whether it was repaired
        self._phase: tuple[object, float] = (None, 0.0)  # what is waited for, and since when
        self._first_took: float | None = None  # seconds until the first worker had loaded what is proposed
        self._told: int | None = None
        self._stop = asyncio.Event()
        self._quit = False

    async def run(self) -> None:
        """Serve until a signal, then wait for the last answers.

        Raises:
            ServerError: no worker can load the version that is live at the start.
        """
        on_signals(self._on_signal)
        self._teller.starting()
        beating = asyncio.create_task(self._teller.beat())
        self._propose(resolve_current(self._settings.serving_dir))
        for _ in range(self._settings.workers):
            self._spawn(0.0)
        try:
            while not self._stop.is_set():
                self._check()
                await _wait(self._stop, POLL_SECONDS)
        finally:
            await self._end()
            beating.cancel()

    def _on_signal(self) -> None:
        self._quit = self._stop.is_set()
        self._stop.set()
        if self._quit:
            self._kill(list(self._children))

    def _check(self) -> None:
        """Look once: at what was agreed, at who is late, at `current`."""
        coordination = self._coordination
        if self._epoch in coordination.dropped and self._epoch in self._targets:
            self._give_up(self._epoch)
        if coordination.agreed is not None and coordination.agreed != self._told:
            self._tell(coordination.agreed)
        self._kill_the_late()
        if coordination.proposed is None and coordination.agreed is not None:
            self._look()

    def _give_up(self, epoch: int) -> None:
        """Nobody could load it: pause before the next attempt, and report it unless it was reported last."""
        reason = self._reasons.get(epoch, "no worker could load it")
        if self._coordination.agreed is None:
            raise ServerError(f"the live version cannot be served: {reason}")
        version = self._targets.pop(epoch).directory.name
        is_news = self._failure is None or self._failure.state != self._attempt
        self._failure = Failure.of(DeployError(reason), self._attempt, self._failure, time.monotonic())
        if is_news:
            _log.warning("version %s rejected: %s", version, reason)
            self._teller.rejected(version, reason)

    def _tell(self, epoch: int) -> None:
        self._failure = None
        previous = self._epoch_before(epoch)
        self._targets = {e: target for e, target in self._targets.items() if e >= (previous or epoch)}
        version = int(self._targets[epoch].directory.name)
        if self._told is None:
            announce(self._settings, self._listener, version)
            self._teller.ready(version)
        else:
            self._teller.serving(version)
            _log.info("version %s is live in all workers", version)
        self._told = epoch

    def _look(self) -> None:
        """Propose what `current` leads to, if it is something else and not known to be bad."""
        try:
            target = resolve_current(self._settings.serving_dir)
            if target == self._targets[self._told or 1]:
                return
            attempt = (target, state_of(target.directory))
        except (DeployError, OSError) as error:
            if self._failure is None or self._failure.state != str(error):
                _log.warning("`current` cannot be followed: %s", error)
                self._failure = Failure.of(error, str(error), None, time.monotonic())
            return
        if self._failure is None or not self._failure.covers(attempt, time.monotonic()):
            self._attempt = attempt
            self._propose(target)

    def _propose(self, target: Target) -> None:
        self._epoch += 1
        self._targets[self._epoch] = target
        self._reasons.clear()
        self._first_took, self._phase = None, ((self._epoch, False), time.monotonic())
        self._send(self._coordination.propose(self._epoch))

    def _kill_the_late(self) -> None:
        coordination = self._coordination
        is_closing = coordination.is_closing
        phase = (coordination.proposed, is_closing)
        if phase != self._phase[0]:
            self._phase = (phase, time.monotonic())
        patience = _CLOSE_SECONDS if is_closing else _LOAD_SECONDS
        if not is_closing and self._first_took is not None:
            patience = _LATE_SECONDS + 3 * self._first_took
        if coordination.has_leaving:  # what is in flight may take its whole time
            patience += self._settings.drain_seconds + self._settings.limits.request_seconds
        if time.monotonic() - self._phase[1] > patience:
            self._kill(coordination.awaited())

    def _kill(self, numbers: list[int]) -> None:
        for number in numbers:
            child = self._children.get(number)
            if child is not None and child.process.returncode is None:
                if not self._stop.is_set():
                    _log.warning("worker %s does not answer and is replaced", child.process.pid)
                child.process.kill()

    def _spawn(self, pause_seconds: float) -> None:
        self._started += 1
        task = asyncio.create_task(self._tend(self._started, pause_seconds))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start_process(self, theirs: socket.socket) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "deploy.server.worker"),
            *(str(theirs.fileno()), str(self._listener.fileno())),
            pass_fds=(theirs.fileno(), self._listener.fileno()),
            stdin=asyncio.subprocess.DEVNULL,
            env=os.environ | {MULTIPROCESS_VARIABLE: str(self._metrics_dir)},
            start_new_session=True,  # Ctrl-C at a terminal comes to us alone
        )

    async def _tend(self, number: int, pause_seconds: float) -> None:
        """Start a worker, listen to it until it ends, and start another one in its place."""
        await _wait(self._stop, pause_seconds)
        if self._stop.is_set():
            return
        began = time.monotonic()
        ours, theirs = socket.socketpair()
        try:
            process = await self._start_process(theirs)
        except OSError as error:  # no memory or no process to be had: later, perhaps
            ours.close()
            _log.warning("a worker cannot be started: %s", error)
            self._spawn(min(_LONGEST_PAUSE_SECONDS, 2 * pause_seconds + 0.1))
            return
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        writer.write(json.dumps(self._settings.to_json()).encode() + b"\n")
        self._children[number] = _Child(process, writer)
        self._send(self._coordination.add(number))
        if self._stop.is_set():
            self._send([Order(number, "leave", self._epoch)])
        await self._listen(number, reader)
        status = await process.wait()  # only a process that has ended surely answers no more
        self._forget(number, process.pid)
        if not self._stop.is_set():
            _log.warning("worker %s ended with status %s and is replaced", process.pid, status)
            is_sound = time.monotonic() - began > _LONGEST_PAUSE_SECONDS
            pause = 0.1 if is_sound else min(_LONGEST_PAUSE_SECONDS, 2 * pause_seconds + 0.1)
            self._spawn(pause)

    async def _listen(self, number: int, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                self._hear(number, json.loads(line))
        except (OSError, ValueError):
            self._kill([number])  # it was cut off in the middle of a word

    def _hear(self, number: int, report: dict[str, Any]) -> None:
        coordination, epoch = self._coordination, report["epoch"]
        if report["event"] == "loaded":
            if epoch == coordination.proposed and self._first_took is None:
                self._first_took = time.monotonic() - self._phase[1]
            self._send(coordination.loaded(number, epoch))
        elif report["event"] == "closed":
            self._send(coordination.closed(number, epoch))
        else:
            self._reasons[epoch] = report["reason"]
            self._send(coordination.failed(number, epoch))

    def _forget(self, number: int, pid: int) -> None:
        from prometheus_client import multiprocess

        child = self._children.pop(number)
        child.writer.close()
        multiprocess.mark_process_dead(pid, str(self._metrics_dir))  # type: ignore[no-untyped-call]
        self._send(self._coordination.died(number))

    def _send(self, orders: list[Order]) -> None:
        first = min(self._children, default=0)
        for order in orders:
            message: dict[str, Any] = {"verb": order.verb, "epoch": order.epoch}
            message["counts"] = order.worker == first
            if order.verb == "load":
                message |= {"directory": str(self._targets[order.epoch].directory), "previous": None}
                if order.epoch == self._coordination.agreed:
                    message["previous"] = self._previous_of(order.epoch)
            child = self._children.get(order.worker)
            if child is not None:
                child.writer.write(json.dumps(message).encode() + b"\n")

    def _previous_of(self, epoch: int) -> str | None:
        """The version that was live before, for a worker that comes later."""
        before = self._epoch_before(epoch)
        return str(self._targets[before].directory) if before else None

    def _epoch_before(self, epoch: int) -> int | None:
        """The epoch that was agreed before; epochs that were given up are in no list any more."""
        return max((earlier for earlier in self._targets if earlier < epoch), default=None)

    async def _end(self) -> None:
        """Let all workers drain; kill what takes longer than any request may."""
        self._stop.set()
        self._teller.stopping()
        self._listener.close()
        self._send([Order(number, "leave", self._epoch) for number in self._children])
        if self._tasks:
            seconds = self._settings.drain_seconds + self._settings.limits.request_seconds + 10
            await asyncio.wait(set(self._tasks), timeout=seconds)
            self._kill(list(self._children))
            await asyncio.gather(*self._tasks)
        if self._quit:
            raise ServerError("interrupted twice: requests may have been lost")


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Wait until the event is set, but not longer than that."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return


def serve_workers(settings: Settings, listener: socket.socket) -> None:
    """Serve with several processes until a signal; returns when all is answered.

    Raises:
        DeployError: the live version cannot be used.
    """
    prepare_process()
    with tempfile.TemporaryDirectory(prefix="dynlora-metrics-") as directory:

        async def main() -> None:
            await Supervisor(settings, listener, Path(directory)).run()

        run_loop(main)
