"""What went wrong with a request, as the answer says it: a status and one sentence."""

from typing import Any

from starlette.responses import JSONResponse, Response

STATUSES = {
    400: "The request cannot be understood, or an input cannot be used; `error` says which.",
    401: "The bearer token is missing or wrong.",
    403: "The Host header names a machine that this server is not.",
    404: "There is no such path, model or version here; `error` says what there is.",
    405: "The path exists, but not for this method.",
    408: "The body did not arrive in time.",
    411: "A body needs a Content-Length or the chunked transfer encoding.",
    413: "The body, or what it asks for, is above a limit; `error` says which.",
    415: "The Content-Type or Content-Encoding of the body is not one that this path reads.",
    429: "The server is busy; try again after the seconds in Retry-After.",
    431: "The headers are larger than a request's may be.",
    503: "The server is not ready, or could not answer in time.",
}


class Problem(Exception):  # noqa: N818 - the word of RFC 9457
    """A request that gets no result; ``status`` is one of STATUSES."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def response(self) -> Response:
        """The answer, in the form that the Open Inference Protocol prescribes."""
        return JSONResponse({"error": str(self)}, self.status, headers=_headers(self.status))


def failure() -> Response:
    """The answer where the fault is ours: what exactly, only the log says."""
    return JSONResponse({"error": "the server failed; its log says more"}, 500)


def _headers(status: int) -> dict[str, Any]:
    if status == 401:
        return {"WWW-Authenticate": 'Bearer realm="dynlora"'}
    if status in (429, 503):
        return {"Retry-After": "1"}
    return {}
