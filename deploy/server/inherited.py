"""The listening socket that systemd holds for us: sd_listen_fds(3), without a library.

systemd keeps the socket open while the server is started anew, so that who connects meanwhile waits for
its answer instead of being refused.
"""

import os
import socket
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from deploy.errors import ServerError

_FIRST_DESCRIPTOR = 3
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def inherited_listener(
    environ: MutableMapping[str, str] = os.environ, descriptor: int = _FIRST_DESCRIPTOR
) -> socket.socket | None:
    """Return the socket that was passed to this process; None if none was.

    The variables are taken out of ``environ``, so that no child believes that they were meant for it.

    Raises:
        ServerError: there are several sockets, or the one does not listen for connections.
    """
    pid, count, _ = (environ.pop(name, "") for name in _VARIABLES)
    if pid != str(os.getpid()) or not count:
        return None
    if count != "1":
        raise ServerError(
            f"systemd passed {count} sockets, and one server listens on one: write a single ListenStream= "
            "into dynlora-serve.socket, after an empty one that takes back the earlier ones"
        )
    try:
        listener = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ServerError(f"systemd announced a socket that is not there: {error}") from error
    listener.set_inheritable(False)
    is_stream = listener.family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
    is_stream = is_stream and listener.type == socket.SOCK_STREAM
    if not (is_stream and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)):
        listener.close()
        raise ServerError(
            "the socket that systemd passed does not listen for connections over TCP or a unix socket: write "
            "ListenStream= and leave out Accept= in dynlora-serve.socket"
        )
    return listener


def address_of(listener: socket.socket) -> dict[str, Any]:
    """Return where an inherited socket listens, as the fields of Settings."""
    if listener.family == socket.AF_UNIX:
        name = os.fsdecode(listener.getsockname())
        return {"uds": Path(name), "is_inherited": True}
    host, port = listener.getsockname()[:2]
    return {"host": host, "port": port, "is_inherited": True}
