"""The steps of opening a version's files, each of which tells what is wrong with them."""

import fcntl
import hashlib
import os
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from deploy.errors import ManifestError, VerifyError
from deploy.manifest import (
    CLASS_EMBEDDINGS_NAME,
    CLASSES_NAME,
    MANIFEST_NAME,
    PREPROCESSOR_NAME,
    REFERENCE_NAME,
    TEXT_GRAPH_NAME,
    TOKENIZER_NAME,
    VISION_GRAPH_NAME,
    WEIGHTS_NAME,
    Manifest,
    file_record,
)
from deploy.ort import onnxruntime as ort
from deploy.tokenize import Tokenizer

# What a client opens, small files first: a broken one shows before the weights are read.
_USED_NAMES = (
    CLASSES_NAME,
    CLASS_EMBEDDINGS_NAME,
    PREPROCESSOR_NAME,
    TOKENIZER_NAME,
    REFERENCE_NAME,
    VISION_GRAPH_NAME,
    TEXT_GRAPH_NAME,
    WEIGHTS_NAME,
)

# Adding and normalising in one step takes four times as long as in two on rows as short as the bundled
# model's, and no less on ViT-B/16's (docs/log.md, 2026-11-28).
_DISABLED_OPTIMIZERS = ("SkipLayerNormFusion",)

_tokenizers: WeakValueDictionary[str, Tokenizer] = WeakValueDictionary()
_kept: list[Tokenizer] = []


def hold_shared_lock(manifest_path: Path) -> int | None:
    """Lock manifest.json against pruning and return the descriptor; None where there are no locks.

    Raises:
        ManifestError: there is no manifest.
        VerifyError: the version is being pruned right now.
    """
    try:
        descriptor = os.open(manifest_path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ManifestError(
            f"{manifest_path} does not exist: this directory is not a version, or was not copied whole"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise VerifyError(f"{manifest_path.parent} is being pruned: load another version") from error
    except OSError:
        # Some network and overlay file systems know no flock; nobody can prune through them either.
        os.close(descriptor)
        return None
    return descriptor


def check_used_files(directory: Path, manifest: Manifest) -> None:
    """Compare sizes first, as they cost nothing, then contents.

    Raises:
        VerifyError: names the file, what was expected and what was found.
    """
    for name in _USED_NAMES:
        path, record = directory / name, manifest.files.get(name)
        if record is None:
            raise VerifyError(f"{directory / MANIFEST_NAME} does not list {name}, which a client needs")
        if not path.is_file():
            raise VerifyError(f"{path} is missing, though the manifest lists it")
        if path.stat().st_size != record.bytes:
            raise VerifyError(
                f"{path} has {path.stat().st_size} bytes, expected {record.bytes}: it was not copied whole, "
                "or was changed"
            )
    for name in _USED_NAMES:
        found = file_record(directory / name)
        if found != manifest.files[name]:
            raise VerifyError(
                f"{directory / name} has other content than was published: expected sha256 "
                f"{manifest.files[name].sha256}, found {found.sha256}"
            )


def open_session(path: Path, threads: int, *, has_arena: bool = True) -> Any:
    """Load a graph and its weights into an ONNX Runtime session.

    Args:
        has_arena: keep the memory of a run for the next one.

    Raises:
        VerifyError: ONNX Runtime refuses the graph; says which release of it.
    """
    options = ort.SessionOptions()
    # Given outright: left at 0, ONNX Runtime pins its threads to CPUs that a container may not have.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = has_arena
    # Threads that spin while idle would take the CPU from a learner on the same machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=_DISABLED_OPTIMIZERS
        )
    except MemoryError:
        raise
    except Exception as error:  # ONNX Runtime's errors have no common public base
        raise VerifyError(f"ONNX Runtime {ort.__version__} cannot load {path}: {error}") from error


def open_tokenizer(path: Path, sha256: str) -> Tokenizer:
    """Return the tokenizer of this content, shared by the versions that are loaded.

    Parsing the file holds Python's global lock for a tenth of a second: without sharing, every
    switch to a new version would make requests wait that long.
    """
    tokenizer = _tokenizers.get(sha256)
    if tokenizer is None:
        tokenizer = _tokenizers[sha256] = Tokenizer.load(path)
    return tokenizer


def keep_tokenizer(content: str) -> None:
    """Parse a tokenizer.json ahead of the versions that have it; it stays in memory."""
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    if sha256 not in _tokenizers:
        _kept.append(Tokenizer(content))
        _tokenizers[sha256] = _kept[-1]
