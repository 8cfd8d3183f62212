"""What a client says: labels or embeddings, each with the version they come from, and what it did itself."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deploy.runtime import Prediction

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Classification:
    """The likeliest labels of one picture, best first, and the version that said so.

    ``unknown`` is how unlike all labels the picture is, from 0 to 1, if that was asked for (deploy.unknown).
    """

    version: int
    predictions: tuple[Prediction, ...]
    unknown: float | None = None


@dataclass(frozen=True)
class Embeddings:
    """L2-normalised embeddings, ``values`` (N, dim), and the version that computed them.

    Only embeddings of the same version may be compared. numpy.asarray(embeddings) gives the values.
    """

    version: int
    values: Float32

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:  # noqa: FBT001
        return np.array(self.values, dtype=dtype, copy=copy)


@dataclass(frozen=True)
class ClientEvent:
    """What the client did on its own; ``seconds`` is how long it took (0 where that says nothing).

    ``loaded``: a version became the live one. ``rejected``: `current` leads to a version that cannot
    be used (or nowhere); the old one goes on answering. ``released``: an old version was freed.
    """

    kind: Literal["loaded", "rejected", "released"]
    version: int | None
    detail: str
    seconds: float = 0.0
