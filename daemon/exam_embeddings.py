"""`exam_embeddings.safetensors`: what the last vision tower answered to exam images, kept beside them.

A mere memory: without it, or where it is damaged, foreign or of another tower, images are looked at again.
So nothing in here fails a batch, and a full disk or a read-only home costs time only. No torch.
"""

import hashlib
import json
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploy.atomic import TEMPORARY_PREFIX
from deploy.errors import WeightsError
from deploy.weights import Array, read_metadata, read_weights, write_weights

EMBEDDINGS_NAME = "exam_embeddings.safetensors"

LEFTOVERS = f"{TEMPORARY_PREFIX}{EMBEDDINGS_NAME}-*"  # of a worker that was killed while it wrote one

_KIND, _SCHEMA = "dynlora exam embeddings", "1"
_ROWS, _IMAGES = "image_embeds", "images"  # (images, dim) float32; JSON of [file, sha256] for each, as bytes
_MOST_BYTES = 1 << 30  # half a million images

Float32 = NDArray[np.float32]
# By the file's name within the directory: sha256 of the content that was looked at, and its row (dim,).
Rows = Mapping[str, tuple[str, Float32]]


@dataclass
class Memory:
    """Loads and saves the rows of one tower after the other.

    Args:
        warn: called with a sentence for a file that cannot be used, and once where none can be written.
    """

    warn: Callable[[str], None]
    _is_told: bool = field(default=False, init=False)

    def load(self, directory: Path, tower: str, dim: int) -> Rows:
        """What is known of the images in a directory; nothing where it is of another tower or release.

        Args:
            tower: digest of the vision tower.
        """
        path = directory / EMBEDDINGS_NAME
        try:
            return _read(path, tower, dim)
        except FileNotFoundError:
            return {}
        except (OSError, WeightsError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            self.warn(f"{path} cannot be used: {why}; the images are looked at again, and it is made anew")
            return {}

    def save(self, directory: Path, tower: str, rows: Rows) -> None:
        """Keep these rows, durably and instead of any others."""
        path = directory / EMBEDDINGS_NAME
        try:
            _write(path, tower, rows)
        except OSError as error:
            if not self._is_told:
                self._is_told = True
                self.warn(f"{path} cannot be written: {error.strerror}; the next exams take longer")


def _write(path: Path, tower: str, rows: Rows) -> None:
    records = json.dumps([[file, sha256] for file, (sha256, _) in rows.items()]).encode()
    tensors: dict[str, Array] = {
        _ROWS: np.stack([row for _, row in rows.values()]),
        _IMAGES: np.frombuffer(records, np.uint8),
    }
    said = {"kind": _KIND, "schema": _SCHEMA, "tower": tower, "software": _software()}
    write_weights(path, tensors, metadata=said | {"sha256": _checksum(tower, tensors)})


def _read(path: Path, tower: str, dim: int) -> Rows:
    """As `Memory.load`.

    Raises:
        WeightsError: the file is damaged, or none that we wrote.
        OSError: it cannot be read; FileNotFoundError where there is none.
    """
    state = path.lstat()
    if not stat.S_ISREG(state.st_mode) or state.st_size > _MOST_BYTES:
        raise WeightsError(f"expected a plain file of at most {_MOST_BYTES} bytes")
    said = read_metadata(path)
    if (said.get("kind"), said.get("schema")) != (_KIND, _SCHEMA):
        raise WeightsError(f"expected {_KIND} of schema {_SCHEMA}")
    if (said.get("tower"), said.get("software")) != (tower, _software()):
        return {}
    # Copies: no file stays mapped.
    tensors = {name: np.array(tensor) for name, tensor in read_weights(path).items()}
    if tensors.keys() != {_ROWS, _IMAGES} or said.get("sha256") != _checksum(tower, tensors):
        raise WeightsError("its content is not what its checksum says")
    images, stack = json.loads(tensors[_IMAGES].tobytes()), tensors[_ROWS]
    if stack.dtype != np.float32 or stack.shape != (len(images), dim):
        raise WeightsError(f"expected ({len(images)}, {dim}) float32, found {stack.shape} {stack.dtype}")
    return {file: (sha256, row) for (file, sha256), row in zip(images, stack, strict=True)}


def _checksum(tower: str, tensors: Mapping[str, Array]) -> str:
    digest = hashlib.sha256(tower.encode())
    for name in (_ROWS, _IMAGES):
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def _software() -> str:
    """What decodes, resizes and computes: another release may answer a little differently."""
    import PIL

    from deploy.ort import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}, pillow {PIL.__version__}, numpy {np.__version__}"
