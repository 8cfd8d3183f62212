"""POST /classify: picture files in, labels and scores out, without knowing any protocol.

one file as the body               curl --data-binary @cat.jpg -H 'Content-Type: image/jpeg' URL/classify
several, with labels, as a form    curl -F image=@cat.jpg -F image=@dog.jpg -F labels=cat -F labels=dog …
"""

from collections.abc import Sequence
from typing import Any

from starlette.datastructures import QueryParams, UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from deploy.runtime import DEFAULT_TOP, Prediction
from deploy.server.engine import Call
from deploy.server.exchange import Shortcuts, header_of, read_body, reply, to_json
from deploy.server.inference import note
from deploy.server.models import checked_labels, checked_top
from deploy.server.problems import Problem
from deploy.server.state import State
from deploy.server.versions import Slot

_PATH = "/classify"
_OCTETS = "application/octet-stream"
_FORM = "multipart/form-data"


class Classify:
    """Tells the likeliest labels of each picture, and the version that says so. Plain ASGI, as Infer."""

    def __init__(self, state: State) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        state = self._state
        files, fields = await _read(scope, receive, state)
        if not files:
            raise Problem(400, "there is no picture: send a file as the body, or a form with `image` files")
        query = QueryParams(scope["query_string"])
        labels = _labels([*query.getlist("labels"), *fields.get("labels", [])], state)
        top = _top([*query.getlist("top"), *fields.get("top", [])])

        async def compute(slot: Slot) -> tuple[Call, list[list[Prediction]]]:
            call = Call(slot)
            embeds = await state.engine.embed_images(call, files)
            return call, await state.engine.rank(call, embeds, labels, top)

        version, (call, answers) = await state.versions.answer(compute)
        note(scope, call, rows=len(files))
        document = {"model_version": str(version), "predictions": [_as_json(each) for each in answers]}
        await reply(send, to_json(document), b"application/json")


def _as_json(answer: Sequence[Prediction]) -> list[dict[str, Any]]:
    return [{"label": best.label, "score": best.score} for best in answer]


async def _read(scope: Scope, receive: Receive, state: State) -> tuple[list[bytes], dict[str, list[str]]]:
    """Return the pictures and the other fields of the form."""
    kind = (header_of(scope, b"content-type") or _OCTETS).partition(";")[0].strip().lower()
    if kind == _FORM:
        return await _read_form(Request(scope, receive), state)
    if kind != _OCTETS and not kind.startswith("image/"):
        raise Problem(415, f"expected image/…, {_OCTETS} or {_FORM}, found {kind!r}")
    body = await read_body(receive)
    return ([body] if body else []), {}


async def _read_form(request: Request, state: State) -> tuple[list[bytes], dict[str, list[str]]]:
    limits = state.settings.limits
    files: list[bytes] = []
    fields: dict[str, list[str]] = {}
    try:
        # One more than allowed, so that our own sentence says what is wrong.
        form = request.form(max_files=limits.images + 1, max_fields=limits.labels + 2)
        async with form as parts:
            for name, value in parts.multi_items():
                if name == "image":
                    files.append(await value.read() if isinstance(value, UploadFile) else value.encode())
                elif name in ("labels", "top") and isinstance(value, str):
                    fields.setdefault(name, []).append(value)
                else:
                    raise Problem(400, f"there is no field {name!r}; there are: image, labels, top")
    except MultiPartException as error:
        raise Problem(400, f"the form cannot be read: {error.message}") from error
    except ValueError as error:
        raise Problem(400, f"the form cannot be read: {error}") from error
    if len(files) > limits.images:
        raise Problem(413, f"{len(files)} pictures, at most {limits.images} are allowed")
    return files, fields


def _labels(given: list[str], state: State) -> list[str] | None:
    """Several fields, or one with commas between the labels; None where none came."""
    if not given:
        return None
    names = given[0].split(",") if len(given) == 1 else given
    labels = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    return checked_labels(labels, state.settings.limits)


def _top(given: list[str]) -> int:
    if not given:
        return DEFAULT_TOP
    if not (given[-1].isascii() and given[-1].isdigit() and len(given[-1]) < 10):
        raise Problem(400, f"top must be a whole number from 1, found {given[-1]!r}")
    return checked_top(int(given[-1]))


def shortcuts(state: State) -> Shortcuts:
    """The path that needs no routing."""
    return {_PATH: (Classify(state), {})}


def routes(state: State) -> list[Route]:
    """The same path, which tells whoever comes with another method."""
    return [Route(_PATH, Classify(state), methods=["POST"])]
