"""What a version's vision tower computes, as one hash: equal hashes give equal embeddings of equal pixels.

The weights file holds both towers, so its own hash changes with the text tower alone.
"""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploy.errors import VerifyError, WeightsError
from deploy.manifest import PREPROCESSOR_NAME, VISION_GRAPH_NAME, WEIGHTS_NAME
from deploy.weights import Array, read_weights

_BLOCK_BYTES = 1 << 19  # two of these, and what comparing them gives, fit a core's second-level cache

Bytes = NDArray[np.uint8]


def vision_digest(directory: Path) -> str:
    """sha256 over the preprocessing, the vision graph, and the tensors that it takes from the weights file.

    Raises:
        VerifyError: a file is missing or cannot be read; names it.
    """
    small, tensors = _parts(directory)
    digest = hashlib.sha256(small)
    for tensor in tensors:
        digest.update(tensor.data)
    return digest.hexdigest()


def is_same_tower(one: Path, other: Path) -> bool:
    """Whether two versions have one digest; comparing them takes a third of the time of computing one.

    Raises:
        VerifyError: a file is missing or cannot be read; names it.
    """
    (small, tensors), (other_small, other_tensors) = _parts(one), _parts(other)
    return (
        small == other_small
        and len(tensors) == len(other_tensors)
        and all(map(_are_equal, tensors, other_tensors))
    )


def _parts(directory: Path) -> tuple[bytes, list[Bytes]]:
    """Preprocessing and graph, and the bytes of the tensors in the order of their names, mapped."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    graph_path = directory / VISION_GRAPH_NAME
    try:
        content = graph_path.read_bytes()
        small = (directory / PREPROCESSOR_NAME).read_bytes() + content
        graph = onnx.ModelProto.FromString(content).graph
        outside = [t.name for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        tensors = read_weights(directory / WEIGHTS_NAME)
        return small, [_bytes_of(tensors[name]) for name in sorted(outside)]
    except (OSError, KeyError, WeightsError, ValueError) as error:
        raise VerifyError(f"{directory}: the vision tower cannot be read: {error}") from error
    except DecodeError as error:
        raise VerifyError(f"{graph_path} is not a valid ONNX graph: {error}") from error


def _bytes_of(tensor: Array) -> Bytes:
    return tensor.reshape(-1).view(np.uint8)


def _are_equal(one: Bytes, other: Bytes) -> bool:
    """By blocks that stay in the cache."""
    return one.size == other.size and all(
        np.array_equal(one[begin : begin + _BLOCK_BYTES], other[begin : begin + _BLOCK_BYTES])
        for begin in range(0, one.size, _BLOCK_BYTES)
    )
