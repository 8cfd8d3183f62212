"""What a server is told at its start, checked. Reads no environment; the token comes out of a file."""

import ipaddress
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from deploy.cpus import usable_cpus
from deploy.errors import ServerError

CREDENTIAL_NAME = "dynlora-token"  # systemd: LoadCredential=dynlora-token:/etc/dynlora/token
MIN_TOKEN_CHARACTERS = 16
_PATHS = ("serving_dir", "uds", "trust")
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how much the server takes on at once."""

    body_bytes: int = 32 << 20
    image_pixels: int = 40_000_000  # a decoded picture takes 3 bytes of memory for each
    images: int = 64  # per request; rows of pixel values count as images
    labels: int = 1000
    label_characters: int = 500
    requests: int = 128  # at work or waiting, per worker; what comes on top is answered 429
    waiting_bytes: int = 256 << 20  # bodies of all of them together
    request_seconds: float = 30.0
    connections: int = 1024  # per worker; what comes on top is answered 503 and closed
    head_seconds: float = 10.0  # for a connection's first request, and for all headers of each


@dataclass(frozen=True)
class Settings:
    """How to serve one version store.

    ``threads`` is the number of runs at once per worker, each on one ONNX Runtime thread; 0 means the
    CPUs of this process divided among the workers. ``uds`` replaces host and port. ``is_inherited``: the
    socket belongs to systemd, which keeps it open when this process ends. ``trust``: a file of public keys
    (PEM); a version that none of them has signed is not served.
    """

    serving_dir: Path
    host: str = "127.0.0.1"
    port: int = 8000
    uds: Path | None = None
    is_inherited: bool = False
    token: str | None = field(default=None, repr=False)
    allow_anyone: bool = False
    trust: Path | None = None
    allow_hosts: tuple[str, ...] = ()  # names that a server without a token answers to besides its own
    workers: int = 1
    threads: int = 0
    max_batch: int = 16
    max_delay_ms: float = 2.0
    drain_seconds: float = 1.0
    access_log: float = 0.0  # the share of requests that is logged, 0 to 1
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self._check_numbers()
        for name in self.allow_hosts:
            if not _HOST_NAME.fullmatch(name):
                raise ServerError(
                    f"--allow-host takes a name or an IPv4 address alone, as clip.example.org, found {name!r}"
                )
        if not (self.uds or self.token or self.allow_anyone or is_loopback(self.host)):
            raise ServerError(
                f"{self.host} can be reached by other machines, and there is no token: give "
                "--token-file FILE, stay on 127.0.0.1, use --uds, or insist with --allow-anyone"
            )

    def _check_numbers(self) -> None:
        bounds = {
            "workers": (1, 256),
            "threads": (0, 1024),
            "max_batch": (1, 1024),
            "max_delay_ms": (0, 1000),
            "drain_seconds": (0, 3600),
            "access_log": (0, 1),
            "port": (0, 65535),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ServerError(f"{name} must be from {low} to {high}, found {value}")
        for name, value in asdict(self.limits).items():
            if not value > 0:
                raise ServerError(f"the limit {name} must be above 0, found {value}")

    @property
    def threads_per_worker(self) -> int:
        """Runs at once in one worker."""
        return self.threads or max(1, usable_cpus() // self.workers)

    def to_json(self) -> dict[str, Any]:
        """Everything a worker process needs; goes through its socket and never over a command line."""
        paths = {name: str(path) for name in _PATHS if (path := getattr(self, name)) is not None}
        return asdict(self) | paths

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """What ``to_json`` wrote."""
        paths = {name: Path(document[name]) for name in _PATHS if document[name] is not None}
        hosts = {"allow_hosts": tuple(document["allow_hosts"])}
        return cls(**(document | paths | hosts | {"limits": Limits(**document["limits"])}))


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach ``host``; a name other than localhost is not trusted."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(path: Path | None) -> str | None:
    """Return the token in ``path``, else the systemd credential of this service, else None.

    Raises:
        ServerError: the file cannot be read, is open to everybody, or holds no usable token.
    """
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if path is None and directory and Path(directory, CREDENTIAL_NAME).is_file():
        path = Path(directory, CREDENTIAL_NAME)
    if path is None:
        return None
    try:
        token = path.read_text(encoding="ascii").strip()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ServerError(f"the token file {path} cannot be read: {error}") from error
    if mode & 0o004:
        raise ServerError(f"the token file {path} can be read by everybody: run `chmod 600 {path}`")
    if len(token) < MIN_TOKEN_CHARACTERS or not token.isprintable() or " " in token:
        raise ServerError(
            f"the token in {path} cannot be used: expected one line of at least {MIN_TOKEN_CHARACTERS} "
            f"characters without blanks, found {len(token)}. `openssl rand -hex 32` makes a good one"
        )
    return token
