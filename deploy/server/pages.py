"""The page at / and the documentation at /docs: files of ours, nothing from elsewhere."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from deploy.server.problems import Problem

_DIRECTORY = Path(__file__).parent / "page"
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_FILES = {path.name: path for path in _DIRECTORY.iterdir() if path.suffix in _KINDS}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def page(_: Request) -> Response:
    """Drop a picture, see what the live version says."""
    return _file("index.html")


async def docs(_: Request) -> Response:
    """The interface, for people."""
    return _file("docs.html")


async def part(request: Request) -> Response:
    """A style sheet, script or picture of the two pages."""
    return _file(request.path_params["name"])


def _file(name: str) -> Response:
    path = _FILES.get(name)
    if path is None:
        raise Problem(404, f"there is no file {name!r} here")
    return FileResponse(path, media_type=_KINDS[path.suffix], headers=_HEADERS)


def routes() -> list[Route]:
    """The pages and their parts."""
    return [Route("/", page), Route("/docs", docs), Route("/page/{name}", part)]
