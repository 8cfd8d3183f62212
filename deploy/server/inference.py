"""The paths of the Open Inference Protocol v2: health, metadata, repository index, infer."""

import asyncio
import re
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from deploy.server.engine import Call
from deploy.server.exchange import Shortcuts, header_of, read_body, reply
from deploy.server.models import MODELS, Model, Outputs
from deploy.server.outputs import build_response
from deploy.server.problems import Problem
from deploy.server.settings import Limits
from deploy.server.state import State, release, state_of
from deploy.server.tensors import LARGE_JSON_BYTES, InferRequest, parse_request
from deploy.server.versions import Slot

HEADER_LENGTH = b"inference-header-content-length"
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")


async def live(_: Request) -> Response:
    """The process answers."""
    return JSONResponse({"live": True})


async def ready(request: Request) -> Response:
    """New requests should come here; false while no version is loaded and while draining."""
    is_ready = state_of(request).is_ready
    # The protocol's schema calls this field "live", its text "ready"; clients look at the status.
    return JSONResponse({"ready": is_ready, "live": True}, 200 if is_ready else 503)


async def server_metadata(_: Request) -> Response:
    """Who is this."""
    document = {"name": "dynlora", "version": release(), "extensions": ["binary_tensor_data"]}
    return JSONResponse(document)


async def model_metadata(request: Request) -> Response:
    """Tensors and versions of a model."""
    state, model = state_of(request), _named(request.path_params)
    await state.versions.until_open()
    slot = await state.versions.named(_numbered(request.path_params))
    versions = [each.version for each in state.versions.loaded]
    return JSONResponse(model.metadata(slot.loaded, versions))


async def model_ready(request: Request) -> Response:
    """A model, or one version of it, can be asked."""
    state, model = state_of(request), _named(request.path_params)
    await state.versions.until_open()
    slot = await state.versions.named(_numbered(request.path_params))
    document = {"name": model.name, "version": str(slot.version), "ready": state.is_ready}
    return JSONResponse(document, 200 if state.is_ready else 503)


async def repository_index(request: Request) -> Response:
    """All models in all versions that are loaded."""
    await request.body()
    versions = state_of(request).versions
    await versions.until_open()
    document = [
        {"name": name, "version": str(slot.version), "state": "READY", "reason": ""}
        for name in MODELS
        for slot in versions.loaded
    ]
    return JSONResponse(document)


class Infer:
    """Computes a model's outputs. Plain ASGI: Starlette's own objects would cost as much as all else."""

    def __init__(self, state: State) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        state, model, version = self._state, _named(scope["path_params"]), _numbered(scope["path_params"])
        slot = await state.versions.named(version)
        parsed = await _read(scope, receive, model, slot, state.settings.limits)
        model.check_inputs(parsed, state.settings.limits)
        wanted = model.wanted(slot.loaded, parsed)

        async def compute(slot: Slot) -> tuple[Call, Outputs]:
            call = Call(slot)
            return call, await model.compute(state.engine, call, parsed)

        number, (call, outputs) = await state.versions.answer(compute, version)
        note(scope, call, rows=len(next(iter(outputs.values()))))
        head: dict[str, Any] = {"model_name": model.name, "model_version": str(number)}
        if parsed.id is not None:
            head["id"] = parsed.id
        body, header_length = build_response(head, outputs, wanted)
        if header_length is None:
            await reply(send, body, b"application/json")
        else:
            length = (HEADER_LENGTH, str(header_length).encode())
            await reply(send, body, b"application/octet-stream", length)


def note(scope: Scope, call: Call, *, rows: int) -> None:
    """Leave for metrics and log what answered, and how long its stages took."""
    scope["state"] = {"version": call.slot.version, "stages": call.stages, "rows": rows}


async def _read(scope: Scope, receive: Receive, model: Model, slot: Slot, limits: Limits) -> InferRequest:
    body = await read_body(receive)
    given = header_of(scope, HEADER_LENGTH)
    if given is not None and not (given.isascii() and given.isdigit() and len(given) < 19):
        raise Problem(400, f"{HEADER_LENGTH.decode()} is not a number: {given!r}")
    length = None if given is None else int(given)
    specs = model.inputs(slot.loaded)
    if (len(body) if length is None else length) > LARGE_JSON_BYTES:
        return await asyncio.to_thread(parse_request, body, length, specs, limits.images)
    return parse_request(body, length, specs, limits.images)


def _named(path: Mapping[str, Any]) -> Model:
    name = path["model"]
    if name not in MODELS:
        raise Problem(404, f"there is no model {name!r}; there are: {', '.join(MODELS)}")
    return MODELS[name]


def _numbered(path: Mapping[str, Any]) -> int | None:
    given = path.get("version")
    if given is None:
        return None
    if not _NUMBER.fullmatch(given):
        raise Problem(404, f"a version is a number, found {given!r}")
    return int(given)


def shortcuts(state: State) -> Shortcuts:
    """The paths that need no routing."""
    infer = Infer(state)
    return {f"/v2/models/{name}/infer": (infer, {"model": name}) for name in MODELS}


def routes(state: State) -> list[Route]:
    """All paths, those with shortcuts too: for other methods, and for requests that name a version."""
    return [
        *_both("/infer", Infer(state), "POST"),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2", server_metadata),
        *_both("/ready", model_ready, "GET"),
        *_both("", model_metadata, "GET"),
        Route("/v2/repository/index", repository_index, methods=["POST"]),
    ]


def _both(suffix: str, endpoint: Any, method: str) -> list[Route]:
    paths = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
    return [Route(f"{path}{suffix}", endpoint, methods=[method]) for path in paths]
