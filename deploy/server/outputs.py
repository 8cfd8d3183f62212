"""Answers of the Open Inference Protocol v2: JSON, and raw tensors after it (see deploy.server.tensors)."""

import json
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Made once: json.dumps would make a new one for each answer. In ASCII: an id may hold half a surrogate pair.
_ENCODER = json.JSONEncoder(separators=(",", ":"))


def build_response(
    head: dict[str, Any], outputs: dict[str, NDArray[Any]], binary: dict[str, bool]
) -> tuple[bytes, int | None]:
    """Return the body and, where a tensor is binary, the length of its JSON header.

    Args:
        head: model_name, model_version and the like.
        outputs: float32 arrays, or arrays of str objects, which become BYTES.
        binary: which outputs are wanted, and which of them as raw bytes.
    """
    documents, buffers = [], []
    for name, is_binary in binary.items():
        tensor = outputs[name]
        datatype = "BYTES" if _is_text(tensor) else "FP32"
        document: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(tensor.shape)}
        if is_binary:
            buffers.append(_to_bytes(tensor))
            document["parameters"] = {"binary_data_size": len(buffers[-1])}
        else:
            document["data"] = tensor.ravel().tolist()
        documents.append(document)
    header = _ENCODER.encode(head | {"outputs": documents}).encode()
    if not any(binary.values()):
        return header, None
    return b"".join([header, *buffers]), len(header)


def _is_text(output: NDArray[Any]) -> bool:
    return output.dtype == object


def _to_bytes(output: NDArray[Any]) -> bytes:
    if _is_text(output):
        texts = [text.encode() for text in output.ravel()]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return np.ascontiguousarray(output, "<f4").tobytes()
