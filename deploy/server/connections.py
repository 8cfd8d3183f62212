"""How one HTTP connection ends with its server: idle ones are closed, whoever is asking gets an answer.

uvicorn's own protocol closes a connection on which a request has begun to arrive but not all of its headers.
"""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LAST_LOOK_SECONDS = 0.05  # what the kernel has already is read meanwhile
HEAD_SECONDS = 5.0  # for the rest of a request's headers


class Connection(HttpToolsProtocol):
    """uvicorn's, with a patient end."""

    _is_asking = False  # a request's headers have begun to arrive, and are not all there
    _is_ending = False

    def on_message_begin(self) -> None:
        """The first byte of a request is there."""
        self._is_asking = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A request is handled from here on; it is the last one where the server ends."""
        self._is_asking = False
        super().on_headers_complete()
        if self._is_ending:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """End this connection, after what is being asked on it was answered."""
        self._is_ending = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        self.loop.call_later(LAST_LOOK_SECONDS, self._end)

    def _end(self) -> None:
        if self._is_asking:
            self.loop.call_later(HEAD_SECONDS, self._close_if_idle)
        else:
            self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
