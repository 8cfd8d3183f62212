"""One cell: a method, a seed and a setting. Tunes, learns the stream, and keeps every answer's correctness.

The test split is read by `Exams`, once, and asked after each task; tuning asks held-out training images.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.stream.methods import Budget, Method, Params, method
from benchmarks.stream.packs import Asked, Drop, Labelled, Pack, Source, drops_of, union_names
from dynlora import Clip, Name, Task
from dynlora.prompts import tokenize

TUNING_SEED = 1000  # far from the seeds of the runs
TUNED_ON = ("clothing",)  # learnt, in this order, while tuning …
TUNED_BESIDE = ("aerial_scenes_rsscn7", "flowers5", "mnist_digits")  # … and asked beside, never learnt


@dataclass(frozen=True)
class Setting:
    """What a cell is beside its method and its seed."""

    shots: int
    steps: int
    batch_size: int
    test_per_class: int | None  # None: all
    one_class: bool = False
    class_steps: int = 20  # of each drop of one class

    @property
    def name(self) -> str:
        """For file names."""
        kind = f"classes{self.class_steps}" if self.one_class else "tasks"
        return f"{kind}-{self.shots}shots-{self.steps}x{self.batch_size}-test{self.test_per_class or 'all'}"

    @property
    def budget(self) -> Budget:
        """Of one drop."""
        return Budget(self.class_steps if self.one_class else self.steps, self.batch_size)


class Exams:
    """Images of several packs and the names to choose among: all of them together, or the pack's own."""

    def __init__(
        self, clip: Clip, packs: Sequence[Labelled], images: Sequence[Asked], names: Sequence[Name]
    ) -> None:
        self.images = images
        self.prompts = tokenize(clip, [n.name for n in names], [n.template for n in names])
        place = {name.name: index for index, name in enumerate(names)}
        self.columns = [torch.tensor([place[name] for name in pack.classes]) for pack in packs]

    def ask(self, clip: Clip, learner: Method) -> dict[str, list[Tensor]]:
        """For each pack which images are answered rightly, (N,) bool: `own` and `union` label space."""
        right: dict[str, list[Tensor]] = {"own": [], "union": []}
        with torch.inference_mode():
            similarity = learner.similarity(clip, self.prompts)
            for images, columns in zip(self.images, self.columns, strict=True):
                similar = torch.cat([similarity(part) for part in images.parts(256)])
                right["own"].append(similar[:, columns].argmax(1) == images.labels)
                right["union"].append(similar.argmax(1) == columns[images.labels])
        return right


def accuracies(right: list[Tensor]) -> list[float]:
    """Per cent of each pack."""
    return [round(float(r.float().mean()) * 100, 3) for r in right]


def tune(
    clip: Clip, weights: dict[str, Tensor], name: str, packs: dict[str, Pack], setting: Setting
) -> tuple[Params, list[dict[str, Any]]]:
    """The best settings of the method's grid, and how each did; only training images are used.

    One pack is learnt; what counts is the mean accuracy, among the names of four
    packs, on held-out training images of that one and of three that are not learnt.
    """
    grid = method(name).grid
    if len(grid) == 1:
        return grid[0], []
    used = [packs[p] for p in (*TUNED_ON, *TUNED_BESIDE)]
    loaded = [pack.train(TUNING_SEED, shots=setting.shots, held_out=16) for pack in used]
    exams = Exams(clip, used, [held_out for _, held_out in loaded], union_names(used))
    learnt = len(TUNED_ON)
    drops = drops_of(used[:learnt], [shots for shots, _ in loaded[:learnt]], one_class=False)
    trials = []
    for params in grid:
        clip.model.load_state_dict(weights)
        learner = method(name)
        for drop in as_taught(learner, drops):
            learner.learn(clip, drop.task, budget_of(learner, setting, len(drops)), params, seed=TUNING_SEED)
        trials.append(params | {"score": float(np.mean(accuracies(exams.ask(clip, learner)["union"])))})
    best = max(range(len(grid)), key=lambda index: trials[index]["score"])
    return grid[best], trials


def run_cell(
    clip: Clip,
    weights: dict[str, Tensor],
    name: str,
    params: Params,
    *,
    seed: int,
    stream: "Stream",
) -> dict[str, Any]:
    """Learn the whole stream; returns everything that the report is made from."""
    setting = stream.setting
    clip.model.load_state_dict(weights)
    shots = [pack.train(seed, shots=setting.shots, held_out=0)[0] for pack in stream.packs]
    drops = drops_of(stream.packs, shots, one_class=setting.one_class)
    learner = method(name)
    first = stream.exams.ask(clip, learner)
    record: dict[str, Any] = {
        "method": name, "seed": seed, "setting": asdict(setting), "params": params,
        "zero_shot": {space: accuracies(right) for space, right in first.items()},
        "own": [], "union": [], "negative_flips": [], "seconds": [], "delta_norm": [], "drift": [],
        "kept_rank": [], "losses": [],
    }  # fmt: skip
    before = first["union"]
    taught = as_taught(learner, drops)
    for number, drop in enumerate(taught):
        held = {key: value.clone() for key, value in clip.model.state_dict().items()}
        started = time.monotonic()
        lesson = learner.learn(
            clip, drop.task, budget_of(learner, setting, len(drops)), params, seed=seed * 1000 + number
        )
        record["seconds"].append(round(time.monotonic() - started, 2))
        record["delta_norm"].append(_moved(learner, clip, held))
        record["losses"].append(lesson.losses)
        record["kept_rank"].append(lesson.kept_rank)
        if number + 1 < len(taught) and taught[number + 1].stage == drop.stage:
            continue  # the pack goes on with its next class
        after = stream.exams.ask(clip, learner)
        for space in ("own", "union"):
            record[space].append(accuracies(after[space]))
        record["drift"].append(_moved(learner, clip, weights))
        flips = [float((b & ~a).float().mean()) * 100 for b, a in zip(before, after["union"], strict=True)]
        record["negative_flips"].append(round(float(np.mean(flips)), 3))
        before = after["union"]
        print(
            f"{name} seed {seed}: {drop.stage + 1} of {len(stream.packs)}, {record['seconds'][-1]} s, "
            f"union {np.mean(record['union'][-1]):.1f} %",
            flush=True,
        )
    record["added_parameters"] = learner.added_parameters
    record["probes"] = stream.ask_probes(clip, learner)
    return record


class Stream:
    """Packs, probes and their test images, loaded once for all cells."""

    def __init__(
        self, clip: Clip, packs: Sequence[Source], probes: Sequence[Source], setting: Setting
    ) -> None:
        self.packs, self.probes, self.setting = packs, probes, setting
        test = [pack.test(setting.test_per_class) for pack in packs]
        self.exams = Exams(clip, packs, test, union_names(packs))
        self._probes = [
            Exams(clip, [pack], [pack.test(setting.test_per_class)], union_names([pack])) for pack in probes
        ]

    def ask_probes(self, clip: Clip, learner: Method) -> dict[str, float]:
        """Per cent of each pack that is never learnt, among its own names."""
        asked = (exams.ask(clip, learner)["own"] for exams in self._probes)
        return {pack.path.stem: accuracies(right)[0] for pack, right in zip(self.probes, asked, strict=True)}


def as_taught(learner: Method, drops: list[Drop]) -> list[Drop]:
    """The drops, or for joint training all of them in one."""
    if not learner.is_joint:
        return drops
    classes = {c.name: c for drop in reversed(drops) for c in drop.task.classes}
    names = list(dict.fromkeys(c.name for drop in drops for c in drop.task.classes))
    labels = [
        torch.tensor([names.index(c.name) for c in drop.task.classes])[drop.task.labels] for drop in drops
    ]
    task = Task(
        [classes[name] for name in names], torch.cat([drop.task.pixels for drop in drops]), torch.cat(labels)
    )
    return [Drop(drops[-1].stage, task)]


def budget_of(learner: Method, setting: Setting, drops: int) -> Budget:
    """The steps of one drop; of all of them where all are learnt at once."""
    budget = setting.budget
    return Budget(budget.steps * drops, budget.batch_size) if learner.is_joint else budget


def _moved(learner: Method, clip: Clip, weights: dict[str, Tensor]) -> float | None:
    """How far the weights are from others; None where what was learnt is not in them."""
    return None if learner.changes_architecture else _distance(clip, weights)


def _distance(clip: Clip, weights: dict[str, Tensor]) -> float:
    """‖θ − weights‖_F over all floating-point entries of the state dict."""
    state = clip.model.state_dict()
    squares = (
        float((state[key].double() - value.double()).square().sum())
        for key, value in weights.items()
        if value.is_floating_point()
    )
    return round(math.sqrt(sum(squares)), 5)
