"""Tell others what became of a batch: a command of theirs, a webhook, or both.

In a thread of its own, one event after the other in their order: nothing here can make the daemon wait or
fail. What was not delivered after some tries is told in events.jsonl, which has every event anyway; an event
that a kill of the daemon cut off is not delivered again.
"""

import contextlib
import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from daemon.config import HooksConfig

FIRST_PAUSE_SECONDS = 1.0  # before the second try; doubles with each further one
STOP_SECONDS = 10.0  # for what is left when the daemon ends
_WAITING_AT_MOST = 1000  # events; more than this means that the other side has been down for long
_LAST_WORDS = 300  # characters of what a command that failed said
_JOIN_SECONDS = 5.0  # for the thread, once its try was cut
Tell = Callable[..., None]
Send = Callable[[HooksConfig, Mapping[str, Any]], None]


class HookError(Exception):
    """A hook did not take an event; says why."""


@dataclass(frozen=True)
class _Outcome:
    """How the delivery of one event to one hook ended; `why` is None where it was taken."""

    hook: str
    event: Mapping[str, Any]
    tries: int
    seconds: float
    why: str | None = None


class Hooks:
    """Delivers the events of one home.

    Args:
        tell: called with an event's name and fields, from `report` and `stop` only.
        pause_seconds: before the second try.
        stop_seconds: for what is left when the daemon ends.

    Attributes:
        config: replaced when the daemon reads its configuration again; counts for the next event.
    """

    def __init__(
        self,
        home: Path,
        config: HooksConfig,
        tell: Tell,
        *,
        pause_seconds: float = FIRST_PAUSE_SECONDS,
        stop_seconds: float = STOP_SECONDS,
    ) -> None:
        self._home, self.config, self._tell = home, config, tell
        self._pause_seconds, self._stop_seconds = pause_seconds, stop_seconds
        self._waiting: queue.Queue[Mapping[str, Any] | None] = queue.Queue(_WAITING_AT_MOST)  # None: the end
        self._outcomes: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._cut: Callable[[], None] | None = None  # ends the try that is under way
        self._current: Mapping[str, Any] | None = None

    def told(self, event: str, fields: Mapping[str, Any]) -> None:
        """Take an event, if it is one that the hooks are to hear."""
        config = self.config
        if event not in config.events or not (config.command or config.webhook):
            return
        moment = datetime.now(UTC).isoformat(timespec="milliseconds")
        known = {key: value for key, value in fields.items() if value is not None}
        entry = {"at": moment, "event": event, "home": str(self._home.absolute()), **known}
        try:
            self._waiting.put_nowait(entry)
        except queue.Full:
            why = f"{_WAITING_AT_MOST} events wait for it already"
            self._outcomes.put(_Outcome("all", entry, 0, 0.0, why))
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="dynlora-hooks", daemon=True)
            self._thread.start()

    def is_idle(self) -> bool:
        """Whether every event was delivered or given up, and reported."""
        return self._waiting.unfinished_tasks == 0 and self._outcomes.empty()

    def report(self) -> None:
        """Tell how deliveries ended since the last call; from the daemon's own thread."""
        while not self._outcomes.empty():
            outcome = self._outcomes.get()
            about = {key: outcome.event.get(key) for key in ("batch", "version")}
            fields = {"hook": outcome.hook, "of": outcome.event["event"], **about, "tries": outcome.tries}
            if outcome.why is None:
                self._tell("hook_done", **fields, seconds=round(outcome.seconds, 3))
            else:
                self._tell("hook_failed", **fields, why=outcome.why)

    def stop(self) -> None:
        """Give what is left some time, then end it; what was not delivered is told."""
        deadline = time.monotonic() + self._stop_seconds
        while self._waiting.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.02)
        self._stopping.set()
        if (cut := self._cut) is not None:
            cut()
        with contextlib.suppress(queue.Full):  # then the thread waits for nothing
            self._waiting.put_nowait(None)
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)
        left = [self._current]
        while not self._waiting.empty():
            left.append(self._waiting.get_nowait())
        for entry in filter(None, left):
            self._outcomes.put(_Outcome("all", entry, 0, 0.0, "the daemon ended before it was delivered"))
        self.report()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._current = entry = self._waiting.get()
            if entry is None:
                return
            config = self.config  # the same for all tries, also when another one is read meanwhile
            if config.command:
                self._deliver("command", config, entry, self._execute)
            if config.webhook:
                self._deliver("webhook", config, entry, self._post)
            self._current = None
            self._waiting.task_done()

    def _deliver(self, hook: str, config: HooksConfig, entry: Mapping[str, Any], send: Send) -> None:
        started, why, number = time.monotonic(), "the daemon ended", 0
        while number < config.tries and not self._stopping.is_set():
            number += 1
            try:
                send(config, entry)
            except Exception as error:  # noqa: BLE001 - whatever a hook does must end here
                why = str(error) or repr(error)
            else:
                self._outcomes.put(_Outcome(hook, entry, number, time.monotonic() - started))
                return
            finally:
                self._cut = None
            if number < config.tries:
                self._stopping.wait(self._pause_seconds * 2 ** (number - 1))
        self._outcomes.put(_Outcome(hook, entry, number, time.monotonic() - started, why))

    def _can_be_cut(self, cut: Callable[[], None]) -> None:
        """From now on `stop` ends the try that is under way; where it looked before, nobody else will."""
        self._cut = cut
        if self._stopping.is_set():
            cut()

    def _execute(self, config: HooksConfig, entry: Mapping[str, Any]) -> None:
        """Run the command with the event on stdin.

        Raises:
            HookError: it cannot be started, failed, or took too long and was killed.
        """
        environment = os.environ | {
            f"DYNLORA_{key.upper()}": str(entry[key])
            for key in ("event", "home", "batch", "version")
            if key in entry
        }
        # Files, not pipes: whatever it starts may keep them open without anybody waiting for it.
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as words:
            stdin.write(encode(entry))
            stdin.seek(0)
            try:
                process = subprocess.Popen(
                    config.command,
                    stdin=stdin,
                    stdout=words,
                    stderr=words,
                    env=environment,
                    cwd=self._home,
                    start_new_session=True,
                )
            except OSError as error:
                raise HookError(f"{config.command[0]} cannot be started: {error.strerror}") from error
            self._can_be_cut(lambda: _kill(process))
            try:
                code = process.wait(config.timeout_seconds)
            except subprocess.TimeoutExpired as error:
                _kill(process)
                raise HookError(f"it took longer than {config.timeout_seconds:g} s and was killed") from error
            if code:
                size = words.seek(0, os.SEEK_END)
                words.seek(max(0, size - _LAST_WORDS))
                said = " ".join(words.read().decode(errors="replace").split())
                raise HookError(f"it ended with {code}" + (f": {said}" if said else ""))

    def _post(self, config: HooksConfig, entry: Mapping[str, Any]) -> None:
        """Send the event; any answer below 300 is fine. Redirects are not followed.

        Raises:
            HookError: it could not be sent in time, or the answer says no.
        """
        url = urlsplit(config.webhook)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.hostname or "", url.port, timeout=config.timeout_seconds)
        # The connection's own limit is for each read; this one is for all of it.
        deadline = time.monotonic() + config.timeout_seconds
        alarm = threading.Timer(config.timeout_seconds, _shut, [connection])
        alarm.start()
        try:
            connection.connect()
            self._can_be_cut(lambda: _shut(connection))
            if time.monotonic() >= deadline:  # there was no socket yet that the alarm could shut
                raise TimeoutError
            target = (url.path or "/") + (f"?{url.query}" if url.query else "")
            headers = {"Content-Type": "application/json", "User-Agent": "dynlora"}
            connection.request("POST", target, encode(entry), headers)
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            is_late = isinstance(error, TimeoutError) or time.monotonic() >= deadline
            why = f"no answer within {config.timeout_seconds:g} s" if is_late else f"{error or repr(error)}"
            raise HookError(f"{url.hostname}: {why}") from error
        finally:
            alarm.cancel()
            connection.close()
        if status >= 300:
            raise HookError(f"{url.hostname} answered {status}")


def encode(entry: Mapping[str, Any]) -> bytes:
    """What a hook gets: the event as one JSON object, and a line end."""
    return (json.dumps(entry, ensure_ascii=False, default=str) + "\n").encode()


def _shut(connection: http.client.HTTPConnection) -> None:
    if connection.sock is not None:
        with contextlib.suppress(OSError):  # it has ended by itself
            connection.sock.shutdown(socket.SHUT_RDWR)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a command and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
