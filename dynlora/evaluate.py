"""Figures of continual learning, from predictions and accuracy matrices. Pure functions of arrays.

R[i, j] is the accuracy on task j after training task i; rows and columns number the same n tasks.
"""

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def accuracy(predicted: Labels, truth: Labels) -> float:
    """Share of equal entries; both (N,), N >= 1."""
    assert predicted.shape == truth.shape and truth.size, (predicted.shape, truth.shape)
    return float(np.mean(predicted == truth))


def transfer(r: Matrix) -> Matrix:
    """Mean accuracy on each task before it was trained, (n,); NaN for the first, which has no before."""
    n = len(r)
    return np.array([r[:j, j].mean() if j else np.nan for j in range(n)])


def average(r: Matrix) -> Matrix:
    """Mean accuracy on each task over the whole stream, (n,)."""
    means: Matrix = r.mean(axis=0)
    return means


def last(r: Matrix) -> Matrix:
    """Accuracy on each task at the end, (n,)."""
    final: Matrix = r[-1].copy()
    return final


def forgetting(r: Matrix) -> Matrix:
    """Best accuracy ever reached on each task minus that at the end, (n,), >= 0."""
    lost: Matrix = r.max(axis=0) - r[-1]
    return lost


def backward_transfer(r: Matrix) -> float:
    """Mean change of each task's accuracy from right after its training to the end."""
    return float(np.mean(r[-1] - np.diag(r)))


def flips(before: Labels, after: Labels, truth: Labels) -> tuple[int, int]:
    """How many predictions became right and how many became wrong: (gained, lost)."""
    was, now = before == truth, after == truth
    return int(np.sum(~was & now)), int(np.sum(was & ~now))


def negative_flip_rate(before: Labels, after: Labels, truth: Labels) -> float:
    """Share of samples that were right before and are wrong after."""
    return flips(before, after, truth)[1] / len(truth)


def paired_difference(ours: Matrix, theirs: Matrix) -> tuple[float, float]:
    """Mean of ours − theirs over n pairs and its standard error; NaN for one pair, which shows no spread."""
    assert ours.shape == theirs.shape and ours.ndim == 1 and len(ours), (ours.shape, theirs.shape)
    differences = ours - theirs
    n = len(differences)
    error = float(differences.std(ddof=1)) / n**0.5 if n > 1 else float("nan")
    return float(differences.mean()), error
