"""GET /version: which version answers; who says how long it would wait is told when it is another one.

    GET /version                    now
    GET /version?other_than=12      at once unless 12 is live; else after the next switch,
    Prefer: wait=15                 or after so many seconds (RFC 7240), WAIT_SECONDS at most

So the page at / hears of a new version when it comes, without asking every second. Waiting costs a
connection and nothing else; beyond MAX_WAITING of them an answer comes at once, and a client that has
heard nothing new asks again after a pause.
"""

import asyncio
import re

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deploy.server.problems import Problem
from deploy.server.state import State, state_of

WAIT_SECONDS = 20.0  # below what proxies allow an answer to take
MAX_WAITING = 64  # per worker
_SHARE = 0.8  # of the time that a request may take
_WAIT = re.compile(r"(?:^|[,;\s])wait=([0-9]{1,6})(?:$|[,;\s])", re.ASCII)


async def version(request: Request) -> Response:
    """Return the version that answers, the one still loaded beside it, and how many classes are known."""
    state = state_of(request)
    known = request.query_params.get("other_than")
    if known is not None:
        if not (known.isascii() and known.isdigit() and len(known) < 19):
            raise Problem(400, f"other_than is the number of a version, found {known!r}")
        await state.versions.until_open()
        preferred = _WAIT.search(request.headers.get("prefer", ""))
        if preferred and state.versions.live.version == int(known):
            await _wait_for_another(request, state, int(preferred[1]))
    await state.versions.until_open()
    slot = state.versions.live
    document = {
        "model_version": str(slot.version),
        "previous": next((str(each.version) for each in state.versions.loaded[1:]), None),
        "classes": len(slot.loaded.class_names),
        "created_at": slot.loaded.manifest.created_at.isoformat(timespec="seconds"),
    }
    return JSONResponse(document, headers={"Cache-Control": "no-store"})


async def _wait_for_another(request: Request, state: State, preferred: int) -> None:
    """Return when another version is live, time is up, the server drains or the client has left."""
    if state.is_draining or state.waiting >= MAX_WAITING:
        return
    state.waiting += 1
    waits = {asyncio.ensure_future(state.versions.until_flip()), asyncio.ensure_future(_left(request))}
    seconds = min(preferred, WAIT_SECONDS, _SHARE * state.settings.limits.request_seconds)
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        state.waiting -= 1
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


async def _left(request: Request) -> None:
    """Wait until the client hangs up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
