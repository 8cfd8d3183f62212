"""The command that serves the live version over HTTP."""

from importlib.util import find_spec
from pathlib import Path
from socket import socket
from typing import Any

import click
from click.core import ParameterSource

from daemon.errors import ConfigError
from daemon.output import Options, common_options, pass_options

_PACKAGES = ("starlette", "uvicorn", "uvloop", "httptools", "python_multipart", "prometheus_client")


def missing_packages() -> list[str]:
    """What the server needs and is not installed."""
    return [name for name in _PACKAGES if find_spec(name) is None]


@click.command()
@click.option(
    "--store",
    type=click.Path(path_type=Path, file_okay=False),
    help="A version store without a home. [default: HOME/serving]",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes any free one."
)
@click.option("--uds", type=click.Path(path_type=Path), help="Listen on this unix socket instead.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help="File with the bearer token. [default: the systemd credential dynlora-token]",
)
@click.option("--trust", type=click.Path(path_type=Path), help="Public keys (PEM); one must have signed.")
@click.option("--allow-anyone", is_flag=True, help="Listen beyond this machine without a token.")
@click.option(
    "--allow-host",
    "allow_hosts",
    multiple=True,
    metavar="NAME",
    help="Without a token, answer to this name, too: a proxy's on this machine. May come several times.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Processes on the one address.",
)
@click.option(
    "--threads",
    type=click.IntRange(0, 1024),
    default=0,
    help="Runs at once per worker. [default: the CPUs, divided among the workers]",
)
@click.option(
    "--max-batch", type=click.IntRange(1, 1024), default=16, show_default=True, help="Images per run."
)
@click.option(
    "--max-delay-ms",
    type=click.FloatRange(0, 1000),
    default=2.0,
    show_default=True,
    help="How long a batch may wait to be filled; ten times as long for pictures being decoded.",
)
@click.option(
    "--max-requests",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="At work or waiting, per worker; more are answered 429.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Per worker; more are answered 503 and closed.",
)
@click.option("--max-body-mb", type=click.IntRange(1), default=32, show_default=True, help="Largest request.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds that a request may take.",
)
@click.option(
    "--drain",
    type=click.FloatRange(0, 3600),
    default=1.0,
    show_default=True,
    help="Seconds from not ready to not listening.",
)
@click.option(
    "--access-log",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of requests to log.",
)
@common_options
@pass_options
def serve(options: Options, /, **given: Any) -> None:
    """Serve the live version over HTTP: Open Inference Protocol v2, images, a page."""
    if missing := missing_packages():
        raise ConfigError(
            f"{', '.join(missing)} not installed: this command needs the server's packages: "
            "pip install 'dynlora[server]'"
        )
    from deploy.server.inherited import inherited_listener
    from deploy.server.launch import serve as serve_store
    from deploy.server.settings import Limits, Settings, read_token

    limits = Limits(
        body_bytes=given["max_body_mb"] << 20,
        requests=given["max_requests"],
        connections=given["max_connections"],
        request_seconds=given["timeout"],
    )
    inherited = inherited_listener()
    given |= _address(inherited)
    same = ("allow_anyone", "allow_hosts", "workers", "threads", "max_batch", "max_delay_ms")
    where = ("host", "port", "uds", "is_inherited")
    settings = Settings(
        serving_dir=(given["store"] or options.existing_home() / "serving").absolute(),
        token=read_token(given["token_file"]),
        trust=given["trust"].absolute() if given["trust"] else None,
        drain_seconds=given["drain"],
        access_log=given["access_log"],
        limits=limits,
        **{name: given[name] for name in (*same, *where)},
    )
    serve_store(settings, inherited)


def _address(inherited: socket | None) -> dict[str, Any]:
    """Where to listen, if somebody does for us already; an address of our own would be a second one."""
    if inherited is None:
        return {"is_inherited": False}
    from deploy.server.inherited import address_of

    source = click.get_current_context().get_parameter_source
    asked = [f"--{name}" for name in ("host", "port", "uds") if source(name) is ParameterSource.COMMANDLINE]
    if asked:
        raise ConfigError(
            f"{', '.join(asked)} and a socket from systemd exclude each other: leave it out, and change "
            "ListenStream= of dynlora-serve.socket instead"
        )
    return address_of(inherited)
