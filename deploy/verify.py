"""Is a version what it claims to be? Everything is read again from the disk, nothing is taken on trust.

Checksums against the manifest, graphs against their parent's and against the weights file they
point into, class embeddings, and ONNX Runtime against the outputs that torch left in reference.npz.
Needs no torch; the structure of the graphs is checked where onnx is installed (the report says so).
"""

import importlib.util
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploy.arrays import read_array, read_arrays
from deploy.cpus import usable_cpus
from deploy.errors import VerifyError, WeightsError
from deploy.manifest import (
    CLASS_EMBEDDINGS_NAME,
    GRAPH_NAMES,
    REFERENCE_NAME,
    REQUIRED_NAMES,
    TEXT_GRAPH_NAME,
    UNLISTED_NAMES,
    VISION_GRAPH_NAME,
    WEIGHTS_NAME,
    ClassEntry,
    FileRecord,
    file_record,
    load_classes,
    load_manifest,
    record_files,
)
from deploy.opening import open_session
from deploy.weights import read_layout

# Largest |difference| of an embedding's element between torch and ONNX Runtime.
PUBLISH_TOLERANCE = 1e-5  # where the version is made: the same machine computed both
PARITY_TOLERANCE = 1e-4  # anywhere else: another CPU sums in another order
_NORM_TOLERANCE = 1e-3
# graph, its input and its output, named alike in reference.npz
_TOWERS = {
    "vision": (VISION_GRAPH_NAME, "pixel_values", "image_embeds"),
    "text": (TEXT_GRAPH_NAME, "input_ids", "text_embeds"),
}


@dataclass(frozen=True)
class VerifyReport:
    """What was found where nothing was wrong.

    ``parity`` is the largest |difference| between torch and ONNX Runtime by tower;
    ``structure_checked`` is False where onnx is not installed.
    """

    files: dict[str, FileRecord]
    parity: dict[str, float]
    structure_checked: bool


def verify_version(
    directory: Path, *, parent_graphs: Mapping[str, str] | None = None, tolerance: float = PARITY_TOLERANCE
) -> VerifyReport:
    """Check a complete version against its manifest.

    Args:
        parent_graphs: {graph name: sha256} that the graphs must have; graph_hashes(manifest.files).

    Raises:
        VerifyError: names the file, what was expected and what was found.
        ManifestError: the manifest or the class list cannot be read.
    """
    manifest = load_manifest(directory)
    check_files(directory, manifest.files)
    return _check_contents(directory, manifest.files, manifest.embed_dim, parent_graphs or {}, tolerance)


def verify_staged(
    directory: Path,
    *,
    embed_dim: int,
    parent_graphs: Mapping[str, str] | None = None,
    tolerance: float = PUBLISH_TOLERANCE,
) -> VerifyReport:
    """Check a version that has no manifest yet; the report's ``files`` are what the manifest records.

    Raises:
        VerifyError: names the file, what was expected and what was found.
        ManifestError: the class list cannot be read.
    """
    # Reading 600 MB takes as long as loading them: both at once, each on a core of its own.
    with ThreadPoolExecutor(1, thread_name_prefix="verify") as beside:
        recording = beside.submit(record_files, directory)
        has_onnx = _check_form(directory, embed_dim, parent_graphs or {})
        parity = measure_parity(directory, tolerance=tolerance)
        files = recording.result()
    return VerifyReport(files, parity, has_onnx)


def check_staged(
    directory: Path, *, embed_dim: int, parent_graphs: Mapping[str, str], known: Mapping[str, FileRecord]
) -> dict[str, FileRecord]:
    """Check all of a staged version but its parity, and return the records for its manifest.

    For whoever loads it next as a client does: that reads all files again and compares them with these.

    Args:
        known: records of files that were hashed while they were written; the others are read here.

    Raises:
        VerifyError: names the file, what was expected and what was found.
        ManifestError: the class list cannot be read.
    """
    _check_form(directory, embed_dim, parent_graphs)
    names = sorted(path.name for path in directory.iterdir() if path.name not in UNLISTED_NAMES)
    return {name: known[name] if name in known else file_record(directory / name) for name in names}


def graph_hashes(files: Mapping[str, FileRecord]) -> dict[str, str]:
    """Return {graph name: sha256}, what every version of one architecture shares."""
    return {name: files[name].sha256 for name in GRAPH_NAMES}


def check_graphs(directory: Path, files: Mapping[str, FileRecord], expected: Mapping[str, str]) -> None:
    """Compare the graphs' sha256 with ``expected``.

    Raises:
        VerifyError: a graph is another one.
    """
    for name, sha256 in expected.items():
        if files[name].sha256 != sha256:
            raise VerifyError(
                f"{directory / name} is not the parent's graph: expected sha256 {sha256}, "
                f"found {files[name].sha256}. Copy the graph from the parent; only a regraph may change it."
            )


def check_files(directory: Path, expected: Mapping[str, FileRecord]) -> None:
    """Compare every file with its record, by reading it.

    Raises:
        VerifyError: a file is missing, unexpected, a link or a directory, or has other bytes.
    """
    found = {path.name: path for path in directory.iterdir() if path.name not in UNLISTED_NAMES}
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            hint = " (thinned? `dynlora rebuild` brings it back)" if name == WEIGHTS_NAME else ""
            raise VerifyError(f"{directory / name} is missing: the manifest lists it{hint}")
        if name not in expected:
            raise VerifyError(f"{found[name]} is not in the manifest; a version holds listed files only")
        if found[name].is_symlink() or not found[name].is_file():
            raise VerifyError(f"{found[name]} must be a plain file; ONNX Runtime and onnx refuse links")
    for name, record in record_files(directory).items():
        if record != expected[name]:
            raise VerifyError(
                f"{directory / name} is not what the manifest records: expected {expected[name].bytes} bytes "
                f"with sha256 {expected[name].sha256}, found {record.bytes} bytes with {record.sha256}. "
                "The file was changed or damaged: restore it from a copy, or roll back."
            )


def check_embeddings(directory: Path, *, embed_dim: int) -> tuple[ClassEntry, ...]:
    """Check that class_embeddings.npy is (classes, embed_dim) float32 with rows of length 1.

    Returns:
        The classes, which were read for it: a hundred thousand take their time.

    Raises:
        VerifyError: it is not, or the file cannot be read.
        ManifestError: the class list cannot be read.
    """
    classes = load_classes(directory).classes
    path, expected = directory / CLASS_EMBEDDINGS_NAME, (len(classes), embed_dim)
    embeddings = read_array(path)
    if embeddings.shape != expected or embeddings.dtype != np.float32:
        raise VerifyError(
            f"{path}: expected {expected} float32 (one row for each class of classes.json), "
            f"found {embeddings.shape} {embeddings.dtype}"
        )
    errors = np.abs(np.linalg.norm(embeddings, axis=1) - 1)
    if not (errors <= _NORM_TOLERANCE).all():
        row = int(np.argmax(~(errors <= _NORM_TOLERANCE)))
        raise VerifyError(
            f"{path}: row {row} must have length 1, found {np.linalg.norm(embeddings[row]):.6g}"
        )
    return classes


def check_structure(directory: Path) -> None:
    """Run onnx.checker, and compare where the graphs look for weights with where the weights file has them.

    Raises:
        VerifyError: a graph is not valid, or points to another place than the tensor of that name.
    """
    import onnx

    try:
        places = read_layout(directory / WEIGHTS_NAME)
    except WeightsError as error:
        raise VerifyError(str(error)) from error
    for graph_name in GRAPH_NAMES:
        path = directory / graph_name
        try:
            onnx.checker.check_model(str(path))
            graph = onnx.load(str(path), load_external_data=False).graph
        except Exception as error:  # onnx raises its own, protobuf's and Python's errors
            raise VerifyError(f"{path} is not a valid ONNX graph: {error}") from error
        for tensor in graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            entry = {item.key: item.value for item in tensor.external_data}
            found = (entry.get("location"), int(entry.get("offset", 0)), int(entry.get("length", 0)))
            if found != (WEIGHTS_NAME, *places.get(tensor.name, (-1, -1))):
                raise VerifyError(
                    f"{path}: {tensor.name} is looked for at {found}, but {WEIGHTS_NAME} has it at "
                    f"{places.get(tensor.name, 'no place')}. Graphs and weights are of different models."
                )


def measure_parity(directory: Path, *, tolerance: float = PARITY_TOLERANCE) -> dict[str, float]:
    """Return {tower: largest |difference| between ONNX Runtime's output and torch's in reference.npz}.

    Raises:
        VerifyError: a difference is above the tolerance (or not a number), or a file cannot be used.
    """
    reference = read_arrays(directory / REFERENCE_NAME)
    try:
        pairs = {tower: (reference[fed], reference[wanted]) for tower, (_, fed, wanted) in _TOWERS.items()}
    except KeyError as error:
        raise VerifyError(f"{directory / REFERENCE_NAME} cannot be used: {error}") from error
    parity = {}
    for tower, (inputs, expected) in pairs.items():
        graph_name, input_name, output_name = _TOWERS[tower]
        found = _run(directory / graph_name, input_name, output_name, inputs)
        if found.shape != expected.shape:
            raise VerifyError(
                f"{directory / graph_name}: expected output {expected.shape}, found {found.shape}"
            )
        parity[tower] = float(np.abs(found - expected).max())
        if not parity[tower] <= tolerance:
            raise VerifyError(
                f"{directory / graph_name} differs from torch by {parity[tower]:.3g}, expected at most "
                f"{tolerance:.3g}. Graph, weights and {REFERENCE_NAME} do not belong together."
            )
    return parity


def _check_contents(
    directory: Path,
    files: dict[str, FileRecord],
    embed_dim: int,
    parent_graphs: Mapping[str, str],
    tolerance: float,
) -> VerifyReport:
    has_onnx = _check_form(directory, embed_dim, parent_graphs)
    return VerifyReport(files, measure_parity(directory, tolerance=tolerance), has_onnx)


def _check_form(directory: Path, embed_dim: int, parent_graphs: Mapping[str, str]) -> bool:
    """Check that all files are there, whose the graphs are, the embeddings' form and, with onnx, the graphs'.

    Returns:
        Whether onnx is installed.
    """
    missing = [name for name in sorted(REQUIRED_NAMES) if not (directory / name).exists()]
    if missing:
        raise VerifyError(f"{directory} lacks {', '.join(missing)}, which every version holds")
    check_graphs(directory, {name: file_record(directory / name) for name in parent_graphs}, parent_graphs)
    check_embeddings(directory, embed_dim=embed_dim)
    has_onnx = importlib.util.find_spec("onnx") is not None
    if has_onnx:
        check_structure(directory)
    return has_onnx


def _run(path: Path, input_name: str, output_name: str, inputs: np.ndarray) -> np.ndarray:
    # An arena pays with memory for runs to come, and there is only one.
    session = open_session(path, usable_cpus(), has_arena=False)
    try:
        return np.asarray(session.run([output_name], {input_name: inputs})[0])
    except Exception as error:  # ONNX Runtime's errors have no common public base
        raise VerifyError(f"{path} does not run in ONNX Runtime: {error}") from error
