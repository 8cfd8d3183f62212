import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deploy.errors import VerifyError
from deploy.manifest import load_manifest
from deploy.store import VersionStore
from deploy.verify import check_files, graph_hashes, measure_parity, verify_staged, verify_version
from deploy.weights import read_layout


@pytest.fixture
def copied(version_dir: Path, tmp_path: Path) -> Path:
    """A version 0 that may be damaged."""
    directory = tmp_path / "0"
    shutil.copytree(version_dir, directory)
    for path in directory.iterdir():
        path.chmod(0o644)
    return directory


def change_byte(path: Path, offset: int) -> None:
    """Turn one byte of a file over."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def save_array(path: Path, array: np.ndarray) -> None:
    """Replace a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    path.write_bytes(buffer.getvalue())


def test_a_published_version_verifies_and_reports_its_parity(
    serving_dir: Path, publish_random_version: Callable[[Path, int], int]
) -> None:
    """What was published is what the manifest says, and runs as torch does."""
    store = VersionStore(serving_dir)
    version = publish_random_version(serving_dir, 3)
    report = verify_version(store.path(version), parent_graphs=graph_hashes(store.manifest(0).files))
    assert report.files == store.manifest(version).files
    assert report.structure_checked
    assert set(report.parity) == {"vision", "text"}
    assert max(report.parity.values()) < 1e-5


def test_a_staged_version_gives_the_records_for_its_manifest(copied: Path) -> None:
    """The report holds what publishing compares with."""
    (copied / "manifest.json").unlink()
    report = verify_staged(copied, embed_dim=128)
    assert set(report.files) == {path.name for path in copied.iterdir()}
    (copied / "tokenizer.json").unlink()
    with pytest.raises(VerifyError, match=r"lacks tokenizer\.json"):
        verify_staged(copied, embed_dim=128)


@pytest.mark.parametrize("name", ["weights.safetensors", "tokenizer.json", "reference.npz", "classes.json"])
def test_one_changed_byte_anywhere_is_found(copied: Path, name: str) -> None:
    """The message names the file, both hashes, and what to do."""
    change_byte(copied / name, (copied / name).stat().st_size // 2)
    expected = load_manifest(copied).files[name].sha256
    with pytest.raises(
        VerifyError, match=rf"{name} is not what .* expected .* {expected}, found .* roll back"
    ):
        verify_version(copied)


def test_a_weights_file_cut_short_is_found_by_manifest_and_without(copied: Path) -> None:
    """A copy that broke off is told from a good one, and says how much is missing."""
    path = copied / "weights.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1000)
    with pytest.raises(VerifyError, match=rf"expected {size} bytes .*found {size - 1000} bytes"):
        verify_version(copied)
    (copied / "manifest.json").unlink()
    with pytest.raises(VerifyError, match=rf"weights.safetensors is cut short: expected {size} bytes"):
        verify_staged(copied, embed_dim=128)
    with pytest.raises(VerifyError, match=r"ONNX Runtime .* cannot load .*\.onnx"):
        measure_parity(copied)


def test_missing_and_foreign_files_and_links_are_found(copied: Path) -> None:
    """A version is exactly the listed plain files."""
    files = load_manifest(copied).files
    (copied / "notes.txt").write_text("hello")
    with pytest.raises(VerifyError, match=r"notes\.txt is not in the manifest"):
        check_files(copied, files)
    (copied / "notes.txt").unlink()
    (copied / "weights.safetensors").rename(copied.parent / "elsewhere")
    with pytest.raises(VerifyError, match=r"weights\.safetensors is missing.*dynlora rebuild"):
        check_files(copied, files)
    (copied / "weights.safetensors").symlink_to(copied.parent / "elsewhere")
    with pytest.raises(VerifyError, match="must be a plain file"):
        check_files(copied, files)


def test_weights_of_the_right_form_but_wrong_values_fail_parity(copied: Path) -> None:
    """Checksums would agree if the wrong weights had been staged; torch's outputs do not."""
    offset, length = read_layout(copied / "weights.safetensors")["text_projection"]
    view = np.memmap(
        copied / "weights.safetensors", np.float32, mode="r+", offset=offset, shape=(length // 4,)
    )
    view[:] = view[::-1].copy()
    view.flush()
    with pytest.raises(
        VerifyError, match=r"text_model\.onnx differs from torch by .*, expected at most 1e-05"
    ):
        verify_staged(copied, embed_dim=128)


def test_weights_that_are_not_numbers_fail_parity(copied: Path) -> None:
    """A NaN is not within any tolerance."""
    offset, _ = read_layout(copied / "weights.safetensors")["text_projection"]
    view = np.memmap(copied / "weights.safetensors", np.float32, mode="r+", offset=offset, shape=(1,))
    view[:] = np.nan
    view.flush()
    with pytest.raises(VerifyError, match=r"text_model\.onnx differs from torch by nan"):
        measure_parity(copied)


def test_a_graph_of_another_architecture_is_found(copied: Path) -> None:
    """The graph must be its parent's, and must look for the weights where they are."""
    parent = graph_hashes(load_manifest(copied).files)
    graph, places = copied / "text_model.onnx", read_layout(copied / "weights.safetensors")
    offset, _ = places["transformer.resblocks.0.attn.out_proj.weight"]
    other, _ = places["transformer.resblocks.1.attn.out_proj.weight"]
    assert len(str(offset)) == len(str(other))
    graph.write_bytes(graph.read_bytes().replace(str(offset).encode(), str(other).encode()))
    with pytest.raises(VerifyError, match=r"text_model\.onnx is not the parent's graph"):
        verify_staged(copied, embed_dim=128, parent_graphs=parent)
    with pytest.raises(VerifyError, match=r"0\.attn\.out_proj\.weight is looked for at"):
        verify_staged(copied, embed_dim=128)
    graph.write_bytes(b"not a graph")
    with pytest.raises(VerifyError, match=r"text_model\.onnx is not a valid ONNX graph"):
        verify_staged(copied, embed_dim=128)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e[:-1], r"expected \(6, 128\) float32 .* found \(5, 128\) float32"),
        (lambda e: e.astype(np.float64), "found .* float64"),
        (
            lambda e: e * np.array([[1], [1], [2], [1], [1], [1]], np.float32),
            "row 2 must have length 1, found 2",
        ),
        (lambda e: np.where(np.arange(6)[:, None] == 4, np.float32("nan"), e), "row 4 .* found nan"),
    ],
)
def test_class_embeddings_that_cannot_be_right_are_found(
    copied: Path, change: Callable[[np.ndarray], np.ndarray], said: str
) -> None:
    """One row of length 1 for each class name."""
    path = copied / "class_embeddings.npy"
    save_array(path, change(np.load(path)))
    with pytest.raises(VerifyError, match=said):
        verify_staged(copied, embed_dim=128)


def test_unreadable_arrays_are_verify_errors(copied: Path) -> None:
    """A damaged file is reported by name, whatever library reads it."""
    (copied / "class_embeddings.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(VerifyError, match=r"class_embeddings\.npy cannot be read"):
        verify_staged(copied, embed_dim=128)
    (copied / "reference.npz").write_bytes(b"PK")
    with pytest.raises(VerifyError, match=r"reference\.npz cannot be used"):
        measure_parity(copied)


def test_a_version_may_know_no_class_yet(copied: Path) -> None:
    """A store can be made before anybody names a class."""
    (copied / "classes.json").write_text(json.dumps({"schema": 1, "classes": []}))
    save_array(copied / "class_embeddings.npy", np.zeros((0, 128), np.float32))
    assert verify_staged(copied, embed_dim=128).parity
