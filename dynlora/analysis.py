"""Where an update helps a new task, and where it costs what was known: locations × ranks on one batch.

The first contribution of the CoDyRA paper, for any batch. Each trial learns the batch with updates in one
part of the model only, folds the update in, measures, and takes it out again. Pure of files.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynlora import augment, prompts
from dynlora.attach import Site, attached
from dynlora.clip import Clip
from dynlora.errors import TaskError
from dynlora.learner import Adaptation, Hooks, adapt
from dynlora.sampling import generator_for
from dynlora.settings import Settings
from dynlora.task import Name, Task

THIRDS = ("early", "middle", "late")
_STAND_INS = 64
_IMAGES_AT_ONCE = 64


@dataclass(frozen=True)
class Location:
    """A part of the model: every site where all that is given agrees."""

    name: str
    axis: str  # "all" | "tower" | "module" | "depth"
    holds: Callable[[Site], bool] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Probe:
    """Images that are only asked about: (N, 3, H, W), (N,) labels into `classes`; N >= 1."""

    classes: Sequence[Name]
    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Sweep:
    """What to try."""

    settings: Settings
    ranks: Sequence[int] = (4, 16)
    seed: int = 0


@dataclass(frozen=True)
class Trial:
    """One location at one rank, and what came of it. Shares and cosines are 0 to 1."""

    location: str
    axis: str
    rank: int
    new_accuracy: float  # on the batch's held-out images, among its own and all known names
    names_kept: float  # mean cosine of known and everyday names with what they were
    images_kept: float  # the same of stand-in images made out of the batch's own
    probe_accuracy: float | None  # on images of other classes, among their names; None without any
    delta_norm: float
    kept_ranks: dict[str, int]  # by matrix, those that could be updated

    @property
    def retention(self) -> float:
        """Accuracy on the probe where there is one, else the mean of the two cosines."""
        cosines = (self.names_kept + self.images_kept) / 2
        return cosines if self.probe_accuracy is None else self.probe_accuracy


def locations(clip: Clip) -> list[Location]:
    """The whole model, each tower, each kind of matrix, and each third of both towers' depth."""
    with attached(clip.model, 1) as sites:
        layout = [(site.tower, site.block, site.kind) for site in sites]
    blocks = {tower: 1 + max(b for t, b, _ in layout if t == tower) for tower, _, _ in layout}
    kinds = dict.fromkeys(kind for _, _, kind in layout)
    thirds = {(tower, block): 3 * block // blocks[tower] for tower, block, _ in layout}
    found = [Location("all", "all", lambda _: True)]
    found += [Location(tower, "tower", lambda site, t=tower: site.tower == t) for tower in blocks]  # type: ignore[misc]
    found += [Location(kind, "module", lambda site, k=kind: site.kind == k) for kind in kinds]  # type: ignore[misc]
    found += [
        Location(THIRDS[third], "depth", lambda site, n=third: thirds[site.tower, site.block] == n)  # type: ignore[misc]
        for third in sorted(set(thirds.values()))
    ]
    return found


def analyze(
    clip: Clip,
    task: Task,
    held_out: Probe,
    *,
    sweep: Sweep,
    probe: Probe | None = None,
    told: Callable[[int, int], None] = lambda *_: None,
) -> list[Trial]:
    """Try every location at every rank; the first trial is the model as it is, at rank 0.

    Args:
        told: called after each trial with the number of those done and of all there are.

    Raises:
        TaskError: nothing was held out to measure on, or there is nothing to tell apart.
        ModelError: the architecture cannot be adapted.
    """
    if not len(held_out.labels):
        raise TaskError("no image is held out to measure on; give every class two images or more")
    if len(task.classes) < 2 and sweep.settings.objective == "published":
        raise TaskError(
            f"{task.classes[0].name!r} is the only class; the published loss compares the classes of a batch "
            "with each other, so give two or more"
        )
    exam = _Exam(clip, task, held_out, probe, seed=sweep.seed)
    places = [(place, rank) for place in locations(clip) for rank in sweep.ranks]
    trials = [exam.grade(Location("none", "none", lambda _: False), 0, Adaptation([], {}, 0, math.nan))]
    told(1, len(places) + 1)
    for place, rank in places:
        settings = sweep.settings.with_overrides(rank=rank)
        adaptation = adapt(clip, task, settings, seed=sweep.seed, hooks=Hooks(), only=place.holds)
        with folded(clip.model, adaptation):
            trials.append(exam.grade(place, rank, adaptation))
        told(len(trials), len(places) + 1)
    return trials


@contextmanager
def folded(model: nn.Module, adaptation: Adaptation) -> Iterator[None]:
    """The update is in the weights inside, and out of them, bit for bit, afterwards."""
    weights = dict(model.named_parameters())
    before = {factor.key: weights[factor.key].detach().clone() for factor in adaptation.factors}
    try:
        with torch.no_grad():
            for factor in adaptation.factors:
                weights[factor.key][factor.row_start : factor.row_stop] += factor.delta()
        yield
    finally:
        with torch.no_grad():
            for key, weight in before.items():
                weights[key].copy_(weight)


class _Exam:
    """What every trial is asked, and what the model said before."""

    def __init__(self, clip: Clip, task: Task, held_out: Probe, probe: Probe | None, *, seed: int) -> None:
        self.clip, self.held_out, self.probe = clip, held_out, probe
        self.own = prompts.tokenize(clip, *_names([*held_out.classes, *task.known]))
        others = [*task.known, *(Name(name) for name in prompts.generic_names())]
        self.others = prompts.tokenize(clip, *_names(others))
        self.stand_ins = augment.stand_ins(task.pixels, _STAND_INS, generator_for(seed, -1))
        self.probe_names = prompts.tokenize(clip, *_names(probe.classes)) if probe else None
        self.names_before, self.images_before = self._texts(self.others), self._images(self.stand_ins)

    def grade(self, place: Location, rank: int, adaptation: Adaptation) -> Trial:
        """Ask the model as it is now."""
        on_probe = None
        if self.probe and self.probe_names:
            on_probe = self._accuracy(self.probe, self.probe_names)
        return Trial(
            place.name,
            place.axis,
            rank,
            self._accuracy(self.held_out, self.own),
            _mean_cosine(self._texts(self.others), self.names_before),
            _mean_cosine(self._images(self.stand_ins), self.images_before),
            on_probe,
            adaptation.delta_norm,
            adaptation.ranks,
        )

    def _accuracy(self, probe: Probe, names: prompts.Prompts) -> float:
        similar = self._images(probe.pixels) @ self._texts(names).T
        return float((similar.argmax(1) == probe.labels).float().mean())

    def _texts(self, names: prompts.Prompts) -> Tensor:
        with torch.no_grad():
            return prompts.encode_text(self.clip.model, names)

    def _images(self, pixels: Tensor) -> Tensor:
        visual: Any = self.clip.model.visual
        with torch.no_grad():
            parts = [F.normalize(visual(part), dim=-1) for part in torch.split(pixels, _IMAGES_AT_ONCE)]
        return torch.cat(parts)


def _names(names: Sequence[Name]) -> tuple[list[str], list[str]]:
    return [n.name for n in names], [n.template for n in names]


def _mean_cosine(now: Tensor, before: Tensor) -> float:
    return float((now * before).sum(-1).mean())
