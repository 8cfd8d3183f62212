"""The paths of the Open Inference Protocol v2: health, metadata, repository index, infer."""

import asyncio
import re
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deploy.server.engine import Call
from deploy.server.models import MODELS, Model, Outputs
from deploy.server.problems import Problem
from deploy.server.state import release, state_of
from deploy.server.tensors import InferRequest, build_response, parse_request
from deploy.server.versions import Slot

HEADER_LENGTH = "inference-header-content-length"
_LARGE_JSON_BYTES = 64 << 10  # parsing more than this would be felt by others on the event loop
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
    state, model = state_of(request), _model(request)
    slot = state.versions.named(_version(request))
    versions = [each.version for each in state.versions.loaded]
    return JSONResponse(model.metadata(slot.loaded, versions))


async def model_ready(request: Request) -> Response:
    """A model, or one version of it, can be asked."""
    state, model = state_of(request), _model(request)
    slot = state.versions.named(_version(request))
    document = {"name": model.name, "version": str(slot.version), "ready": state.is_ready}
    return JSONResponse(document, 200 if state.is_ready else 503)


async def repository_index(request: Request) -> Response:
    """All models in all versions that are loaded."""
    await request.body()
    document = [
        {"name": name, "version": str(slot.version), "state": "READY", "reason": ""}
        for name in MODELS
        for slot in state_of(request).versions.loaded
    ]
    return JSONResponse(document)


async def infer(request: Request) -> Response:
    """Compute a model's outputs."""
    state, model, version = state_of(request), _model(request), _version(request)
    slot = state.versions.named(version)
    parsed = await _read(request, model, slot)
    model.check_inputs(parsed, state.settings.limits)
    wanted = model.wanted(slot.loaded, parsed)

    async def compute(slot: Slot) -> tuple[Call, Outputs]:
        call = Call(slot)
        return call, await model.compute(state.engine, call, parsed)

    number, (call, outputs) = await state.versions.answer(compute, version)
    note(request, call, rows=len(next(iter(outputs.values()))))
    head: dict[str, Any] = {"model_name": model.name, "model_version": str(number)}
    if parsed.id is not None:
        head["id"] = parsed.id
    body, header_length = build_response(head, outputs, wanted)
    if header_length is None:
        return Response(body, media_type="application/json")
    headers = {"Inference-Header-Content-Length": str(header_length)}
    return Response(body, media_type="application/octet-stream", headers=headers)


def note(request: Request, call: Call, *, rows: int) -> None:
    """Leave for metrics and log what answered, and how long its stages took."""
    request.state.version = call.slot.version
    request.state.stages = call.stages
    request.state.rows = rows


async def _read(request: Request, model: Model, slot: Slot) -> InferRequest:
    body = await request.body()
    given = request.headers.get(HEADER_LENGTH)
    if given is not None and not (given.isascii() and given.isdigit() and len(given) < 19):
        raise Problem(400, f"{HEADER_LENGTH} is not a number: {given!r}")
    length = None if given is None else int(given)
    specs = model.inputs(slot.loaded)
    if (len(body) if length is None else length) > _LARGE_JSON_BYTES:
        return await asyncio.to_thread(parse_request, body, length, specs)
    return parse_request(body, length, specs)


def _model(request: Request) -> Model:
    name = request.path_params["model"]
    if name not in MODELS:
        raise Problem(404, f"there is no model {name!r}; there are: {', '.join(MODELS)}")
    return MODELS[name]


def _version(request: Request) -> int | None:
    given = request.path_params.get("version")
    if given is None:
        return None
    if not _NUMBER.fullmatch(given):
        raise Problem(404, f"a version is a number, found {given!r}")
    return int(given)


def routes() -> list[Route]:
    """The most used path first: routes are tried in order."""
    return [
        *_both("/infer", infer, "POST"),
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
