"""The Triton model repository: read back with ONNX Runtime, Triton's own protobuf, a server that loads."""

import contextlib
import http.server
import importlib.util
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy import triton_control
from deploy.copying import copy_file
from deploy.errors import ShareError
from deploy.manifest import load_manifest
from deploy.ort import onnxruntime as ort
from deploy.runtime import LoadedVersion
from deploy.store_reader import StoreReader
from deploy.triton import CONFIG_NAME, Repository, config_text
from deploy.triton_control import sync
from tests.deploy.swaps import point


def parse_config(path: Path) -> Any:
    """A config.pbtxt as Triton reads it: with the message type of NVIDIA's client package."""
    pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    package = importlib.util.find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        pytest.skip("tritonclient is not installed")
    # The file alone: its package would import grpc, which is not needed to parse a text.
    file = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from google.protobuf import text_format

    return text_format.Parse(path.read_text(), module.ModelConfig())


def folders(repository: Path, model: str) -> list[str]:
    """The names in a model's folder."""
    return sorted(path.name for path in (repository / model).iterdir())


class TritonLike(http.server.BaseHTTPRequestHandler):
    """Loads what is asked for as Triton does: the versions that config.pbtxt names, if they are sound."""

    repository: Path
    loaded: dict[str, set[int]]
    asked: list[str]
    failures: int = 0

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, document: object = None) -> None:
        body = b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        kind = type(self)
        self.rfile.read(int(self.headers["Content-Length"]))
        kind.asked.append(self.path)
        model = self.path.split("/")[4]
        if kind.failures:
            kind.failures -= 1
            self.answer(400, {"error": f"failed to load '{model}', no memory left"})
            return
        versions = set(parse_config(kind.repository / model / CONFIG_NAME).version_policy.specific.versions)
        for version in versions:
            path = kind.repository / model / str(version) / "model.onnx" / "model.onnx"
            ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        kind.loaded[model] = versions
        self.answer(200)

    def do_GET(self) -> None:
        kind = type(self)
        kind.asked.append(self.path)
        _, _, _, model, _, version, _ = self.path.split("/")
        self.answer(200 if int(version) in kind.loaded.get(model, ()) else 400)


@contextlib.contextmanager
def triton_server(repository: Path) -> Iterator[tuple[str, type[TritonLike]]]:
    """A server with the model repository extension over a repository; gives address and handler."""
    handler = type("Handler", (TritonLike,), {"repository": repository, "loaded": {}, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_onnx_runtime_gives_the_same_embeddings_out_of_the_repository(serving: Path, tmp_path: Path) -> None:
    """Every version of both towers, loaded from its own folder, and with its own classes beside it."""
    point(serving, 1)
    sync(StoreReader(serving), tmp_path / "models")
    for version in (0, 1):
        with LoadedVersion(serving / "versions" / str(version)) as loaded:
            pixels = np.random.default_rng(0).standard_normal((2, 3, *loaded.preprocessing.size), np.float32)
            expected = {"vision": loaded.encode_pixels(pixels), "text": loaded.encode_texts(["a cup", "two"])}
            feeds = {
                "vision": {"pixel_values": pixels},
                "text": {"input_ids": loaded._tokenizer(["a cup", "two"])},
            }
        for tower, feed in feeds.items():
            folder = tmp_path / "models" / f"dynlora_{tower}" / str(version)
            session = ort.InferenceSession(
                str(folder / "model.onnx/model.onnx"), providers=["CPUExecutionProvider"]
            )
            np.testing.assert_allclose(session.run(None, feed)[0], expected[tower], atol=1e-6)
            own = (serving / "versions" / str(version) / "class_embeddings.npy").read_bytes()
            assert (folder / "class_embeddings.npy").read_bytes() == own


def test_the_config_is_what_triton_parses(serving: Path, tmp_path: Path) -> None:
    """Names, types and shapes are those of the graphs; the live version is the highest that is served."""
    point(serving, 2)
    sync(StoreReader(serving), tmp_path)
    manifest = load_manifest(serving / "versions/2")

    vision = parse_config(tmp_path / "dynlora_vision" / CONFIG_NAME)
    text = parse_config(tmp_path / "dynlora_text" / CONFIG_NAME)

    assert vision.name == "dynlora_vision"
    assert vision.backend == "onnxruntime"
    assert list(vision.version_policy.specific.versions) == [2, 1]
    assert [(i.name, list(i.dims)) for i in vision.input] == [("pixel_values", [3, 64, 64])]
    assert [(o.name, list(o.dims)) for o in vision.output] == [("image_embeds", [manifest.embed_dim])]
    assert [(i.name, list(i.dims)) for i in text.input] == [("input_ids", [manifest.context_length])]
    assert [warm.batch_size for warm in text.model_warmup] == [1, vision.max_batch_size]
    assert vision.HasField("dynamic_batching")
    for config, tower in ((vision, "vision"), (text, "text")):
        graph = tmp_path / f"dynlora_{tower}" / "2/model.onnx/model.onnx"
        session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        assert [value.name for value in session.get_inputs()] == [value.name for value in config.input]
        assert [value.name for value in session.get_outputs()] == [value.name for value in config.output]


def test_versions_come_and_go_and_a_roll_back_is_followed(serving: Path, tmp_path: Path) -> None:
    """Live and previous are there, older ones are not, and after a roll-back nothing newer is."""
    for live, expected in ((0, ["0"]), (1, ["0", "1"]), (2, ["1", "2"]), (1, ["0", "1"])):
        point(serving, live)
        report = sync(StoreReader(serving), tmp_path)
        assert folders(tmp_path, "dynlora_vision") == [*expected, CONFIG_NAME]
        assert report.live == live
    assert sync(StoreReader(serving), tmp_path).added == ()


def test_another_version_under_the_same_number_replaces_what_is_there(serving: Path, tmp_path: Path) -> None:
    """A store that was made anew has other versions of the same sizes."""
    sync(StoreReader(serving), tmp_path)
    manifest = tmp_path / "dynlora_vision" / "0" / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_bytes(manifest.read_bytes().replace(b'"initial"', b'"other"  '))

    assert "dynlora_vision/0" in sync(StoreReader(serving), tmp_path).added


def test_a_half_written_version_has_a_name_that_triton_ignores(
    serving: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut short at any copy, no folder that begins with a digit has appeared; the next run finishes it."""
    copied: list[Path] = []

    def failing(source: Path, target: Path) -> bool:
        if len(copied) == 3:
            raise OSError(28, "No space left on device")
        copied.append(target)
        return copy_file(source, target)

    monkeypatch.setattr("deploy.triton.copy_file", failing)
    with pytest.raises(OSError, match="No space"):
        sync(StoreReader(serving), tmp_path)
    assert folders(tmp_path, "dynlora_vision") == [".tmp-0"]
    monkeypatch.undo()
    sync(StoreReader(serving), tmp_path)
    assert folders(tmp_path, "dynlora_vision") == ["0", CONFIG_NAME]


def test_a_damaged_file_is_not_given_to_triton(serving: Path, tmp_path: Path) -> None:
    """Hashes are compared after the copy."""
    classes = serving / "versions/0/classes.json"
    classes.chmod(0o644)
    classes.write_bytes(classes.read_bytes()[:-1] + b" ")

    with pytest.raises(ShareError, match="not what its manifest records"):
        sync(StoreReader(serving), tmp_path)
    assert folders(tmp_path, "dynlora_vision") == []


def test_triton_is_told_to_load_and_old_folders_go_after_that(serving: Path, tmp_path: Path) -> None:
    """Both models are loaded, their readiness is asked, and a failed load is told, tried again, harmless."""
    with triton_server(tmp_path) as (url, triton):
        point(serving, 1)
        sync(StoreReader(serving), tmp_path, server=url)
        assert triton.loaded == {"dynlora_vision": {0, 1}, "dynlora_text": {0, 1}}
        assert triton.asked[:2] == [
            "/v2/repository/models/dynlora_vision/load",
            "/v2/models/dynlora_vision/versions/1/ready",
        ]

        point(serving, 2)
        triton.failures = 100
        triton_control._PAUSE_SECONDS, before = 0.001, triton_control._PAUSE_SECONDS
        try:
            with pytest.raises(ShareError, match=r"no memory left.*still\s+serves"):
                sync(StoreReader(serving), tmp_path, server=url)
            assert folders(tmp_path, "dynlora_vision") == ["0", "1", "2", CONFIG_NAME]
            triton.failures = 1
            sync(StoreReader(serving), tmp_path, server=url)
        finally:
            triton_control._PAUSE_SECONDS = before
        assert triton.loaded["dynlora_text"] == {1, 2}
        assert folders(tmp_path, "dynlora_text") == ["1", "2", CONFIG_NAME]


def test_bad_names_and_addresses_are_told(serving: Path, tmp_path: Path) -> None:
    """Before anything is written, or by name."""
    with pytest.raises(ShareError, match="no name for a model"):
        Repository(tmp_path, "../x")
    with pytest.raises(ShareError, match="no address of Triton"):
        triton_control.load("localhost:8000", ["m"], 1)


def test_the_config_has_no_leading_zero_and_one_warmup_per_size(version_dir: Path, tmp_path: Path) -> None:
    """The text is a function of the manifest, so it is rewritten only when something changed."""
    manifest = load_manifest(version_dir)
    text = config_text("m", "text", manifest, size=(64, 64), versions=(10, 9))

    assert text == config_text("m", "text", manifest, size=(64, 64), versions=(10, 9))
    assert "versions: [ 10, 9 ]" in text
