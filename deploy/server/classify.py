"""POST /classify: picture files in, labels and scores out, without knowing any protocol.

one file as the body               curl --data-binary @cat.jpg -H 'Content-Type: image/jpeg' URL/classify
several, with labels, as a form    curl -F image=@cat.jpg -F image=@dog.jpg -F labels=cat -F labels=dog …
"""

from collections.abc import Sequence
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deploy.runtime import DEFAULT_TOP, Prediction
from deploy.server.engine import Call
from deploy.server.inference import note
from deploy.server.models import checked_labels, checked_top
from deploy.server.problems import Problem
from deploy.server.state import State, state_of
from deploy.server.versions import Slot

_OCTETS = "application/octet-stream"
_FORM = "multipart/form-data"


async def classify(request: Request) -> Response:
    """Return the likeliest labels of each picture, and the version that said so."""
    state = state_of(request)
    files, fields = await _read(request, state)
    if not files:
        raise Problem(400, "there is no picture: send a file as the body, or a form with `image` files")
    labels = _labels([*request.query_params.getlist("labels"), *fields.get("labels", [])], state)
    top = _top([*request.query_params.getlist("top"), *fields.get("top", [])])

    async def compute(slot: Slot) -> tuple[Call, list[list[Prediction]]]:
        call = Call(slot)
        embeds = await state.engine.embed_images(call, files)
        return call, await state.engine.rank(call, embeds, labels, top)

    version, (call, answers) = await state.versions.answer(compute)
    note(request, call, rows=len(files))
    return JSONResponse({"model_version": str(version), "predictions": [_as_json(each) for each in answers]})


def _as_json(answer: Sequence[Prediction]) -> list[dict[str, Any]]:
    return [{"label": best.label, "score": best.score} for best in answer]


async def _read(request: Request, state: State) -> tuple[list[bytes], dict[str, list[str]]]:
    """Return the pictures and the other fields of the form."""
    kind = request.headers.get("content-type", _OCTETS).partition(";")[0].strip().lower()
    if kind == _FORM:
        return await _read_form(request, state)
    if kind != _OCTETS and not kind.startswith("image/"):
        raise Problem(415, f"expected image/…, {_OCTETS} or {_FORM}, found {kind!r}")
    body = await request.body()
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
    except HTTPException as error:
        raise Problem(400, f"the form cannot be read: {error.detail}") from error
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


def routes() -> list[Route]:
    """One path."""
    return [Route("/classify", classify, methods=["POST"])]
