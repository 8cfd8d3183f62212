"""weights.safetensors: torch checkpoint and external data of both graphs in one file.

ONNX Runtime maps external data from its offsets, and wants them aligned to 4096 bytes; safetensors
allows no holes between tensors. So the header is padded with spaces to a multiple of 4096, the
tensors whose size is a multiple of 4096 come first, and the (small) rest follows. The places are a
function of names, shapes and dtypes alone: graphs exported once fit every later weights file.

Knows nothing of models or versions; tensors come and go as numpy arrays, one at a time where the
caller allows it (a memory-mapped source costs no memory).
"""

import json
import math
import struct
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy import atomic
from deploy.errors import WeightsError
from deploy.hashing import BackgroundHash
from deploy.manifest import FileRecord

Array = NDArray[Any]
Prepare = Callable[[str, Array], Array]

ALIGNMENT_BYTES = 4096
# The default header of a weights file; the graphs' offsets rely on it never changing.
_METADATA: Mapping[str, str] = {"format": "pt"}
_MAX_HEADER_BYTES = 16 << 20  # the largest CLIP needs a hundredth; JSON grows tenfold when it is parsed
_PIECE_BYTES = 8 << 20
_SMALL_BYTES = 1 << 18
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor: all that its place in the file depends on."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


def spec_of(tensors: Mapping[str, Array]) -> dict[str, TensorSpec]:
    """Return shape and dtype of every tensor."""
    return {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def layout(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, int]]:
    """Return {name: (offset, length)} in bytes from the start of the weights file, in file order.

    Raises:
        WeightsError: a dtype that a weights file cannot hold.
    """
    places, start = _places(specs), len(_header(specs, _METADATA))
    return {name: (start + begin, end - begin) for name, (begin, end) in places.items()}


def write_weights(
    path: Path,
    tensors: Mapping[str, Array],
    *,
    metadata: Mapping[str, str] | None = None,
    prepare: Prepare | None = None,
    is_flushed: bool = True,
) -> FileRecord:
    """Write the tensors durably and return the sha256 and size of what was written.

    Args:
        metadata: strings for the header. Leave it out for a file that graphs point into: the places
            that layout() gives hold for the default header only.
        prepare: called with name and tensor, from another thread, one tensor ahead of what is written:
            so few changed tensors are in memory at a time. It must keep shape and dtype.
        is_flushed: False leaves flushing to the caller, who has something else to do meanwhile.

    Raises:
        WeightsError: a dtype that the file cannot hold, or ``prepare`` changed shape or dtype.
        OSError: for instance a full disk; nothing was changed.
    """
    specs = spec_of(tensors)
    header = _header(specs, _METADATA if metadata is None else metadata)
    size = len(header) + sum(spec.size_bytes for spec in specs.values())
    with BackgroundHash() as digest, closing(_prepared(tensors, specs, prepare)) as prepared:

        def pieces() -> Iterator[bytes | memoryview]:
            digest.update(header)
            yield header
            for group in prepared:
                for piece in _pieces_of(group):
                    digest.update(piece)
                    yield piece

        atomic.write_file(path, pieces(), size_bytes=size, is_flushed=is_flushed)
        return FileRecord(sha256=digest.hexdigest(), bytes=size)


def _prepared(
    tensors: Mapping[str, Array], specs: Mapping[str, TensorSpec], prepare: Prepare | None
) -> Generator[list[Array], None, None]:
    """Yield the tensors in file order, in groups; each is prepared while the one before it is written."""

    def ready(name: str) -> Array:
        tensor = tensors[name] if prepare is None else prepare(name, tensors[name])
        if tensor.shape != specs[name].shape or tensor.dtype != specs[name].dtype:
            raise WeightsError(
                f"tensor {name} must stay {specs[name].shape} {specs[name].dtype} while it is written, "
                f"found {tensor.shape} {tensor.dtype}"
            )
        return tensor

    def ready_group(names: list[str]) -> list[Array]:
        return [ready(name) for name in names]

    groups = _groups(specs)
    with ThreadPoolExecutor(1, thread_name_prefix="prepare-weights") as ahead:
        upcoming = ahead.submit(ready_group, next(groups, []))
        for names in groups:
            group, upcoming = upcoming.result(), ahead.submit(ready_group, names)
            yield group
        yield upcoming.result()


def _groups(specs: Mapping[str, TensorSpec]) -> Iterator[list[str]]:
    """The names in file order, by the piece: handing hundreds of small tensors between threads takes long."""
    names: list[str] = []
    for name in _places(specs):
        names.append(name)
        if sum(specs[some].size_bytes for some in names) >= _PIECE_BYTES // 2:
            yield names
            names = []
    if names:
        yield names


def read_weights(path: Path) -> dict[str, Array]:
    """Map every tensor of a safetensors file (read-only views; pages are read when they are touched).

    Raises:
        WeightsError: the file is missing, cut short, or not a safetensors file.
    """
    entries = _read_entries(path)
    content = np.memmap(path, dtype=np.uint8, mode="r")
    return {
        name: content[begin:end].view(spec.dtype).reshape(spec.shape)
        for name, (spec, begin, end) in entries.items()
    }


def read_layout(path: Path) -> dict[str, tuple[int, int]]:
    """Return {name: (offset, length)} in bytes, as the file's own header has it.

    Raises:
        WeightsError: the file is missing, cut short, or not a safetensors file.
    """
    return {name: (begin, end - begin) for name, (_, begin, end) in _read_entries(path).items()}


def read_metadata(path: Path) -> dict[str, str]:
    """Return the strings in a safetensors file's header.

    Raises:
        WeightsError: the file is missing, cut short, or not a safetensors file.
    """
    metadata = _read_header(path)[0].get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise WeightsError(f"{path}: its header's metadata is not a table of strings")
    return {str(key): str(value) for key, value in metadata.items()}


def _places(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, int]]:
    """Return {name: (begin, end)} within the data part, in file order."""
    # Wider dtypes first among the rest, so that every tensor starts at a multiple of its item size.
    order = sorted(
        specs,
        key=lambda name: (specs[name].size_bytes % ALIGNMENT_BYTES != 0, -specs[name].dtype.itemsize, name),
    )
    places, begin = {}, 0
    for name in order:
        places[name] = (begin, begin + specs[name].size_bytes)
        begin = places[name][1]
    return places


def _header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Return length field and JSON header, padded with spaces to a multiple of 4096 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    for name, place in _places(specs).items():
        spec = specs[name]
        if spec.dtype not in _CODES:
            raise WeightsError(f"tensor {name} is {spec.dtype}; a weights file holds {', '.join(_DTYPES)}")
        entries[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": list(place)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES - 8
    return struct.pack("<Q", padded) + text.ljust(padded)


def _pieces_of(tensors: list[Array]) -> Iterator[bytes | memoryview]:
    """Views of large tensors' bytes, not copies; small ones are put together."""
    small: list[memoryview] = []
    for tensor in tensors:
        flat = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        if flat.size < _SMALL_BYTES:
            small.append(flat.data)
            continue
        yield b"".join(small)
        small = []
        for begin in range(0, flat.size, _PIECE_BYTES):
            yield flat[begin : begin + _PIECE_BYTES].data
    yield b"".join(small)


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the parsed header, where the data starts, and the file's size, both in bytes."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            text = file.read(min(length, _MAX_HEADER_BYTES))
    except FileNotFoundError as error:
        raise WeightsError(f"{path} does not exist. Expected a safetensors file there.") from error
    if len(prefix) < 8 or (length <= _MAX_HEADER_BYTES and len(text) < length):
        raise WeightsError(
            f"{path} is cut short: expected at least {8 + length} bytes of header, found {size}. "
            "Copy or download it again."
        )
    if length > _MAX_HEADER_BYTES:
        raise WeightsError(
            f"{path} is not a weights file: expected a header of at most {_MAX_HEADER_BYTES} bytes, "
            f"found one of {length}"
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not a safetensors file: its header is not JSON.") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path} is not a safetensors file: its header is not a JSON object.")
    return header, 8 + length, size


def _read_entries(path: Path) -> dict[str, tuple[TensorSpec, int, int]]:
    """Return {name: (spec, begin, end)}, in bytes from the start of a file that is all there."""
    header, data_start, size = _read_header(path)
    entries = {}
    for name, value in header.items():
        if name != "__metadata__":
            spec, begin, end = _entry(path, name, value)
            entries[name] = (spec, data_start + begin, data_start + end)
    needed = max((end for _, _, end in entries.values()), default=data_start)
    if size != needed:
        raise WeightsError(
            f"{path} is {'cut short' if size < needed else 'longer than its header says'}: "
            f"expected {needed} bytes, found {size}. Copy or download it again."
        )
    return entries


def _entry(path: Path, name: str, value: Any) -> tuple[TensorSpec, int, int]:
    """Return spec, begin and end of one header entry."""
    try:
        spec = TensorSpec(tuple(int(side) for side in value["shape"]), _DTYPES[value["dtype"]])
        begin, end = (int(offset) for offset in value["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise WeightsError(
            f"{path}: the header entry of tensor {name} cannot be used: expected dtype (one of "
            f"{', '.join(_DTYPES)}), shape and data_offsets, found {str(value)[:120]}"
        ) from error
    if begin < 0 or end - begin != spec.size_bytes or any(side < 0 for side in spec.shape):
        raise WeightsError(
            f"{path}: tensor {name} needs {spec.size_bytes} bytes, its header entry gives {end - begin}"
        )
    return spec, begin, end
