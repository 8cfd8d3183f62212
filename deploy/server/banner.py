"""What is said at the start, and the socket that is listened on."""

import os
import socket
import stat
import sys
from pathlib import Path

from deploy.errors import ServerError
from deploy.server.settings import Settings

_BACKLOG = 2048


def listen(settings: Settings) -> socket.socket:
    """Return the listening socket.

    Raises:
        ServerError: the address is taken or is not ours.
    """
    try:
        return _listen_on_path(settings) if settings.uds else _listen_on_port(settings)
    except OSError as error:
        where = settings.uds or f"{settings.host}:{settings.port}"
        raise ServerError(f"cannot listen on {where}: {error.strerror or error}") from error


def _listen_on_port(settings: Settings) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.listen(_BACKLOG)
    return listener


def _listen_on_path(settings: Settings) -> socket.socket:
    path = str(settings.uds)
    if os.path.lexists(path):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ServerError(f"cannot listen on {path}: there is something else under this name")
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) == 0:
                raise ServerError(f"cannot listen on {path}: another server listens there")
        Path(path).unlink()
    listener = socket.socket(socket.AF_UNIX)
    # Owner and group may connect; who may, is a matter of the directory's and the group's rights.
    mask = os.umask(0o117)
    try:
        listener.bind(path)
    finally:
        os.umask(mask)
    listener.listen(_BACKLOG)
    return listener


def announce(settings: Settings, listener: socket.socket, version: int) -> None:
    """Say where to find which version."""
    print(f"dynlora serves version {version} on {_url(settings, listener)}", file=sys.stderr, flush=True)  # noqa: T201
    if not settings.token and settings.allow_anyone and not settings.uds:
        print("anyone who can reach this address can use it: there is no token", file=sys.stderr, flush=True)  # noqa: T201


def _url(settings: Settings, listener: socket.socket) -> str:
    if settings.uds:
        return f"unix:{settings.uds}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
