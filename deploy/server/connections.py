"""How one HTTP connection begins and ends: what it may hold and for how long before a request is there.

Nobody has shown a token yet while a request's head arrives, so its size, its time and the number of
connections have limits here. At the end idle ones are closed, and whoever is asking gets an answer.
uvicorn's own protocol has none of these limits, and closes a connection on which a request has begun to
arrive but not all of its headers.
"""

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from deploy.server.exchange import to_json
from deploy.server.settings import Limits

HEAD_BYTES = 64 << 10  # of the request line and all headers; those after a body count, too
LAST_LOOK_SECONDS = 0.05  # what the kernel has already is read meanwhile
LAST_HEAD_SECONDS = 5.0  # for the rest of a request's headers, where the server ends

_OTHER_FILES = 64  # that a process has open besides its connections
_LOOKS = 4  # of the watch, within the time for a head
_BETWEEN_LOOKS = 1.0  # seconds at most


class Watch:
    """What a server's connections may do before a request is there: one look at all of them, now and then.

    A timer for each request would cost more than the rest of this module.
    """

    def __init__(self, limits: Limits) -> None:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # Out of files, the server could not even refuse anybody.
        self.most = min(limits.connections, max(1, files - _OTHER_FILES))
        self._head_seconds = min(limits.head_seconds, limits.request_seconds)
        self._send_seconds = limits.request_seconds
        self._is_looking = False

    def begin(self, loop: asyncio.AbstractEventLoop, connections: set[Any]) -> None:
        """Look at these connections as long as there are any."""
        if not self._is_looking:
            self._is_looking = True
            self._look_later(loop, connections)

    def _look_later(self, loop: asyncio.AbstractEventLoop, connections: set[Any]) -> None:
        seconds = min(_BETWEEN_LOOKS, self._head_seconds / _LOOKS)
        loop.call_later(seconds, self._look, loop, connections)

    def _look(self, loop: asyncio.AbstractEventLoop, connections: set[Any]) -> None:
        now = loop.time()
        for connection in tuple(connections):
            connection.close_if_late(now - self._head_seconds)
            connection.abort_if_unread(now, self._send_seconds)
        self._is_looking = bool(connections)
        if self._is_looking:
            self._look_later(loop, connections)


class _HeadTooLargeError(Exception):
    """Ends the parser's work on a connection."""


class Connection(HttpToolsProtocol):
    """uvicorn's, with limits and a patient end. Each server has a subclass of its own, with its watch."""

    watch: Watch

    _is_asking = False  # a request's headers have begun to arrive, and are not all there
    _is_ending = False
    _head_since: float | None = None  # since when a head is due; None where nobody has to send one
    _head_bytes = 0  # read since the last piece of a body, or the last whole request
    _unread_since: float | None = None  # since when the client has not read what is to be sent

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there; it has some time to ask, if it is not one too many."""
        super().connection_made(transport)
        self._head_since = self.loop.time()
        self.watch.begin(self.loop, self.connections)
        if len(self.connections) > self.watch.most:
            self._refuse(
                503,
                f"{self.watch.most} connections are open, and no more are taken: try again later, or start "
                "the server with a larger --max-connections",
            )

    def data_received(self, data: bytes) -> None:
        """Some bytes, of a head or a body."""
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > HEAD_BYTES:
            self._refuse_head()
        elif self._head_since is None and self._is_idle:
            # uvicorn has stopped its own clock, and nothing that came has made a request.
            self._head_since = self.loop.time()

    def on_message_begin(self) -> None:
        """The first byte of a request is there."""
        self._is_asking = True
        self._head_since = self.loop.time()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A request is handled from here on; it is the last one where the server ends."""
        if self._head_bytes > HEAD_BYTES and self._size_of_head() > HEAD_BYTES:
            raise _HeadTooLargeError
        self._is_asking = False
        self._head_since = None
        super().on_headers_complete()
        if self._is_ending:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """A piece of a body: others count those."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is all there."""
        self._head_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Tell that what came cannot be read, or why it was not read to its end."""
        if self._head_bytes > HEAD_BYTES:
            self._refuse_head()
        else:
            super().send_400_response(msg)

    def close_if_late(self, begun_before: float) -> None:
        """End a connection whose next head has been due since an earlier time than this."""
        if self._head_since is None or self._head_since > begun_before:
            return
        if self._is_idle:
            self.transport.close()
        else:
            self.cycle.keep_alive = False  # the request before it still gets its answer

    def pause_writing(self) -> None:
        """More waits to be sent than the client reads."""
        self._unread_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        """The client has read on."""
        self._unread_since = None
        super().resume_writing()

    def abort_if_unread(self, now: float, seconds: float) -> None:
        """Give up a client who has not read what is to be sent for so long; closing would wait for ever."""
        if self._unread_since is None:
            self._unread_since = now if self.transport.is_closing() else None
        elif now - self._unread_since > seconds:
            self.transport.abort()

    def shutdown(self) -> None:
        """End this connection, after what is being asked on it was answered."""
        self._is_ending = True
        if not self._is_idle:
            self.cycle.keep_alive = False
        self.loop.call_later(LAST_LOOK_SECONDS, self._end)

    @property
    def _is_idle(self) -> bool:
        """No request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _end(self) -> None:
        if self._is_asking:
            self.loop.call_later(LAST_HEAD_SECONDS, self._close_if_idle)
        else:
            self._close_if_idle()

    def _close_if_idle(self) -> None:
        if not self.transport.is_closing() and self._is_idle:
            self.transport.close()

    def _size_of_head(self) -> int:
        """Looked at only where more than a head has come at once."""
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _refuse_head(self) -> None:
        self._refuse(431, f"the headers of a request may have {HEAD_BYTES} bytes; send fewer or shorter ones")

    def _refuse(self, status: int, message: str) -> None:
        """Answer without asking the application, and close."""
        if self.transport.is_closing():
            return
        if self._is_idle or not self.cycle.response_started:  # else it would stand amid another answer
            body = to_json({"error": message})
            head = [
                STATUS_LINE[status],
                b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body),
                b"retry-after: 1\r\n" if status == 503 else b"",
                b"x-content-type-options: nosniff\r\nconnection: close\r\n\r\n",
            ]
            self.transport.write(b"".join([*head, body]))
        self.transport.close()


def connections_within(limits: Limits) -> type[Connection]:
    """Return the protocol for one server: all its connections share a watch."""

    class Limited(Connection):
        watch = Watch(limits)

    return Limited
