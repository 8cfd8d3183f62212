"""Files made to hurt whoever reads them: each is refused by name, before it costs memory or runs code."""

import io
import json
import pickle
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy import arrays
from deploy.arrays import read_array, read_arrays
from deploy.errors import DeployError, ManifestError, VerifyError, WeightsError
from deploy.manifest import MANIFEST_NAME, load_classes, load_manifest
from deploy.ort import onnxruntime as ort
from deploy.preprocess import Preprocessing
from deploy.runtime import LoadedVersion
from deploy.tokenize import Tokenizer
from deploy.verify import check_files
from deploy.weights import read_metadata, read_weights


class Evil:
    """What a pickle may do when it is loaded."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('a pickle was run')",)


def npy(shape: tuple[int, ...], *, data: bytes = b"", descr: str = "<f4") -> bytes:
    """A .npy file whose header claims any shape."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    text = text.ljust(-(-(10 + len(text) + 1) // 64) * 64 - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def pickled() -> bytes:
    """A .npy file that holds an object."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        npy((1 << 40,)),
        npy((1 << 40, 1 << 40)),
        npy((-1,), data=b"1234"),
        npy((2,), data=b"1234"),
        npy((1,), data=b"12345678"),
        npy((1,), descr="|O", data=b"12345678"),
        pickled(),
        pickle.dumps(Evil()),
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
        b"\x93NUMPY\x03\x00",
        b"",
    ],
)
def test_an_array_that_lies_is_refused(tmp_path: Path, content: bytes) -> None:
    """A claimed shape is held against the bytes that are there; objects are never loaded."""
    path = tmp_path / "class_embeddings.npy"
    path.write_bytes(content)

    with pytest.raises(VerifyError, match="cannot be read as a numpy array"):
        read_array(path)

    with zipfile.ZipFile(tmp_path / "reference.npz", "w") as archive:
        archive.writestr("pixel_values.npy", content)
    with pytest.raises(VerifyError, match="cannot be used"):
        read_arrays(tmp_path / "reference.npz")


def test_a_zip_that_unpacks_to_more_than_allowed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what its directory says, without unpacking anything; the limit is lower here, to save time."""
    assert arrays.MAX_ARRAYS_BYTES == 1 << 30
    monkeypatch.setattr(arrays, "MAX_ARRAYS_BYTES", 32 << 20)
    path = tmp_path / "reference.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as file:
        zeros = bytes(16 << 20)
        for _ in range(3):
            file.write(zeros)

    assert path.stat().st_size < 1 << 20
    with pytest.raises(VerifyError, match="expected at most"):
        read_arrays(path)


def test_real_arrays_come_back(tmp_path: Path) -> None:
    """The limits let everything through that numpy writes."""
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([], np.int64)}
    np.savez(tmp_path / "plain.npz", **values)
    np.savez_compressed(tmp_path / "packed.npz", **values)
    np.save(tmp_path / "one.npy", np.asfortranarray(values["a"]))

    for name in ("plain.npz", "packed.npz"):
        found = read_arrays(tmp_path / name)
        assert {key: array.tolist() for key, array in found.items()} == {
            key: array.tolist() for key, array in values.items()
        }
    assert read_array(tmp_path / "one.npy").tolist() == values["a"].tolist()


def header(entries: Any, *, length: int | None = None) -> bytes:
    """A weights file with this header and nothing after it."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "content",
    [
        header(b"{}", length=1 << 63),
        header(b"{}", length=(1 << 64) - 1),
        header(b" " * (20 << 20)),
        header(b"[" * 100_000),
        header(b'{"a":' * 50_000),
        header({"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}}),
        header({"a": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}}) + bytes(16),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [1 << 70, (1 << 70) + 4]}}),
        header(b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}'),
        header({"a": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}}) + bytes(8),
        header([1, 2]),
    ],
)
def test_a_weights_header_that_lies_is_refused(tmp_path: Path, content: bytes) -> None:
    """Sizes, depth and shapes, each with a WeightsError and nothing else."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)

    with pytest.raises(WeightsError):
        read_weights(path)


def test_metadata_that_is_no_table_is_refused(tmp_path: Path) -> None:
    """The delta's schema number is read out of it."""
    path = tmp_path / "delta.safetensors"
    path.write_bytes(header({"__metadata__": [1]}))

    with pytest.raises(WeightsError, match="metadata"):
        read_metadata(path)


@pytest.mark.parametrize(
    "content", [b"[" * 1_000_000, b'{"a":' * 200_000, b"\xff\xfe", b"null", b"1" * 10_000]
)
def test_json_that_is_deep_or_odd_is_refused(tmp_path: Path, content: bytes) -> None:
    """In every file of a version that is JSON; recursion ends in an error of ours, not in a crash."""
    for name in (MANIFEST_NAME, "classes.json", "preprocessor_config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(content)

    for read in (
        lambda: load_manifest(tmp_path),
        lambda: load_classes(tmp_path),
        lambda: Preprocessing.load(tmp_path / "preprocessor_config.json"),
        lambda: Tokenizer.load(tmp_path / "tokenizer.json"),
    ):
        with pytest.raises(DeployError):
            read()


def test_a_manifest_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    """A sparse file costs whoever made it nothing."""
    with (tmp_path / MANIFEST_NAME).open("wb") as file:
        file.truncate(50 << 30)

    with pytest.raises(ManifestError, match="found more"):
        load_manifest(tmp_path)


def swap_classes(version: Path) -> None:
    """Other content of the same size."""
    path = version / "classes.json"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b" ")


def cut_graph(version: Path) -> None:
    """A file that was not copied whole."""
    path = version / "vision_model.onnx"
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.truncate(1000)


def link_tokenizer(version: Path) -> None:
    """A link to the same content elsewhere."""
    path = version / "tokenizer.json"
    elsewhere = version.parent / "elsewhere.json"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def add_file(version: Path) -> None:
    """One file more than is listed."""
    (version / "extra.py").write_text("print('never run')")


@pytest.mark.parametrize("change", [swap_classes, cut_graph, link_tokenizer, add_file])
def test_verify_finds_every_change(version_dir: Path, tmp_path: Path, change: Any) -> None:
    """And a client refuses all that it would read: an extra file it never opens."""
    version = tmp_path / "versions" / "0"
    shutil.copytree(version_dir, version)
    change(version)

    with pytest.raises(VerifyError):
        check_files(version, load_manifest(version).files)
    if change in (swap_classes, cut_graph):
        with pytest.raises(VerifyError):
            LoadedVersion(version)


def test_a_graph_cannot_read_files_outside_its_folder(tmp_path: Path) -> None:
    """ONNX Runtime refuses external data that leads out of the model's folder, so a graph is no way out."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    (tmp_path / "secret").write_bytes(bytes(4096))
    folder = tmp_path / "version"
    folder.mkdir()
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1024])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "../secret", "offset": "0", "length": "4096"}.items():
        tensor.external_data.add(key=key, value=value)
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1024])
    node = onnx.helper.make_node("Identity", ["w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [], [output], initializer=[tensor])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    (folder / "model.onnx").write_bytes(model.SerializeToString())

    with pytest.raises(Exception, match=r"(?i)external|escape|outside|path"):
        ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


def test_reading_a_version_never_imports_pickle_loading() -> None:
    """No allow_pickle=True, no pickle.load, no torch.load in what serves."""
    found = subprocess.run(
        ["grep", "-rnE", r"allow_pickle=True|pickle\.loads?\(|torch\.load\(", "deploy"],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )

    assert found.stdout == ""
