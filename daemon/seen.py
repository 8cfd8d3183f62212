"""`seen_moments.safetensors`: mean and covariance of the model's answers to the images of published batches.

What a new name must keep away from is above all images of the names learnt before it (docs/log.md); in a home
whose model came without moments of images in general they are all there is. Two moments over everything there
was, from which no image can be made. A worker leaves its batch's own beside batch.json; they are added, once,
when the batch is finished. A mere memory: where it is damaged it is begun anew. No torch.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from deploy import atomic
from deploy.errors import WeightsError
from deploy.weights import read_metadata, read_weights, write_weights

SEEN_NAME = "seen_moments.safetensors"  # in the home
OWN_NAME = "own_moments.safetensors"  # in the batch's directory, until it is finished

LEFTOVERS = f"{atomic.TEMPORARY_PREFIX}{OWN_NAME}-*"  # of a worker that was killed while it wrote one

_KIND, _SCHEMA = "dynlora seen moments", "1"

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Seen:
    """Moments over the classes of some batches, every class with the same weight.

    mean (D,), covariance (D, D); classes: how many there were, a class that came twice counted twice.
    """

    mean: Float32
    covariance: Float32
    classes: int
    batches: tuple[str, ...]

    def with_more(self, other: Self) -> Self:
        """Of both together: the law of total covariance."""
        share = other.classes / (self.classes + other.classes)
        apart = other.mean - self.mean
        between = share * (1 - share) * np.outer(apart, apart)
        return type(self)(
            (self.mean + share * apart).astype(np.float32),
            ((1 - share) * self.covariance + share * other.covariance + between).astype(np.float32),
            self.classes + other.classes,
            (*self.batches, *other.batches),
        )

    def save(self, path: Path) -> None:
        """Write it, durably."""
        said = {"kind": _KIND, "schema": _SCHEMA, "classes": str(self.classes)}
        tensors = {"mean": self.mean, "covariance": self.covariance}
        write_weights(path, tensors, metadata=said | {"batches": json.dumps(self.batches)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            WeightsError: the file is damaged, or none that we wrote.
            OSError: it cannot be read.
        """
        path.lstat()  # raises for a file that is not there, which is no damage
        said = read_metadata(path)
        if (said.get("kind"), said.get("schema")) != (_KIND, _SCHEMA):
            raise WeightsError(f"{path} is no file of {_KIND}, schema {_SCHEMA}")
        tensors = {name: np.array(tensor) for name, tensor in read_weights(path).items()}
        mean, covariance = tensors.get("mean"), tensors.get("covariance")
        if mean is None or covariance is None or covariance.shape != 2 * mean.shape:
            raise WeightsError(f"{path}: expected a mean (D,) and a covariance (D, D)")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise WeightsError(f"{path} holds values that are no numbers")
        try:
            return cls(mean, covariance, int(said["classes"]), tuple(json.loads(said["batches"])))
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{path}: its header does not say what it is made of: {error}") from error


def load_seen(home: Path, dim: int, warn: Callable[[str], None]) -> Seen | None:
    """What earlier batches left; None before the first, and where it cannot be used.

    Args:
        dim: the width of the model's embeddings.
        warn: called with a sentence for a file that cannot be used.
    """
    path = home / SEEN_NAME
    try:
        seen = Seen.load(path)
    except FileNotFoundError:
        return None
    except (OSError, WeightsError) as error:
        warn(f"{path} cannot be used: {error}; it is begun anew with the next batch")
        return None
    return seen if len(seen.mean) == dim else None  # of another model


def add_own(home: Path, batch: str, batch_dir: Path, warn: Callable[[str], None]) -> None:
    """Add what the worker left of a published batch, if anything, and remove it. Harmless to repeat."""
    path = batch_dir / OWN_NAME
    try:
        own = Seen.load(path)
    except FileNotFoundError:
        return
    except WeightsError as error:
        warn(f"{path} cannot be used: {error}; later batches do without")
    else:
        seen = load_seen(home, len(own.mean), warn)
        if seen is None:
            own.save(home / SEEN_NAME)
        elif batch not in seen.batches:
            seen.with_more(own).save(home / SEEN_NAME)
    atomic.remove_file(path)
