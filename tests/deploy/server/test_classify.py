"""POST /classify: files in, labels out, limits kept."""

import io
import json
import shlex
import shutil
import subprocess
import zlib

import httpx
import pytest
from PIL import Image

from deploy.runtime import LoadedVersion
from deploy.server.models import checked_top
from deploy.server.problems import Problem
from tests.deploy.server.servers import ROOT, Server, jpeg


def test_a_file_as_the_body(http: httpx.Client, loaded: LoadedVersion) -> None:
    """The answer is the version's own, and names it."""
    answer = http.post("/classify", content=jpeg(), headers={"Content-Type": "image/jpeg"}, params={"top": 3})

    [expected] = loaded.classify([jpeg()], top=3)
    [found] = answer.json()["predictions"]
    assert answer.json()["model_version"] == str(loaded.version)
    assert [best["label"] for best in found] == [best.label for best in expected]
    assert [best["score"] for best in found] == pytest.approx([best.score for best in expected], abs=1e-5)


@pytest.mark.parametrize(
    "labels", [{"labels": "cat,  pine tree,zebra"}, {"labels": ["cat", "pine tree", "zebra"]}]
)
def test_several_files_with_labels(http: httpx.Client, loaded: LoadedVersion, labels: dict) -> None:
    """A form holds as many files as the limit allows, and labels of one's own."""
    files = [("image", (f"{seed}.jpg", jpeg(seed))) for seed in range(3)]
    answer = http.post("/classify", files=files, data=labels)

    expected = loaded.classify([jpeg(seed) for seed in range(3)], ["cat", "pine tree", "zebra"])
    found = answer.json()["predictions"]
    assert [[best["label"] for best in row] for row in found] == [[p.label for p in row] for row in expected]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed here")
def test_the_lines_with_curl_in_the_docs_work_as_printed(server: Server, loaded: LoadedVersion) -> None:
    """One picture as the body, and a form with two and names of one's own."""
    page = (ROOT / "docs/serving.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("curl ")]
    asked = [shlex.split(line.replace("http://127.0.0.1:8000", server.url)) for line in lines]
    answers = [
        json.loads(subprocess.run(words, cwd=ROOT, capture_output=True, check=True).stdout) for words in asked
    ]
    one, several = (answer["predictions"] for answer in answers)

    assert [len(row) for row in one] == [3]
    assert {best["label"] for best in one[0]} <= set(loaded.class_names)
    assert [{best["label"] for best in row} for row in several] == [{"boot", "cap"}] * 2


def _bomb() -> bytes:
    """A PNG of a few kB that says it has 900 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = (30_000).to_bytes(4, "big")
    head = chunk(b"IHDR", size + size + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _large() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (7000, 6000)).save(buffer, "PNG")
    return buffer.getvalue()


BAD = {
    "nothing": ({"content": b""}, 400, "no picture"),
    "text": ({"content": b"hello"}, 400, "not an image"),
    "cut short": ({"content": jpeg()[:-200]}, 400, "cut short"),
    "bomb": ({"content": _bomb()}, 400, "too many pixels"),
    "large": ({"content": _large()}, 400, "too many pixels"),
    "type": ({"content": b"{}", "headers": {"Content-Type": "application/json"}}, 415, "expected image"),
    "gzip": ({"content": b"x", "headers": {"Content-Encoding": "gzip"}}, 415, "compressed"),
    "field": ({"files": {"picture": jpeg()}}, 400, "no field 'picture'"),
    "broken form": ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "form"),
    "top": ({"content": jpeg(), "params": {"top": "many"}}, 400, "top must be"),
    "negative top": ({"content": jpeg(), "params": {"top": "-1"}}, 400, "top must be"),
    "many": ({"files": [("image", jpeg())] * 65}, 413, "at most 64"),
    "labels": ({"files": {"image": jpeg()}, "data": {"labels": [f"l{i}" for i in range(1001)]}}, 413,
               "at most 1000"),
    "long label": ({"content": jpeg(), "params": {"labels": "x" * 501}}, 413, "500 characters"),
    "second file": ({"files": [("image", jpeg()), ("image", b"x")]}, 400, "image 2 of 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_classified_is_told(http: httpx.Client, case: str) -> None:
    """A status that says whose fault it is, and a sentence that says what to change."""
    request, status, expected = BAD[case]
    answer = http.post("/classify", **request)

    assert (answer.status_code, expected in answer.json()["error"]) == (status, True), answer.text


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_above_the_limit_is_cut_off(http: httpx.Client, announced: bool) -> None:
    """By its Content-Length before it is read, without one as soon as it is too long."""
    size = 33 << 20
    content = b"x" * size if announced else (b"x" * (1 << 20) for _ in range(33))
    try:
        answer = http.post("/classify", content=content)
    except (httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError):
        answer = None  # the server hung up while we were sending: nothing was read further

    assert answer is None or answer.status_code == 413
    assert http.get("/v2/health/live").status_code == 200


def test_a_number_of_labels_beyond_any_float_is_a_number() -> None:
    """JSON knows integers of any length; neither they nor odd values end in a 500."""
    assert checked_top(10**400) == checked_top(1 << 20)
    for odd in (-(10**400), 0, float("nan"), float("inf"), True, "3", None, [1]):
        with pytest.raises(Problem, match="top must be"):
            checked_top(odd)
