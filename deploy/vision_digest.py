"""What a version's vision tower computes, as one hash: equal hashes give equal embeddings of equal pixels.

The weights file holds both towers, so its own hash changes with the text tower alone.
"""

import hashlib
from pathlib import Path

from deploy.errors import VerifyError, WeightsError
from deploy.manifest import PREPROCESSOR_NAME, VISION_GRAPH_NAME, WEIGHTS_NAME
from deploy.weights import read_weights


def vision_digest(directory: Path) -> str:
    """sha256 over the preprocessing, the vision graph, and the tensors that it takes from the weights file.

    Raises:
        VerifyError: a file is missing or cannot be read; names it.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    graph_path = directory / VISION_GRAPH_NAME
    try:
        content = graph_path.read_bytes()
        digest = hashlib.sha256((directory / PREPROCESSOR_NAME).read_bytes())
        digest.update(content)
        graph = onnx.ModelProto.FromString(content).graph
        outside = [t.name for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        tensors = read_weights(directory / WEIGHTS_NAME)
        for name in sorted(outside):
            digest.update(tensors[name].tobytes())
    except (OSError, KeyError, WeightsError, ValueError) as error:
        raise VerifyError(f"{directory}: the vision tower cannot be read: {error}") from error
    except DecodeError as error:
        raise VerifyError(f"{graph_path} is not a valid ONNX graph: {error}") from error
    return digest.hexdigest()
