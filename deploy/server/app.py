"""The ASGI application: all paths, and how errors become answers."""

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from deploy.errors import DeployError
from deploy.server import classify, inference, live_version, openapi, pages
from deploy.server.exchange import Shortcut
from deploy.server.gate import Gate
from deploy.server.metrics import CONTENT_TYPE
from deploy.server.problems import Problem, failure
from deploy.server.state import State, state_of

Handler = Callable[[Request, Exception], Awaitable[Response]]


def build_app(state: State) -> ASGIApp:
    """Return the application that serves ``state``."""
    app = Starlette(
        routes=[
            *inference.routes(state),
            *classify.routes(state),
            *pages.routes(),
            Route("/openapi.json", openapi_json),
            Route("/metrics", metrics),
            Route("/version", live_version.version),
        ],
        exception_handlers={
            Problem: _tell,
            DeployError: _tell_bad_input,
            HTTPException: _tell_http,
            Exception: _tell_unexpected,
        },
    )
    # A path with a slash at its end is not found; a redirect would lose a POST's body.
    app.router.redirect_slashes = False
    app.state.server = state
    shortcuts = {**inference.shortcuts(state), **classify.shortcuts(state)}
    return Gate(Shortcut(app, shortcuts), state)


async def metrics(request: Request) -> Response:
    """Numbers for Prometheus."""
    state = state_of(request)
    served = [str(slot.version) for slot in state.versions.loaded]
    return Response(state.metrics.text(served), headers={"Content-Type": CONTENT_TYPE})


async def openapi_json(request: Request) -> Response:
    """This interface, described."""
    state = state_of(request)
    await state.versions.until_open()
    loaded = state.versions.live.loaded
    return JSONResponse(openapi.document(loaded, state.settings))


async def _tell(_: Request, error: Exception) -> Response:
    if not isinstance(error, Problem):
        raise error
    return error.response()


async def _tell_bad_input(_: Request, error: Exception) -> Response:
    return Problem(400, str(error)).response()


async def _tell_http(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    words = {
        404: f"there is no path {request.url.path!r} here; see /docs",
        405: f"{request.url.path} does not take {request.method}; see /docs",
    }
    message = words.get(error.status_code, error.detail)
    return JSONResponse({"error": message}, error.status_code, headers=error.headers)


async def _tell_unexpected(_: Request, __: Exception) -> Response:
    return failure()
