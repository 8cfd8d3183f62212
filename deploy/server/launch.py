"""Starts the server that the settings describe, with one process or several."""

import socket

from deploy.server.banner import listen
from deploy.server.settings import Settings
from deploy.signing import TrustedKeys
from deploy.store_reader import StoreReader


def serve(settings: Settings, inherited: socket.socket | None = None) -> None:
    """Serve until SIGTERM or SIGINT; returns when every request that came before is answered.

    ``inherited`` is listened on instead of a socket of our own.

    Raises:
        ServerError: the address cannot be used.
        SignatureError: the keys that are trusted cannot be read.
        DeployError: the store or its live version cannot be used.
    """
    # The commonest mistakes, told before anything starts.
    StoreReader(settings.serving_dir).live_manifest()
    if settings.trust is not None:
        TrustedKeys.load(settings.trust)
    listener = inherited or listen(settings)
    own_path = None if inherited else settings.uds
    ours = own_path.lstat().st_ino if own_path else None
    try:
        if settings.workers == 1:
            from deploy.server.single import serve_single

            serve_single(settings, listener)
        else:
            from deploy.server.supervisor import serve_workers

            serve_workers(settings, listener)
    finally:
        listener.close()
        # Another server may have taken the path over while our last answers went out.
        if own_path and own_path.exists() and own_path.lstat().st_ino == ours:
            own_path.unlink(missing_ok=True)
