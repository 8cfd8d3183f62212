"""What every request passes before and after its handler: who asks, how much, how long; counting and logging.

Plain ASGI, because it stands in the way of every request: no copies, no task of its own.
"""

import asyncio
import hmac
import json
import logging
import random
import time
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.errors import DeployError
from deploy.server.problems import Problem, failure
from deploy.server.settings import is_loopback
from deploy.server.state import State

OPEN_PATHS = ("/", "/docs", "/page/", "/openapi.json", "/v2/health/live", "/v2/health/ready")
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_LOOPBACK_RANGE = "127."  # and numbers: no page can make a name of its own out of them
_UNADMITTED_BYTES = 64 << 10  # of a request that makes no model work
_BODILESS = ("GET", "HEAD")
_OUTCOMES = {408: "timeout", 429: "rejected", 503: "timeout"}

_log = logging.getLogger("dynlora.access")


class Gate:
    """Wraps the application; answers by itself what must not reach it."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app = app
        self._state = state
        token = state.settings.token
        self._expected = f"Bearer {token}".encode() if token else None
        # Without a token a page of the web could, through a name that it points at 127.0.0.1, ask us.
        settings = state.settings
        self._is_private = not token and not settings.uds and is_loopback(settings.host)
        self._allowed = frozenset(name.lower() for name in settings.allow_hosts)
        address = f"[{settings.host}]" if ":" in settings.host else settings.host
        self._names = self._allowed.union(_LOOPBACK_NAMES, [address.lower()])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one HTTP request, or pass on what is none."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._state)
        try:
            headers = dict(scope["headers"])
            self._check_sender(scope["path"], headers)
            exchange.admit(headers)
            async with asyncio.timeout(self._state.settings.limits.request_seconds):
                await self._app(scope, exchange.receive, exchange.send)
        except Problem as problem:
            await exchange.refuse(problem)
        except ClientDisconnect:
            pass  # nobody is left to be told anything
        except TimeoutError:
            await exchange.refuse(exchange.timeout_problem())
        except DeployError as error:
            await exchange.refuse(Problem(400, str(error)))
        except Exception:
            await exchange.answer(failure())
            raise  # whoever called us writes it into the log
        finally:
            exchange.finish()

    def _check_sender(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._expected is not None:
            is_open = path in OPEN_PATHS or path.startswith("/page/")
            given = headers.get(b"authorization", b"")
            if not is_open and not hmac.compare_digest(given, self._expected):
                raise Problem(401, "this server wants `Authorization: Bearer TOKEN`")
        elif self._is_private:
            self._check_host(headers)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """Refuse who came by another name than ours, and pages of other names."""
        host = headers.get(b"host", b"localhost").decode("latin-1").lower()
        name = _without_port(host)
        if name not in self._names and not _is_in_loopback_range(name):
            raise Problem(
                403,
                f"this server is for this machine only, and {name!r} is not its name: start it with a token "
                "(--token-file), or with --allow-host and the name, if a proxy on this machine passes it on",
            )
        # A page of the web cannot read our answers, but could keep us busy.
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        asking = origin.partition("://")[2]
        if origin and asking != host and _without_port(asking) not in self._allowed:
            raise Problem(403, f"this server is for this machine only, not for pages of {origin!r}")


def _without_port(host: str) -> str:
    return host if host.endswith("]") else host.rsplit(":", 1)[0]


def _is_in_loopback_range(name: str) -> bool:
    return name.startswith(_LOOPBACK_RANGE) and is_loopback(name)


class _Exchange:
    """One request and its answer, seen from outside."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, state: State) -> None:
        self._scope, self._receive, self._send, self._state = scope, receive, send, state
        self._started = time.monotonic()
        self._status = 0
        self._received_bytes = 0
        self._is_complete = False  # the body has arrived
        self._model = model_of(scope["method"], scope["path"])
        self._is_admitted = False

    def admit(self, headers: dict[bytes, bytes]) -> None:
        """Take the request on, or not.

        Raises:
            Problem: it is too large, encoded, or the server has enough to do.
        """
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            raise Problem(400, "Content-Length is not a number")
        limit = self._state.settings.limits.body_bytes
        if int(length) > limit:
            raise Problem(413, f"the body has {int(length)} bytes, at most {limit} are allowed")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Problem(415, "compressed bodies are not accepted; send it without Content-Encoding")
        if self._model is None:
            return
        limits = self._state.settings.limits
        if self._state.in_flight >= limits.requests or (
            self._state.body_bytes and self._state.body_bytes + int(length) > limits.waiting_bytes
        ):
            self._state.metrics.rejected(self._model, self._version())
            raise Problem(429, "the server has as many requests as it can take; try again in a moment")
        self._is_admitted = True
        self._state.in_flight += 1
        self._state.metrics.began()

    async def receive(self) -> Message:
        """Pass on the body, as long as it is within the limit."""
        message = await self._receive()
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self._received_bytes += size
            if self._is_admitted:
                self._state.body_bytes += size
            self._is_complete = not message.get("more_body", False)
            limits = self._state.settings.limits
            limit = limits.body_bytes if self._is_admitted else _UNADMITTED_BYTES
            if self._received_bytes > limit:
                raise Problem(413, f"the body has more than {limit} bytes")
            if self._is_admitted and self._received_bytes < self._state.body_bytes > limits.waiting_bytes:
                self._state.metrics.rejected(self._model or "unknown", self._version())
                raise Problem(429, "the server holds as much as it can take; try again in a moment")
        return message

    async def send(self, message: Message) -> None:
        """Pass on the answer with the headers that every answer has."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = message["headers"] = [
                *message.get("headers", ()),
                (b"x-content-type-options", b"nosniff"),
            ]
            # A body that was not read, or a server about to leave: the connection must not be used again.
            if self._state.is_draining or (self._status >= 400 and not self._is_complete):
                headers.append((b"connection", b"close"))
        await self._send(message)

    async def refuse(self, problem: Problem) -> None:
        """Answer with a problem, unless an answer has begun."""
        await self.answer(problem.response())

    async def answer(self, response: Response) -> None:
        """Send an answer, unless one has begun."""
        if not self._status:
            await response(self._scope, self.receive, self.send)

    def timeout_problem(self) -> Problem:
        """Return whose fault it is that time ran out."""
        seconds = self._state.settings.limits.request_seconds
        if self._is_complete or self._scope["method"] in _BODILESS:
            return Problem(503, f"the answer took longer than {seconds:g} seconds; try again later")
        return Problem(408, f"the body did not arrive within {seconds:g} seconds")

    def finish(self) -> None:
        """Count and log."""
        seconds = time.monotonic() - self._started
        noted: dict[str, Any] = self._scope.get("state") or {}
        if self._is_admitted and self._model is not None:
            self._state.in_flight -= 1
            self._state.body_bytes -= self._received_bytes
            self._state.metrics.ended(
                self._model,
                self._version(),
                outcome=outcome_of(self._status),
                stages=noted.get("stages", {}) | {"total": seconds},
                rows=noted.get("rows", 0),
            )
        share = self._state.settings.access_log
        if share and random.random() < share:
            self._write_line(seconds)

    def _write_line(self, seconds: float) -> None:
        line = {
            "at": round(time.time(), 3),
            "method": self._scope["method"],
            "path": self._scope["path"],
            "status": self._status,
            "ms": round(1000 * seconds, 2),
            "bytes": self._received_bytes,
            "version": (self._scope.get("state") or {}).get("version"),
        }
        _log.info(json.dumps(line))

    def _version(self) -> str:
        """The version that answered, or would have."""
        noted = (self._scope.get("state") or {}).get("version")
        if noted is None:
            noted = next((slot.version for slot in self._state.versions.loaded), "")
        return str(noted)


def model_of(method: str, path: str) -> str | None:
    """Return the model that a request makes work, None where it makes none."""
    if method != "POST":
        return None
    if path == "/classify":
        return "classifier"
    parts = path.split("/")
    is_infer = len(parts) >= 5 and parts[1:3] == ["v2", "models"] and parts[-1] == "infer"
    # Names that do not exist share a label: a client must not be able to make up new ones.
    return (parts[3] if parts[3] in ("vision", "text", "classifier") else "unknown") if is_infer else None


def outcome_of(status: int) -> str:
    """Return the metrics' word for a status."""
    if status == 0:
        return "cancelled"
    if status in _OUTCOMES:
        return _OUTCOMES[status]
    return "success" if status < 400 else "invalid" if status < 500 else "error"
