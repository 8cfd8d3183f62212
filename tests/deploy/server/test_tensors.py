"""The wire format on its own: what one side writes the other reads, and nothing else is taken."""

import base64
import contextlib
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.server.outputs import build_response
from deploy.server.problems import Problem
from deploy.server.tensors import Spec, parse_request

PIXELS = Spec("pixel_values", "FP32", (-1, 2, 3))
FILES = Spec("image", "BYTES", (-1,), is_file=True)
TEXTS = Spec("texts", "BYTES", (-1,))

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
rows = st.integers(1, 3).flatmap(lambda count: st.lists(finite, min_size=6 * count, max_size=6 * count))


def as_array(values: list[float]) -> np.ndarray:
    """(N, 2, 3)."""
    return np.array(values, np.float32).reshape(-1, 2, 3)


def body(inputs: list[dict[str, Any]], *tensors: bytes) -> tuple[bytes, int]:
    """A request, and the length of its header."""
    header = json.dumps({"inputs": inputs}).encode()
    return b"".join([header, *tensors]), len(header)


def binary(spec: Spec, shape: list[int], raw: bytes) -> dict[str, Any]:
    """An input whose bytes follow the header."""
    size = {"binary_data_size": len(raw)}
    return {"name": spec.name, "datatype": spec.datatype, "shape": shape, "parameters": size}


def pack(files: list[bytes]) -> bytes:
    """Each after its length."""
    return b"".join(struct.pack("<I", len(file)) + file for file in files)


@given(rows)
def test_numbers_arrive_the_same_on_every_way(values: list[float]) -> None:
    """As JSON, as binary after a header, and as the raw body."""
    array = as_array(values)
    plain = {
        "name": "pixel_values",
        "datatype": "FP32",
        "shape": list(array.shape),
        "data": array.ravel().tolist(),
    }
    sent, _ = body([plain])
    mixed, length = body([binary(PIXELS, list(array.shape), array.tobytes())], array.tobytes())

    for raw, header_length in ((sent, None), (mixed, length), (array.tobytes(), 0)):
        found = parse_request(raw, header_length, [PIXELS]).inputs["pixel_values"]
        np.testing.assert_array_equal(found, array)


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=4))
def test_files_arrive_the_same_in_binary_and_as_base64(files: list[bytes]) -> None:
    """Also empty ones, and ones that look like a length."""
    raw = pack(files)
    mixed, length = body([binary(FILES, [len(files)], raw)], raw)
    texts = [base64.b64encode(file).decode() for file in files]
    sent, _ = body([{"name": "image", "datatype": "BYTES", "shape": [len(files)], "data": texts}])

    assert [bytes(file) for file in parse_request(mixed, length, [FILES]).inputs["image"]] == files
    assert [bytes(file) for file in parse_request(sent, None, [FILES]).inputs["image"]] == files


@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(0, 250)))
def test_any_bytes_are_a_request_or_a_problem(raw: bytes, header_length: int | None) -> None:
    """Never another error, which would be a 500."""
    with contextlib.suppress(Problem):
        parse_request(raw, header_length, [PIXELS, FILES, TEXTS])


@given(rows, st.integers(-8, 8).filter(bool))
def test_a_tensor_of_another_length_is_refused(values: list[float], change: int) -> None:
    """Too short, too long, or followed by something."""
    raw = as_array(values).tobytes()
    changed = raw[:change] if change < 0 else raw + bytes(change)
    shape = list(as_array(values).shape)
    announced, length = body([binary(PIXELS, shape, raw)], changed)
    with pytest.raises(Problem):
        parse_request(announced, length, [PIXELS])
    truthful, length = body([binary(PIXELS, shape, changed)], changed)
    with pytest.raises(Problem):
        parse_request(truthful, length, [PIXELS])


@given(
    rows, st.lists(st.text(st.characters(codec="utf-8"), max_size=8), min_size=1, max_size=3), st.booleans()
)
def test_answers_can_be_read_back(values: list[float], texts: list[str], is_binary: bool) -> None:
    """Numbers and labels, each in JSON or in binary beside the other."""
    scores, labels = as_array(values), np.array(texts, object)
    wanted = {"labels": is_binary, "scores": not is_binary}
    raw, length = build_response({"model_name": "m"}, {"labels": labels, "scores": scores}, wanted)

    assert length is not None
    header, rest = json.loads(raw[:length]), raw[length:]
    found = {output["name"]: output for output in header["outputs"]}
    assert header["model_name"] == "m"
    assert found["scores"]["shape"] == list(scores.shape)
    assert len(rest) == sum(o.get("parameters", {}).get("binary_data_size", 0) for o in header["outputs"])
    if is_binary:
        assert rest == pack([text.encode() for text in texts])
        np.testing.assert_array_equal(np.float32(found["scores"]["data"]), scores.ravel())
    else:
        assert found["labels"]["data"] == texts
        np.testing.assert_array_equal(np.frombuffer(rest, np.float32), scores.ravel())


def test_a_header_that_came_before_is_not_taken_for_its_body() -> None:
    """The same header announces other bytes each time; what it says of them is checked each time."""
    specs = (Spec("pixel_values", "FP32", (-1, 2)),)
    entry = {
        "name": "pixel_values",
        "datatype": "FP32",
        "shape": [1, 2],
        "parameters": {"binary_data_size": 8},
    }
    header = json.dumps({"inputs": [entry]}).encode()

    for value in (1.0, 2.0):
        body = header + np.full((1, 2), value, "<f4").tobytes()
        found = parse_request(body, len(header), specs).inputs["pixel_values"]
        np.testing.assert_array_equal(found, np.full((1, 2), value, np.float32))
    with pytest.raises(Problem, match="does not fit the 4 bytes left"):
        parse_request(header + bytes(4), len(header), specs)
    with pytest.raises(Problem, match="4 bytes follow"):
        parse_request(header + bytes(12), len(header), specs)
    other = (Spec("pixel_values", "FP32", (-1, 3)),)
    with pytest.raises(Problem, match="must have shape"):
        parse_request(header + bytes(8), len(header), other)
