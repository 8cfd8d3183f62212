"""The interface as an OpenAPI 3.1 document, for the architecture that is loaded."""

from typing import Any

from deploy.runtime import DEFAULT_TOP, LoadedVersion
from deploy.server.models import MODELS, Model
from deploy.server.problems import STATUSES
from deploy.server.settings import Settings
from deploy.server.state import release
from deploy.server.tensors import Spec

Document = dict[str, Any]

_ALWAYS = (400, 403, 404, 405, 431)
_WORK = (408, 411, 413, 415, 429, 503)
_STRING: Document = {"type": "string"}


def document(loaded: LoadedVersion, settings: Settings) -> Document:
    """Return the whole document."""
    paths: Document = {
        "/v2/health/live": _get("The process answers", _object(live={"type": "boolean"})),
        "/v2/health/ready": _get("New requests may come", _ready(), 503),
        "/v2": _get("Server metadata", _server_metadata()),
        "/v2/repository/index": {"post": _index()},
        "/classify": {"post": _classify(settings)},
        "/version": _waiting(_get("The version that answers", _version(), 503)),
        "/metrics": {"get": _operation("Prometheus metrics", {"text/plain": {"schema": _STRING}})},
        "/openapi.json": _get("This document", {"type": "object"}, 503),
    }
    for model in MODELS.values():
        paths |= _model_paths(model, loaded, settings)
    result: Document = {
        "openapi": "3.1.0",
        "info": {
            "title": "dynlora",
            "version": release(),
            "description": "Open Inference Protocol v2 and picture classification. Every answer names its "
            "model_version; a new version becomes live without a failed request.",
        },
        "paths": paths,
        "components": {"schemas": {"Error": _object(error=_STRING)}},
    }
    if settings.token:
        result["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        result["security"] = [{"token": []}]
        for item in paths.values():
            for operation in item.values():
                operation["responses"]["401"] = _error(401)
    return result


def _model_paths(model: Model, loaded: LoadedVersion, settings: Settings) -> Document:
    version = {
        "name": "version",
        "in": "path",
        "required": True,
        "description": "The live or the previous version; others are not loaded.",
        "schema": {"type": "string", "pattern": "^(0|[1-9][0-9]{0,17})$"},
    }
    paths: Document = {}
    for middle, parameters in (("", []), ("/versions/{version}", [version])):
        path = f"/v2/models/{model.name}{middle}"
        metadata = _get(f"Metadata of {model.name}", _metadata(), 503)
        ready = _get(f"Whether {model.name} can be asked", {"type": "object"}, 503)
        infer = {"post": _infer(model, loaded, settings)}
        for suffix, item in (("", metadata), ("/ready", ready), ("/infer", infer)):
            paths[f"{path}{suffix}"] = item
            for operation in item.values():
                operation["parameters"] = [*parameters, *operation.get("parameters", ())]
    return paths


def _infer(model: Model, loaded: LoadedVersion, settings: Settings) -> Document:
    inputs = [_tensor(spec, settings) for spec in model.inputs(loaded)]
    alternatives = " or ".join(model.alternatives)
    body = _object(inputs={"type": "array", "minItems": 1, "items": {"anyOf": inputs}})
    outputs = {"type": "array", "items": _object(name=_STRING)}
    body["properties"] |= {"id": _STRING, "parameters": {"type": "object"}, "outputs": outputs}
    answer = _object(
        model_name=_STRING,
        model_version=_STRING,
        outputs={"type": "array", "items": _object(name=_STRING, datatype=_STRING, shape=_integers())},
    )
    operation = _operation(
        f"Compute {model.name}",
        {"application/json": {"schema": answer}, "application/octet-stream": {"schema": {}}},
        *_WORK,
    )
    binary = "A JSON header of that many bytes, then the raw tensors; 0: one raw tensor alone."
    operation["description"] = f"Exactly one of the inputs {alternatives} is needed."
    operation["parameters"] = [
        {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "description": binary,
            "schema": {"type": "integer", "minimum": 0},
        }
    ]
    operation["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": body}, "application/octet-stream": {"schema": {}}},
    }
    return operation


def _tensor(spec: Spec, settings: Settings) -> Document:
    sizes = [
        {"const": size} if size >= 0 else {"type": "integer", "minimum": 1, "maximum": settings.limits.images}
        for size in spec.shape
    ]
    item = {"type": "string"} if spec.datatype == "BYTES" else {"type": "number"}
    if spec.datatype == "INT64":
        item = {"type": "integer"}
    if spec.is_file:
        item = {"type": "string", "contentEncoding": "base64"}
    shape = {"type": "array", "prefixItems": sizes, "minItems": len(sizes), "maxItems": len(sizes)}
    tensor = _object(name={"const": spec.name}, datatype={"const": spec.datatype}, shape=shape)
    tensor["properties"]["data"] = {
        "type": "array",
        "description": "Row-major, flat or nested.",
        "items": {"anyOf": [item, {"type": "array"}]} if len(spec.shape) > 1 else item,
    }
    tensor["properties"]["parameters"] = {"type": "object"}
    return tensor


def _classify(settings: Settings) -> Document:
    picture = {"type": "string", "contentMediaType": "application/octet-stream"}
    form = _object(image={"type": "array", "items": picture, "maxItems": settings.limits.images})
    form["properties"] |= {
        "labels": {"type": "array", "items": _STRING, "maxItems": settings.limits.labels},
        "top": {"type": "integer", "minimum": 1, "default": DEFAULT_TOP},
    }
    best = _object(label=_STRING, score={"type": "number"})
    answer = _object(
        model_version=_STRING,
        predictions={"type": "array", "items": {"type": "array", "items": best}},
    )
    operation = _operation("Labels and scores of picture files", _json(answer), *_WORK)
    operation["parameters"] = [
        {
            "name": "labels",
            "in": "query",
            "description": "What to choose from, separated by commas; by default all known classes.",
            "schema": _STRING,
        },
        {"name": "top", "in": "query", "schema": {"type": "integer", "minimum": 1, "default": DEFAULT_TOP}},
    ]
    operation["requestBody"] = {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": form},
            "application/octet-stream": {"schema": {}},
            "image/jpeg": {"schema": {}},
            "image/png": {"schema": {}},
        },
    }
    return operation


def _index() -> Document:
    entry = _object(name=_STRING, version=_STRING, state=_STRING, reason=_STRING)
    operation = _operation("All models and their loaded versions", _json({"type": "array", "items": entry}))
    operation["responses"] |= {str(status): _error(status) for status in (408, 413, 415)}
    body = {"type": "object", "properties": {"ready": {"type": "boolean"}}}
    operation["requestBody"] = {"content": {"application/json": {"schema": body}}}
    return operation


def _ready() -> Document:
    return _object(ready={"type": "boolean"}, live={"type": "boolean"})


def _server_metadata() -> Document:
    return _object(name=_STRING, version=_STRING, extensions={"type": "array", "items": _STRING})


def _metadata() -> Document:
    tensors = {"type": "array", "items": _object(name=_STRING, datatype=_STRING, shape=_integers())}
    versions = {"type": "array", "items": _STRING}
    return _object(name=_STRING, versions=versions, platform=_STRING, inputs=tensors, outputs=tensors)


def _version() -> Document:
    previous = {"type": ["string", "null"]}
    count = {"type": "integer"}
    return _object(model_version=_STRING, previous=previous, classes=count, created_at=_STRING)


def _waiting(item: Document) -> Document:
    item["get"]["parameters"] = [{
        "name": "other_than",
        "in": "query",
        "description": "The number of a version. While it is the live one, a request with the header "
        "`Prefer: wait=SECONDS` (20 at most) waits for another.",
        "schema": {"type": "string", "pattern": "^[0-9]{1,18}$"},
    }]  # fmt: skip
    return item


def _get(summary: str, schema: Document, *statuses: int) -> Document:
    return {"get": _operation(summary, _json(schema), *statuses)}


def _operation(summary: str, content: Document, *statuses: int) -> Document:
    errors = {str(status): _error(status) for status in sorted({*_ALWAYS, *statuses})}
    return {"summary": summary, "responses": {"200": {"description": "Done.", "content": content}, **errors}}


def _error(status: int) -> Document:
    found: Document = {"description": STATUSES[status]}
    schema = {"$ref": "#/components/schemas/Error"}
    # The readiness paths tell the same with their own fields.
    found["content"] = _json({} if status == 503 else schema)
    return found


def _json(schema: Document) -> Document:
    return {"application/json": {"schema": schema}}


def _integers() -> Document:
    return {"type": "array", "items": {"type": "integer"}}


def _object(**properties: Document) -> Document:
    return {"type": "object", "properties": properties, "required": list(properties)}
