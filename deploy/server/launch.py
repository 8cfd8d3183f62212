"""Starts the server that the settings describe, with one process or several."""

from deploy.server.banner import listen
from deploy.server.settings import Settings
from deploy.store_reader import StoreReader


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; returns when every request that came before is answered.

    Raises:
        ServerError: the address cannot be used.
        DeployError: the store or its live version cannot be used.
    """
    StoreReader(settings.serving_dir).live_manifest()  # the commonest mistake, told before anything starts
    listener = listen(settings)
    ours = settings.uds.lstat().st_ino if settings.uds else None
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
        if settings.uds and settings.uds.exists() and settings.uds.lstat().st_ino == ours:
            settings.uds.unlink(missing_ok=True)
