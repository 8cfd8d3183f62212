"""A body in, an answer out, in plain ASGI: for the paths that are asked a thousand times a second."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

# Made once: json.dumps would make a new encoder for each answer.
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))

Shortcuts = Mapping[str, tuple[ASGIApp, dict[str, Any]]]


class Shortcut:
    """Hands POST requests for some paths to their handlers, past routing; all others to the application.

    Args:
        shortcuts: path → handler and the path parameters that routing would have found.
    """

    def __init__(self, app: ASGIApp, shortcuts: Shortcuts) -> None:
        self._app = app
        self._shortcuts = shortcuts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one HTTP request."""
        found = self._shortcuts.get(scope["path"]) if scope.get("method") == "POST" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        handler, scope["path_params"] = found
        await handler(scope, receive, send)


async def read_body(receive: Receive) -> bytes:
    """Return the whole body.

    Raises:
        ClientDisconnect: the client left before its end.
    """
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def header_of(scope: Scope, name: bytes) -> str | None:
    """Return the first header of this (lower-case) name."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value, "latin-1")
    return None


def to_json(document: Any) -> bytes:
    """Return JSON without blanks, in UTF-8."""
    return _ENCODER.encode(document).encode()


async def reply(send: Send, body: bytes, media_type: bytes, *more: tuple[bytes, bytes]) -> None:
    """Answer with status 200."""
    length = str(len(body)).encode()
    headers = [(b"content-length", length), (b"content-type", media_type), *more]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
