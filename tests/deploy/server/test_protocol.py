"""The Open Inference Protocol, asked by NVIDIA's own client and by hand."""

import base64
import json
import struct
import threading
import time

import httpx
import numpy as np
import pytest

from deploy.runtime import LoadedVersion
from tests.deploy.server.servers import Server, ask_pixels, binary_outputs, jpeg, pixels, tensor

triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")


@pytest.fixture
def client(server: Server):
    """NVIDIA's client, connected."""
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as found:
        yield found


def test_tritonclient_finds_its_way(client, loaded: LoadedVersion) -> None:
    """Live, ready, metadata of server and models, versions and the repository index are as it expects."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    for name in ("vision", "text", "classifier"):
        assert client.is_model_ready(name)
        assert client.get_model_metadata(name)["versions"] == [str(loaded.version)]
    index = client.get_model_repository_index()
    assert {entry["name"] for entry in index} == {"vision", "text", "classifier"}
    assert not client.is_model_ready("vision", "7")


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_tritonclient_infers(client, loaded: LoadedVersion, binary_in: bool, binary_out: bool) -> None:
    """JSON and binary tensors, both ways, give the embeddings of the version that the answer names."""
    values = pixels(3)
    given = triton.InferInput("pixel_values", list(values.shape), "FP32")
    given.set_data_from_numpy(values, binary_data=binary_in)
    wanted = triton.InferRequestedOutput("image_embeds", binary_data=binary_out)

    answer = client.infer("vision", [given], outputs=[wanted], request_id="17")

    assert answer.get_response()["id"] == "17"
    assert answer.get_response()["model_version"] == str(loaded.version)
    np.testing.assert_allclose(answer.as_numpy("image_embeds"), loaded.encode_pixels(values), atol=1e-5)


def test_tritonclient_classifies_files_and_texts(client, loaded: LoadedVersion) -> None:
    """BYTES tensors carry picture files and labels in, labels out."""
    files = np.array([jpeg(0), jpeg(1)], object)
    labels = np.array([b"cat", "Stra\u00dfe".encode(), b"pine tree"], object)
    inputs = [triton.InferInput("image", [2], "BYTES"), triton.InferInput("labels", [3], "BYTES")]
    inputs[0].set_data_from_numpy(files)
    inputs[1].set_data_from_numpy(labels)

    answer = client.infer("classifier", inputs, parameters={"top": 2})

    expected = loaded.classify(list(files), ["cat", "Straße", "pine tree"], top=2)
    found = answer.as_numpy("labels")
    assert [[text.decode() for text in row] for row in found] == [[p.label for p in row] for row in expected]
    scores = [[p.score for p in row] for row in expected]
    np.testing.assert_allclose(answer.as_numpy("scores"), scores, atol=1e-5)


def test_texts_and_ids_are_the_same_thing(http: httpx.Client, loaded: LoadedVersion) -> None:
    """The text model takes token ids, or texts that it tokenizes as the version does."""
    texts = ["a photo of a cat.", "Ünïcödé &amp; more"]
    ids = loaded.tokenize(texts)
    bodies = [
        {"inputs": [tensor("texts", "BYTES", [2], texts)]},
        {"inputs": [tensor("input_ids", "INT64", ids.shape, ids.tolist())]},
    ]
    for body in bodies:
        [output] = http.post("/v2/models/text/infer", json=body).json()["outputs"]
        found = np.array(output["data"], np.float32).reshape(output["shape"])
        np.testing.assert_allclose(found, loaded.encode_texts(texts), atol=1e-5)


def test_a_file_in_json_is_base64(http: httpx.Client, loaded: LoadedVersion) -> None:
    """And pixel values of the same picture say the same."""
    [expected] = loaded.classify([jpeg()], top=1)
    text = base64.b64encode(jpeg()).decode()
    body = {"inputs": [tensor("image", "BYTES", [1], [text])], "parameters": {"top": 1}}

    answer = http.post("/v2/models/classifier/infer", json=body).json()

    labels, scores = answer["outputs"]
    assert labels == {"name": "labels", "datatype": "BYTES", "shape": [1, 1], "data": [expected[0].label]}
    assert scores["data"] == pytest.approx([expected[0].score], abs=1e-5)


def test_a_raw_request_is_one_tensor_alone(http: httpx.Client, loaded: LoadedVersion) -> None:
    """Header length 0: no JSON at all; rows follow from the size."""
    values = pixels(2)
    header, [found] = binary_outputs(ask_pixels(http, values))

    assert header["model_version"] == str(loaded.version)
    np.testing.assert_allclose(found, loaded.encode_pixels(values), atol=1e-5)


def test_the_live_version_can_be_named_and_others_are_not_found(http: httpx.Client, loaded) -> None:
    """A request that names a version is answered by it, or by nothing."""
    assert ask_pixels(http, pixels(1), str(loaded.version)).status_code == 200
    for name in ("7", "x", "-1", "007", "9" * 40):
        answer = ask_pixels(http, pixels(1), name)
        assert answer.status_code == 404, name
        assert answer.json()["error"]


def _vision(**changes) -> dict:
    return {"inputs": [tensor("pixel_values", "FP32", [1, 3, 64, 64], [0.0] * 12288) | changes]}


IDS = [0] * 77
BAD_REQUESTS = {
    "no JSON": ("vision", b"{", "not JSON"),
    "deep JSON": ("vision", b"[" * 70_000, "not JSON"),
    "NaN": ("vision", b'{"inputs": NaN}', "not JSON"),
    "no object": ("vision", b"[]", "JSON object"),
    "no UTF-8": ("vision", b'"\xff"', "not JSON"),
    "no inputs": ("vision", {}, "inputs"),
    "unknown input": ("vision", _vision(name="x"), "no input 'x'; there are: pixel_values"),
    "datatype": ("vision", _vision(datatype="FP16"), "must be FP32, found 'FP16'"),
    "shape": ("vision", _vision(shape=[1, 3, 32, 64]), "must have shape [-1, 3, 64, 64]"),
    "negative": ("vision", _vision(shape=[-1, 3, 64, 64]), "must have shape"),
    "no rows": ("vision", _vision(shape=[0, 3, 64, 64], data=[]), "must have shape"),
    "too few": ("vision", _vision(data=[0.0]), "cannot be used"),
    "strings": ("vision", _vision(data=["0"] * 12288), "expected FP32"),
    "ragged": ("vision", _vision(data=[[0.0], [0.0, 1.0]]), "cannot be used"),
    "infinite": ("vision", _vision(data=[1e39] * 12288), "not finite"),
    "no data": ("vision", _vision(data=None), "neither"),
    "binary beyond": ("vision", _vision(parameters={"binary_data_size": 5}), "does not fit"),
    "unknown output": ("vision", _vision() | {"outputs": [{"name": "y"}]}, "no output 'y'"),
    "id": ("vision", _vision() | {"id": 3}, "`id`"),
    "token ids": ("text", {"inputs": [tensor("input_ids", "INT64", [1, 77], [*IDS[1:], 10**9])]}, "from 0"),
    "huge ids": ("text", {"inputs": [tensor("input_ids", "INT64", [1, 77], [*IDS[1:], 10**30])]}, "cannot"),
    "both": ("text", {"inputs": [tensor("input_ids", "INT64", [1, 77], IDS),
                                 tensor("texts", "BYTES", [1], ["a"])]}, "exactly one"),
    "surrogate": ("text", {"inputs": [tensor("texts", "BYTES", [1], ["\ud800"])]}, "not valid Unicode"),
    "no picture": ("classifier", {"inputs": [tensor("image", "BYTES", [1], ["AAAA"])]}, "not an image"),
    "no base64": ("classifier", {"inputs": [tensor("image", "BYTES", [1], ["é!"])]}, "base64"),
    "top": ("classifier", {"inputs": [tensor("image", "BYTES", [1], ["AAAA"])], "parameters": {"top": 0}},
            "top must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_told_what_is_wrong(http: httpx.Client, case: str) -> None:
    """Status 400 and one sentence, whatever comes in; the server goes on."""
    model, body, expected = BAD_REQUESTS[case]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = http.post(f"/v2/models/{model}/infer", content=content)

    assert answer.status_code == 400, answer.text
    assert expected in answer.json()["error"]


def _with_data(data: bytes) -> bytes:
    """A request for one row of pixel values, in JSON."""
    start = b'{"inputs":[{"name":"pixel_values","datatype":"FP32","shape":[1,3,64,64],"data":['
    return start + data + b"]}]}"


# Made only when they are sent: they are large.
COSTLY_REQUESTS = {
    "lists": (lambda: b"[]," * (10 << 20) + b"[]", 413, "binary tensors"),
    "numbers": (lambda: b"0," * (4 << 20) + b"0", 413, "binary tensors"),
    "keys": (lambda: b"{" + b",".join(b'"%d":0' % at for at in range(1 << 18)) + b"}", 413, "binary tensors"),
    "half characters": (lambda: b'"' + b"\xed\xa0\x80" * (10 << 20) + b'"', 400, "not JSON"),
    "a long text": (lambda: b'"' + b"a" * (1 << 20) + b'"' + b",0" * 2000, 400, "expected FP32"),
}


@pytest.mark.parametrize("case", COSTLY_REQUESTS)
def test_a_request_that_would_cost_much_holds_up_nobody(server: Server, case: str) -> None:
    """Refused before it is made into objects: meanwhile others are answered."""
    data, status, expected = COSTLY_REQUESTS[case]
    content = _with_data(data())
    answers: list[httpx.Response] = []
    with httpx.Client(base_url=server.url, timeout=60) as client:
        asking = threading.Thread(
            target=lambda: answers.append(client.post("/v2/models/vision/infer", content=content))
        )
        asking.start()
        slowest = 0.0
        while asking.is_alive():
            begun = time.monotonic()
            server.client.get("/v2/health/live")
            slowest = max(slowest, time.monotonic() - begun)
        asking.join()

    assert answers[0].status_code == status, answers[0].text[:200]
    assert expected in answers[0].json()["error"]
    assert slowest < 1


def test_as_many_pictures_in_json_as_a_request_may_have_are_answered(
    http: httpx.Client, loaded: LoadedVersion
) -> None:
    """Slowly, and like those of one in binary; lists within lists are taken, too."""
    values = np.random.default_rng(0).integers(-2, 3, (64, 3, 64, 64)).astype(np.float32)
    answer = http.post(
        "/v2/models/vision/infer",
        json={"inputs": [tensor("pixel_values", "FP32", values.shape, values.tolist())]},
    )
    expected = loaded.encode_pixels(values[-2:])
    found = np.array(answer.json()["outputs"][0]["data"]).reshape(64, -1)
    np.testing.assert_allclose(found[-2:], expected, atol=1e-5)


def test_a_bad_row_fails_nobody_else(server: Server, loaded: LoadedVersion) -> None:
    """Rows that share a batch with NaN get their own right answer."""
    from concurrent.futures import ThreadPoolExecutor

    bad, good = np.full((1, 3, 64, 64), np.nan, np.float32), pixels(1)
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda index: ask_pixels(server.client, bad if index % 2 else good), range(24))
        )

    assert [answer.status_code for answer in answers] == [200, 400] * 12
    for answer in answers[::2]:
        _, [found] = binary_outputs(answer)
        np.testing.assert_allclose(found, loaded.encode_pixels(good), atol=1e-5)


def test_bytes_that_lie_about_their_length_are_refused(http: httpx.Client) -> None:
    """A length that leads beyond the tensor is no reason to read there."""
    raw = struct.pack("<I", 1 << 31) + b"abc"
    entry = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(raw)}}
    header = json.dumps({"inputs": [entry]}).encode()
    for length in (len(header), len(header) - 1, len(header) + 100):
        answer = http.post(
            "/v2/models/classifier/infer",
            content=header + raw,
            headers={"Inference-Header-Content-Length": str(length)},
        )
        assert answer.status_code == 400
