"""What a version's vision tower computes, as one hash: equal hashes give equal embeddings of equal pixels.

The weights file holds both towers, so its own hash changes with the text tower alone.
"""

import hashlib
from pathlib import Path

from deploy.errors import VerifyError, WeightsError
from deploy.manifest import PREPROCESSOR_NAME, VISION_GRAPH_NAME, WEIGHTS_NAME
from deploy.weights import read_layout

_BLOCK = 1 << 20


def vision_digest(directory: Path) -> str:
    """sha256 over the preprocessing, the vision graph, and the tensors that it takes from the weights file.

    Raises:
        VerifyError: a file is missing or cannot be read; names it.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    graph_path, weights_path = directory / VISION_GRAPH_NAME, directory / WEIGHTS_NAME
    try:
        content = graph_path.read_bytes()
        digest = hashlib.sha256((directory / PREPROCESSOR_NAME).read_bytes())
        digest.update(content)
        places = read_layout(weights_path)
        graph = onnx.ModelProto.FromString(content).graph
        outside = [t.name for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        with weights_path.open("rb") as file:
            for name in sorted(outside):
                offset, left = places[name]
                file.seek(offset)
                while left:
                    block = file.read(min(_BLOCK, left))
                    if not block:
                        raise WeightsError(f"{weights_path} ends within {name}")
                    digest.update(block)
                    left -= len(block)
    except (OSError, KeyError, WeightsError, ValueError) as error:
        raise VerifyError(f"{directory}: the vision tower cannot be read: {error}") from error
    except DecodeError as error:
        raise VerifyError(f"{graph_path} is not a valid ONNX graph: {error}") from error
    return digest.hexdigest()
