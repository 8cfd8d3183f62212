"""Every method behind one protocol: it is given a model and a task, learns it, and can be asked about images.

Methods that learn a low-rank update go through `dynlora.adapt`, those that tune whole matrices are in
`tuning.py`. DIKI and C-ADA (`diki.py`, `c_ada.py`) leave the weights as they are and put something beside
them: they change the architecture, and could never be deployed here. All do the same number of steps on the
same number of images, but for the default, which looks at each image once and takes more steps without any,
in more time altogether; all choose among three settings on held-out training images.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from daemon.general import moments_of_seen, seen_of_moments
from daemon.seen import Seen
from dynlora import Adaptation, Clip, Hooks, Settings, Task, adapt, preset
from dynlora.clip import BUNDLED_MOMENTS
from dynlora.moments import ImageMoments
from dynlora.prompts import Prompts, encode_text

Params = dict[str, float]
Similarity = Callable[[Tensor], Tensor]  # pixels (N, 3, H, W) → cosines (N, names)

# Of the default objective for each step of the others: its steps look at no image, and each takes less time;
# all together take more, 245 s of ten tasks where the paper's recipe takes 157 (benchmarks/results).
_TEXT_STEPS = 150 / 40


@dataclass(frozen=True)
class Budget:
    """What every method may spend on one task."""

    steps: int
    batch_size: int


@dataclass(frozen=True)
class Lesson:
    """What is known about one task's learning beside the new weights."""

    losses: tuple[float, float]  # mean of the first and of the last tenth of the steps
    kept_rank: float | None = None  # mean over matrices; None where updates have full rank


class Method(Protocol):
    """One way to learn a stream. Made anew for every run, so it may remember the model it started from."""

    name: str
    grid: tuple[Params, ...]
    is_joint: bool  # learns all tasks at once: an upper bound, not a method of continual learning
    changes_architecture: bool  # what it learns cannot be added to the weights

    @property
    def added_parameters(self) -> int:
        """How many numbers inference needs beside the model's, after what was learnt so far."""

    def learn(self, clip: Clip, task: Task, budget: Budget, params: Params, *, seed: int) -> Lesson:
        """Learn the task; the weights are changed in place, unless the architecture is."""

    def similarity(self, clip: Clip, prompts: Prompts) -> Similarity:
        """How the model, with what was learnt, likens images to these names."""


class Mergeable:
    """What all methods share that end in new weights: the model is asked as it is."""

    is_joint, changes_architecture, added_parameters = False, False, 0

    def similarity(self, clip: Clip, prompts: Prompts) -> Similarity:
        """Of both towers' embeddings."""
        texts = encode_text(clip.model, prompts)
        return lambda pixels: F.normalize(clip.model.visual(pixels), dim=-1) @ texts.T  # type: ignore[operator]


class ZeroShot(Mergeable):
    """The model as it is."""

    name = "zero-shot"
    grid: tuple[Params, ...] = ({},)

    def learn(self, *_: Any, **__: Any) -> Lesson:
        """Nothing."""
        return Lesson((0.0, 0.0), 0.0)


class LowRank(Mergeable):
    """Settings for `dynlora.adapt`; the update is added to the weights after each task."""

    def __init__(
        self,
        name: str,
        grid: tuple[Params, ...],
        settings: Callable[[Params], Settings],
        moments: ImageMoments | None = None,
    ) -> None:
        self.name, self.grid, self._settings, self._moments = name, grid, settings, moments
        self._seen: Seen | None = None  # as a home keeps them

    def learn(self, clip: Clip, task: Task, budget: Budget, params: Params, *, seed: int) -> Lesson:
        """Adapt and fold."""
        settings = self._settings(params)
        share = _TEXT_STEPS if settings.objective == "default" else 1
        settings = replace(settings, steps=round(budget.steps * share), batch_size=budget.batch_size)
        losses: list[float] = []
        hooks = Hooks(on_progress=lambda progress: losses.append(progress.loss))
        is_theirs = self._moments is not None and len(self._moments.mean) == clip.model_cfg["embed_dim"]
        seen = moments_of_seen(self._seen) if self._seen else None
        task = replace(task, moments=self._moments if is_theirs else None, seen=seen)
        adaptation = adapt(clip, task, settings, seed=seed, hooks=hooks)
        self._remember(adaptation.own_moments, len(task.classes))
        fold_into(dict(clip.model.named_parameters()), adaptation)
        return Lesson(ends(losses), mean_rank(adaptation))

    def _remember(self, own: ImageMoments | None, classes: int) -> None:
        if own is not None:
            more = seen_of_moments(own, classes=classes, batch="")
            self._seen = self._seen.with_more(more) if self._seen else more


def fold_into(weights: dict[str, Tensor], adaptation: Adaptation) -> None:
    """Add an update to the weights in place: what deploy.delta.fold does, up to the order of additions."""
    with torch.no_grad():
        for factor in adaptation.factors:
            weights[factor.key][factor.row_start : factor.row_stop] += factor.delta()


def mean_rank(adaptation: Adaptation) -> float:
    """Over the adapted matrices; a token's row is none."""
    ranks = adaptation.ranks.values()
    return sum(ranks) / len(ranks) if ranks else 0.0


def ends(losses: list[float]) -> tuple[float, float]:
    """Mean of the first and of the last tenth."""
    tenth = max(1, len(losses) // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


def plain_lora(rank: int) -> LowRank:
    """LoRA with the published loss and no threshold: gates start at 1, are trained and never pruned."""
    base = replace(preset("paper"), rank=rank, gates="ones", dense_fraction=1.0, betas=(0.9, 0.999))
    grid = tuple({"learning_rate": rate} for rate in (5e-4, 2e-3, 5e-3))
    return LowRank(f"lora-{rank}", grid, lambda params: replace(base, **params))


def published() -> LowRank:
    """The paper's recipe. Its 500 steps have thresholds that add up to 0.625; so have ours, however many."""
    base = replace(preset("paper"), kappa_total=0.625)
    grid = tuple({"learning_rate": rate} for rate in (5e-4, 2e-3, 5e-3))
    return LowRank("paper", grid, lambda params: replace(base, **params))


def default(*, blind: bool = False, bfloat16: bool = False) -> LowRank:
    """The default preset, its learning rates times a factor.

    Args:
        blind: without the model's image moments; those of the tasks before are all there is.
        bfloat16: of the towers' products, at the preset's own pace: nothing but the arithmetic is to differ.
    """
    base = preset("default")

    def settings(params: Params) -> Settings:
        pace = params["pace"]
        return replace(
            base,
            learning_rate=base.learning_rate * pace,
            token_learning_rate=base.token_learning_rate * pace,
        )

    grid = tuple({"pace": pace} for pace in (0.5, 1.0, 2.0))
    if blind:
        return LowRank("default-blind", grid, settings)
    moments = ImageMoments.load(BUNDLED_MOMENTS, width=128)
    if bfloat16:
        return LowRank(
            "default-bfloat16", ({"pace": 1.0},), lambda p: replace(settings(p), dtype="bfloat16"), moments
        )
    return LowRank("default", grid, settings, moments)


def method(name: str) -> Method:
    """A fresh instance; raises KeyError for an unknown name."""
    from benchmarks.stream import c_ada, diki, tuning

    makers: dict[str, Callable[[], Method]] = {
        "zero-shot": ZeroShot,
        "lora-16": lambda: plain_lora(16),
        "paper": published,
        "default": default,
        "default-blind": lambda: default(blind=True),
        "default-bfloat16": lambda: default(bfloat16=True),
        "full": tuning.FullTuning,
        "wise-ft": tuning.WiseFt,
        "lora-4": lambda: plain_lora(4),
        "l2": tuning.L2,
        "lwf": tuning.Lwf,
        "orthsr": tuning.OrthSr,
        "diki": diki.Diki,
        "c-ada": c_ada.CAda,
        "joint": tuning.Joint,
    }
    return makers[name]()


CHANGING = ("diki", "c-ada")  # the architecture
METHODS = (
    *("zero-shot", "lora-16", "paper", "default", "default-blind", "default-bfloat16", "full", "wise-ft"),
    *("lora-4", "l2", "lwf", "orthsr", *CHANGING, "joint"),
)
