"""Requests of the Open Inference Protocol v2: JSON, and the binary tensor extension.

    POST body = JSON header, then the raw tensors in its order (little-endian, row-major);
    the header's length is in the HTTP header Inference-Header-Content-Length

Pure functions over bytes. Numbers that come in binary are not copied: an array looks into the body.
"""

import binascii
import itertools
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.server.problems import Problem

Tensor = NDArray[Any] | list[bytes]

LARGE_JSON_BYTES = 64 << 10  # parsing more than this would be felt by others on the event loop

# Decoding holds Python's lock, and everybody else waits. What many bytes can cost most is bounded by these.
_JSON_NUMBERS = 1 << 20  # half a second of a core; other threads have their turn in between
_JSON_MARKS = 1 << 16  # brackets, braces, commas and colons besides those of numbers: texts have some too

_REMEMBERED_HEADERS = 128
_REMEMBERED_BYTES = 4096  # of one header: half a megabyte of them at most


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _float(text: str) -> float:
    return float(text)


def _int(text: str) -> int:
    return int(text)


# Made once: json.loads would make a new one for each request.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
# Calls a function of Python's for each number, and at each of those another thread may take the lock.
_PATIENT_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_float, parse_int=_int)

_DTYPES: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "INT64": np.dtype("<i8")}


@dataclass(frozen=True)
class Spec:
    """One input or output of a model; -1 stands for any length.

    ``is_file``: the elements are files, which JSON can hold only as base64.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    is_file: bool = False

    def document(self) -> dict[str, Any]:
        """As model metadata tells it."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@dataclass(frozen=True)
class InferRequest:
    """What a client asks for. BYTES tensors are lists; ``outputs`` None means all, by ``is_binary``."""

    inputs: dict[str, Tensor]
    id: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, bool] | None = None
    is_binary: bool = False


def parse_request(
    body: bytes, header_length: int | None, specs: Sequence[Spec], most_rows: int = 64
) -> InferRequest:
    """Return the request in ``body``; header length None means JSON alone, 0 means one raw tensor.

    Args:
        most_rows: of numbers in JSON; with more of them it is refused before it is decoded.

    Raises:
        Problem: it is not one, or its tensors do not fit ``specs``.
    """
    if header_length == 0:
        return InferRequest({specs[0].name: _raw(specs[0], body)}, is_binary=True)
    if header_length is not None and header_length > len(body):
        raise Problem(400, f"Inference-Header-Content-Length is {header_length}, the body {len(body)} bytes")
    length = len(body) if header_length is None else header_length
    if length > LARGE_JSON_BYTES:
        _check_marks(memoryview(body)[:length], specs, most_rows)
    read = _remembered_header if length <= _REMEMBERED_BYTES else _read_header
    header = read(body[:length], tuple(specs))
    inputs = header.take_from(memoryview(body)[length:])
    return InferRequest(inputs, header.id, header.parameters, header.outputs, header.is_binary)


def _check_marks(text: memoryview, specs: Sequence[Spec], most_rows: int) -> None:
    """Compare how much a decoder would have to make with what the inputs can need at most."""
    tails = [spec.shape[1:] for spec in specs if spec.datatype != "BYTES"]
    numbers = min(_JSON_NUMBERS, most_rows * sum(math.prod(tail) for tail in tails))
    lists = most_rows * sum(math.prod(tail[:depth]) for tail in tails for depth in range(len(tail)))
    marks = np.frombuffer(text, np.uint8)
    for signs, most in ((",", numbers), ("[", lists), ("{:", 0)):
        found = sum(int(np.count_nonzero(marks == ord(sign))) for sign in signs)
        if found > most + _JSON_MARKS:
            raise Problem(
                413,
                f"the JSON has {found} of the characters {' '.join(signs)}, at most {most + _JSON_MARKS} are "
                "allowed: send numbers and files as binary tensors (binary_data_size), or fewer at once",
            )


@dataclass(frozen=True)
class _Header:
    """The JSON part of a request, checked. An input is a tensor, or a shape and the bytes it takes."""

    inputs: tuple[tuple[Spec, Tensor | None, tuple[int, ...], int], ...]
    id: str | None
    parameters: dict[str, Any]
    outputs: dict[str, bool] | None
    is_binary: bool

    def take_from(self, view: memoryview) -> dict[str, Tensor]:
        """Return all tensors, those in binary out of what follows the header."""
        tensors: dict[str, Tensor] = {}
        used = 0
        for spec, given, shape, size in self.inputs:
            tensor = given
            if tensor is None:
                left = len(view) - used
                if size > left:
                    raise Problem(
                        400, f"input {spec.name}: binary_data_size does not fit the {left} bytes left"
                    )
                tensor = _from_bytes(view[used : used + size], shape, spec)
                used += size
            tensors[spec.name] = tensor
        if used != len(view):
            raise Problem(400, f"{len(view) - used} bytes follow the tensors that the JSON header announces")
        return tensors


def _read_header(text: bytes, specs: tuple[Spec, ...]) -> _Header:
    document = parse_json(text)
    inputs = _inputs(document, {spec.name: spec for spec in specs})
    parameters = _object(document, "parameters")
    name = document.get("id")
    if name is not None and not isinstance(name, str):
        raise Problem(400, "`id` must be a string")
    is_binary = parameters.get("binary_data_output") is True
    return _Header(inputs, name, parameters, _outputs(document, is_binary), is_binary)


# A client sends the same header again and again; who puts a new id into each only gains nothing.
_remembered_header = lru_cache(_REMEMBERED_HEADERS)(_read_header)


def parse_json(text: bytes) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        Problem: it is not one.
    """
    try:
        decoder = _DECODER if len(text) <= LARGE_JSON_BYTES else _PATIENT_DECODER
        # Strictly: letting half characters pass takes Python a moment for each of them.
        document = decoder.decode(text.decode(json.detect_encoding(text)))
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"the body is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise Problem(400, f"expected a JSON object, found {type(document).__name__}")
    return document


def _inputs(
    document: dict[str, Any], specs: dict[str, Spec]
) -> tuple[tuple[Spec, Tensor | None, tuple[int, ...], int], ...]:
    entries = document.get("inputs")
    if not isinstance(entries, list) or not entries:
        raise Problem(400, "`inputs` must be a list of at least one tensor")
    found: dict[str, tuple[Spec, Tensor | None, tuple[int, ...], int]] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise Problem(400, "every input is an object with a `name`")
        spec = specs.get(entry["name"])
        if spec is None:
            raise Problem(400, f"there is no input {entry['name']!r}; there are: {', '.join(specs)}")
        if spec.name in found:
            raise Problem(400, f"input {spec.name} comes twice")
        shape = _checked_shape(entry, spec)
        size = _object(entry, "parameters").get("binary_data_size")
        if size is None:
            found[spec.name] = (spec, _from_json(entry.get("data"), shape, spec), shape, 0)
        elif type(size) is not int or size < 0 or "data" in entry:
            raise Problem(
                400,
                f"input {spec.name}: binary_data_size does not fit: a number of bytes, instead of `data`",
            )
        else:
            found[spec.name] = (spec, None, shape, size)
    return tuple(found.values())


def _checked_shape(entry: dict[str, Any], spec: Spec) -> tuple[int, ...]:
    shape, datatype = entry.get("shape"), entry.get("datatype")
    if datatype != spec.datatype:
        raise Problem(400, f"input {spec.name} must be {spec.datatype}, found {datatype!r}")
    fits = (
        isinstance(shape, list)
        and len(shape) == len(spec.shape)
        and all(type(size) is int and size > 0 for size in shape)
        and all(want in (-1, size) for size, want in zip(shape, spec.shape, strict=True))
    )
    if not fits:
        raise Problem(400, f"input {spec.name} must have shape {list(spec.shape)}, found {shape}")
    return tuple(shape or ())


def _from_bytes(raw: memoryview, shape: tuple[int, ...], spec: Spec) -> Tensor:
    if spec.datatype == "BYTES":
        return _split_bytes(raw, shape[0], spec.name)
    dtype = _DTYPES[spec.datatype]
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise Problem(
            400,
            f"input {spec.name} of shape {list(shape)} takes {math.prod(shape) * dtype.itemsize} bytes, "
            f"found {len(raw)}",
        )
    return np.frombuffer(raw, dtype).reshape(shape)


def _raw(spec: Spec, body: bytes) -> Tensor:
    """One tensor alone: its first dimension follows from the body's length."""
    if spec.datatype == "BYTES":
        return [body]
    dtype = _DTYPES[spec.datatype]
    row_bytes = math.prod(spec.shape[1:]) * dtype.itemsize
    if not body or len(body) % row_bytes:
        raise Problem(400, f"{spec.name} takes {row_bytes} bytes per row, found {len(body)} bytes")
    return np.frombuffer(body, dtype).reshape(-1, *spec.shape[1:])


def _split_bytes(raw: memoryview, count: int, name: str) -> list[bytes]:
    """Undo the 4-byte little-endian length before each element."""
    elements: list[bytes] = []
    offset = 0
    while offset + 4 <= len(raw) and len(elements) < count:
        (length,) = struct.unpack_from("<I", raw, offset)
        elements.append(bytes(raw[offset + 4 : offset + 4 + length]))
        offset += 4 + length
    if offset != len(raw) or len(elements) != count:
        raise Problem(400, f"input {name}: its bytes are not {count} elements, each after its 4-byte length")
    return elements


def _from_json(data: Any, shape: tuple[int, ...], spec: Spec) -> Tensor:
    if not isinstance(data, list):
        raise Problem(400, f"input {spec.name} has neither `data` (a list) nor binary_data_size")
    if spec.datatype == "BYTES":
        if len(data) != shape[0] or not all(isinstance(element, str) for element in data):
            raise Problem(400, f"input {spec.name} must be a list of {shape[0]} strings")
        return [(_decode_base64 if spec.is_file else _encode)(element) for element in data]
    try:
        with np.errstate(over="ignore"):  # becomes infinity, and that shows in the outputs
            return _numbers(data, spec.datatype).astype(_DTYPES[spec.datatype]).reshape(shape)
    except (ValueError, OverflowError, TypeError) as error:
        raise Problem(400, f"input {spec.name}: `data` cannot be used as {list(shape)}: {error}") from error


def _numbers(data: list[Any], datatype: str) -> NDArray[Any]:
    """Return the numbers of a list, or of lists in lists, in one row.

    numpy would find all of that out by itself, and make room for the longest text as often as there are
    elements before we could say that texts are no numbers.
    """
    while data and type(data[0]) is list:
        if set(map(type, data)) != {list} or len(set(map(len, data))) != 1:
            raise ValueError("its lists are not all of one length")
        data = list(itertools.chain.from_iterable(data))
    if not set(map(type, data)) <= ({int} if datatype == "INT64" else {int, float}):
        raise ValueError(f"expected {datatype}")
    return np.array(data, np.int64 if datatype == "INT64" else np.float64)


def _decode_base64(text: str) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:  # binascii.Error is one
        raise Problem(400, f"a file in JSON must be base64: {error}") from error


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise Problem(400, f"{text!r} is not valid Unicode") from error


def _outputs(document: dict[str, Any], is_binary: bool) -> dict[str, bool] | None:  # noqa: FBT001
    entries = document.get("outputs")
    if entries is None or entries == []:
        return None
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in entries
    ):
        raise Problem(400, "`outputs` must be a list of objects with a `name`")
    return {
        entry["name"]: bool(_object(entry, "parameters").get("binary_data", is_binary)) for entry in entries
    }


def _object(document: dict[str, Any], key: str) -> dict[str, Any]:
    found = document.get(key)
    if found is not None and not isinstance(found, dict):
        raise Problem(400, f"`{key}` must be an object")
    return found or {}
