"""A version's pruned LoRA factors, and the one fold that turns them into weights.

    weights(N) = fold(weights(0), deltas of N's lineage, in order)

The fold is bit-exact on every machine: elementwise float32 operations in a fixed order (rank index
ascending, multiply then add), and no BLAS product, whose result differs between CPUs. Row blocks
only keep the working set in the cache; their size does not change a bit.

A factor names a state-dict key and a range of rows: q, k and v are rows of attn.in_proj_weight.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.errors import DeltaError, WeightsError
from deploy.manifest import FileRecord
from deploy.weights import Array, read_metadata, read_weights, write_weights

SCHEMA = "1"
_NAME = re.compile(r"(?P<key>.+)\[(?P<start>\d+):(?P<stop>\d+)\]\.(?P<part>lora_A|lora_B|importance)")
_PARTS = frozenset({"lora_A", "lora_B", "importance"})
_BLOCK_BYTES = 1 << 18  # three such blocks fit a core's second-level cache

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Factor:
    """The update of rows ``row_start:row_stop`` of one matrix: B diag(importance) A, float32.

    lora_B is (rows, rank), lora_A (rank, in_features), importance (rank,). Rank 0 is no update.

    Raises:
        DeltaError: shapes, dtypes or row range do not fit together, or a value is not finite.
    """

    key: str
    row_start: int
    row_stop: int
    lora_B: Float32
    lora_A: Float32
    importance: Float32

    def __post_init__(self) -> None:
        rows, rank = self.row_stop - self.row_start, self.importance.shape[0] if self.importance.ndim else -1
        if self.row_start < 0 or rows <= 0:
            raise DeltaError(f"{self.place}: the row range must be ascending and start at 0 or later")
        expected = {"lora_B": (rows, rank), "lora_A": (rank, self.in_features), "importance": (rank,)}
        for part, shape in expected.items():
            array = getattr(self, part)
            if array.shape != shape or array.dtype != np.float32:
                raise DeltaError(
                    f"{self.place}.{part}: expected shape {shape} float32, found {array.shape} {array.dtype}"
                )
            if not np.isfinite(array).all():
                raise DeltaError(f"{self.place}.{part}: a value is not finite; this delta cannot be used")

    @property
    def place(self) -> str:
        """What the factor changes, as it is written in a delta file."""
        return f"{self.key}[{self.row_start}:{self.row_stop}]"

    @property
    def rank(self) -> int:
        """How many rank-one terms the update has."""
        return len(self.importance)

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        return self.lora_A.shape[-1] if self.lora_A.ndim else -1


@dataclass(frozen=True)
class Delta:
    """All factors of one batch, sorted by key and row.

    Raises:
        DeltaError: two factors change the same row.
    """

    factors: tuple[Factor, ...]

    def __init__(self, factors: Iterable[Factor]) -> None:
        ordered = tuple(sorted(factors, key=lambda factor: (factor.key, factor.row_start)))
        for one, two in itertools.pairwise(ordered):
            if one.key == two.key and two.row_start < one.row_stop:
                raise DeltaError(f"{one.place} and {two.place} change the same rows")
        object.__setattr__(self, "factors", ordered)

    def of_key(self, key: str) -> list[Factor]:
        """Return the factors of one state-dict key, by row."""
        return [factor for factor in self.factors if factor.key == key]

    @property
    def norm(self) -> float:
        """Frobenius norm of the update over all matrices, computed from the factors in float64."""
        return math.sqrt(sum(_squared_norm(factor) for factor in self.factors))


def save_delta(path: Path, delta: Delta) -> FileRecord:
    """Write a delta durably as safetensors: ``<key>[<start>:<stop>].lora_A`` and so on.

    The same factors give the same bytes. Factors of rank 0 change nothing and are left out.
    """
    tensors: dict[str, Array] = {}
    for factor in delta.factors:
        if factor.rank:
            tensors |= {f"{factor.place}.{part}": getattr(factor, part) for part in sorted(_PARTS)}
    return write_weights(path, tensors, metadata={"format": "pt", "kind": "dynlora delta", "schema": SCHEMA})


def load_delta(path: Path) -> Delta:
    """Read a delta file.

    Raises:
        DeltaError: it is missing, cut short, of another schema, incomplete, or holds non-finite values.
    """
    try:
        metadata, tensors = read_metadata(path), read_weights(path)
    except WeightsError as error:
        raise DeltaError(str(error)) from error
    if metadata.get("schema") != SCHEMA:
        raise DeltaError(
            f"{path}: expected a delta of schema {SCHEMA}, found {metadata.get('schema', 'no schema')!r}. "
            "Use the dynlora release that wrote it."
        )
    parts: dict[tuple[str, int, int], dict[str, Array]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise DeltaError(f"{path}: {name!r} is not a factor; expected <key>[<start>:<stop>].<part>")
        place = (match["key"], int(match["start"]), int(match["stop"]))
        parts.setdefault(place, {})[match["part"]] = np.array(tensor)  # a copy: no file stays mapped
    for place, found in parts.items():
        if found.keys() != _PARTS:
            raise DeltaError(
                f"{path}: {place[0]}[{place[1]}:{place[2]}] lacks {sorted(_PARTS - found.keys())}"
            )
    return Delta(
        Factor(*place, found["lora_B"], found["lora_A"], found["importance"])
        for place, found in parts.items()
    )


def check_delta(tensors: Mapping[str, Array], delta: Delta) -> None:
    """Check that a delta fits the weights.

    Raises:
        DeltaError: an unknown key, rows or columns outside the matrix, or weights that are not float32.
    """
    for factor in delta.factors:
        tensor = tensors.get(factor.key)
        if tensor is None:
            raise DeltaError(
                f"{factor.place}: the weights have no tensor {factor.key}. Is it another model's delta?"
            )
        if tensor.ndim != 2 or tensor.dtype != np.float32:
            raise DeltaError(
                f"{factor.place}: only float32 matrices can be updated, found {tensor.shape} {tensor.dtype}"
            )
        if factor.row_stop > tensor.shape[0] or factor.in_features != tensor.shape[1]:
            raise DeltaError(
                f"{factor.place} with {factor.in_features} columns does not fit a matrix of {tensor.shape}. "
                "Is it another model's delta?"
            )


def fold(
    tensors: Mapping[str, Array], deltas: Sequence[Delta], *, block_bytes: int = _BLOCK_BYTES
) -> dict[str, Array]:
    """Return the weights with the deltas added one after the other.

    Changed tensors are new arrays, the others are passed on as they are. For weights of hundreds of
    megabytes use write_folded, which holds one changed tensor at a time.

    Raises:
        DeltaError: a delta does not fit the weights, or the result is not finite.
    """
    for delta in deltas:
        check_delta(tensors, delta)
    return {
        name: fold_tensor(name, tensor, deltas, block_bytes=block_bytes) for name, tensor in tensors.items()
    }


def write_folded(
    path: Path,
    tensors: Mapping[str, Array],
    deltas: Sequence[Delta],
    *,
    told: Callable[[int, int], None] | None = None,
    is_flushed: bool = True,
) -> FileRecord:
    """Write the folded weights durably; same bytes as ``write_weights(path, fold(tensors, deltas))``.

    Args:
        told: called before each tensor with the number of those done and of all there are.
        is_flushed: as of ``write_weights``.

    Raises:
        DeltaError: a delta does not fit the weights, or the result is not finite.
        OSError: for instance a full disk; nothing was changed.
    """
    for delta in deltas:
        check_delta(tensors, delta)
    done = 0

    def prepare(name: str, tensor: Array) -> Array:
        nonlocal done
        if told is not None:
            told(done, len(tensors))
        done += 1
        return fold_tensor(name, tensor, deltas)

    return write_weights(path, tensors, prepare=prepare, is_flushed=is_flushed)


def fold_tensor(
    name: str, tensor: Array, deltas: Sequence[Delta], *, block_bytes: int = _BLOCK_BYTES
) -> Array:
    """Return one tensor with the deltas added; the tensor itself where none changes it.

    Raises:
        DeltaError: the result is not finite.
    """
    steps = [factor for delta in deltas for factor in delta.of_key(name) if factor.rank]
    if not steps:
        return tensor
    folded: Float32 = np.array(tensor)
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is found below, as an error
        for factor in steps:
            _add_factor(folded[factor.row_start : factor.row_stop], factor, block_bytes)
    if not np.isfinite(folded).all():
        raise DeltaError(f"{name}: the folded weights are not finite; the deltas are too large to be used")
    return folded


def _add_factor(rows: Float32, factor: Factor, block_bytes: int) -> None:
    """Add B diag(importance) A to ``rows`` (rows, in_features) in place.

    Each element is summed over the rank from 0 upwards, then added to the weight once.
    """
    scaled = factor.lora_B * factor.importance  # (rows, rank)
    block = max(1, block_bytes // (4 * factor.in_features))
    total = np.empty((min(block, len(rows)), factor.in_features), np.float32)
    product = np.empty_like(total)
    for begin in range(0, len(rows), block):
        part = rows[begin : begin + block]
        some, term = total[: len(part)], product[: len(part)]
        some.fill(0)
        for index in range(factor.rank):
            # Two calls, so that no fused multiply-add can round differently on another CPU.
            np.multiply(scaled[begin : begin + block, index, None], factor.lora_A[index], out=term)
            np.add(some, term, out=some)
        np.add(part, some, out=part)


def _squared_norm(factor: Factor) -> float:
    """Squared Frobenius norm of B diag(w) A = trace of the product of two (rank, rank) Gram matrices."""
    scaled = factor.lora_B.astype(np.float64) * factor.importance.astype(np.float64)
    wide: NDArray[Any] = factor.lora_A.astype(np.float64)
    return max(0.0, float(((scaled.T @ scaled) * (wide @ wide.T)).sum()))
