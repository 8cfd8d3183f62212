"""Methods that tune whole weight matrices, written out plainly: full tuning and its four restraints.

All minimise cross-entropy image→text over the task's own classes; each adds one idea. Shapes: B images of a
step, C classes of the task, K known names, D embedding width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.stream.methods import Budget, Lesson, Mergeable, Params, ends
from dynlora import Clip, Task
from dynlora.prompts import Prompts, encode_text, tokenize
from dynlora.sampling import BatchSampler

_RATES = (3e-5, 1e-4, 3e-4)
_ORTHOGONAL_BLOCK = 32  # rows that one rotation mixes


class _Both(nn.Module):
    """Images and prompts in one forward, so that weights can be swapped for one call."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pixels: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        images = F.normalize(self.clip.visual(pixels), dim=-1)  # type: ignore[operator]
        return images, encode_text(self.clip, prompts)


class FullTuning(Mergeable):
    """Every weight of both towers is trained."""

    name = "full"
    grid: tuple[Params, ...] = tuple({"learning_rate": rate} for rate in _RATES)

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}  # the weights before the first task
        self.previous: dict[str, Tensor] = {}  # those before this one

    def learn(self, clip: Clip, task: Task, budget: Budget, params: Params, *, seed: int) -> Lesson:
        """AdamW with a cosine to 0."""
        both = _Both(clip.model)
        weights = {n: p for n, p in both.named_parameters() if n != "clip.logit_scale"}
        self.previous = {name: weight.detach().clone() for name, weight in weights.items()}
        self.start = self.start or self.previous
        prompts = tokenize(clip, [c.name for c in task.classes], [c.template for c in task.classes])
        self.prepare(both, clip, task)
        trained = self.trained(weights)
        optimizer = torch.optim.AdamW(trained, lr=params["learning_rate"], weight_decay=0.0)
        batches = BatchSampler(len(task.labels), budget.batch_size, seed=seed)
        scale = float(clip.model.logit_scale.exp())  # type: ignore[operator]
        losses = []
        for step in range(budget.steps):
            for group in optimizer.param_groups:
                group["lr"] = params["learning_rate"] * 0.5 * (1 + math.cos(math.pi * step / budget.steps))
            chosen = batches.at(step)
            swapped = self.swapped()
            images, texts = functional_call(both, swapped, (task.pixels[chosen], prompts))
            loss = F.cross_entropy(scale * images @ texts.T, task.labels[chosen])
            loss = loss + self.restraint(images, texts, chosen, weights, params)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        with torch.no_grad():
            self.settle(weights, params)
        for weight in weights.values():
            weight.requires_grad_(False)
        return Lesson(ends(losses))

    def prepare(self, both: _Both, clip: Clip, task: Task) -> None:
        """Whatever is to be asked of the model before the first step."""

    def trained(self, weights: dict[str, Tensor]) -> list[Tensor]:
        """What the optimiser moves."""
        return [weight.requires_grad_(True) for weight in weights.values()]

    def swapped(self) -> dict[str, Tensor]:
        """Weights that stand in for the model's in this step."""
        return {}

    def restraint(
        self, images: Tensor, texts: Tensor, chosen: Tensor, weights: dict[str, Tensor], params: Params
    ) -> Tensor | float:
        """What the method adds to the loss."""
        del images, texts, chosen, weights, params
        return 0.0

    def settle(self, weights: dict[str, Tensor], params: Params) -> None:
        """What is done to the weights after the last step."""


class WiseFt(FullTuning):
    """WiSE-FT: after tuning, the weights go back part of the way to those before the task."""

    name = "wise-ft"
    grid: tuple[Params, ...] = tuple({"learning_rate": 1e-4, "share": share} for share in (0.3, 0.5, 0.7))

    def settle(self, weights: dict[str, Tensor], params: Params) -> None:
        """Keep `share` of the step from the previous weights."""
        for name, weight in weights.items():
            weight.copy_(torch.lerp(self.previous[name], weight, params["share"]))


class L2(FullTuning):
    """A penalty on the squared distance from the weights before the first task."""

    name = "l2"
    grid: tuple[Params, ...] = tuple({"learning_rate": 1e-4, "weight": weight} for weight in (0.1, 1.0, 10.0))

    def restraint(
        self, images: Tensor, texts: Tensor, chosen: Tensor, weights: dict[str, Tensor], params: Params
    ) -> Tensor:
        """Weight · ‖θ − θ_start‖²."""
        del images, texts, chosen
        distance = sum((weight - self.start[name]).square().sum() for name, weight in weights.items())
        return params["weight"] * distance  # type: ignore[return-value]


class Lwf(FullTuning):
    """Learning without forgetting: on current images, answers among known and own names stay as they were."""

    name = "lwf"
    grid: tuple[Params, ...] = tuple({"learning_rate": 1e-4, "weight": weight} for weight in (0.3, 1.0, 3.0))

    def prepare(self, both: _Both, clip: Clip, task: Task) -> None:
        """Ask the model before the task about all images, among the names known and the task's own."""
        names = [*task.known, *task.classes]
        prompts = tokenize(clip, [n.name for n in names], [n.template for n in names])
        self.scale = float(clip.model.logit_scale.exp())  # type: ignore[operator]
        with torch.no_grad():
            # Texts of the previous model stay the classifier, as the old heads do in the original.
            self.texts = encode_text(both.clip, prompts)
            embeddings = [
                F.normalize(both.clip.visual(part), dim=-1)  # type: ignore[operator]
                for part in torch.split(task.pixels, 128)
            ]
            self.before = F.softmax(self.scale * torch.cat(embeddings) @ self.texts.T, dim=-1)

    def restraint(
        self, images: Tensor, texts: Tensor, chosen: Tensor, weights: dict[str, Tensor], params: Params
    ) -> Tensor:
        """Weight · cross-entropy of the previous answers."""
        del texts, weights
        return params["weight"] * F.cross_entropy(self.scale * images @ self.texts.T, self.before[chosen])


class OrthSr(FullTuning):
    """Orthogonal tuning with self-regularisation (OrthSR-style): W becomes R W, R orthogonal.

    R is block-diagonal, each block the Cayley transform of a skew matrix, on every attention and MLP matrix
    of both towers. The answers on current images are held to those of the model before the first task.
    """

    name = "orthsr"
    # Small angles: at 3e-3 ten tasks turned the model into noise (docs/log.md).
    grid: tuple[Params, ...] = tuple({"learning_rate": rate, "weight": 1.0} for rate in (1e-4, 3e-4, 1e-3))

    def __init__(self) -> None:
        super().__init__()
        self.first: _Both | None = None

    def prepare(self, both: _Both, clip: Clip, task: Task) -> None:
        """Answers of the first model, and rotations at the identity."""
        self.scale = float(clip.model.logit_scale.exp())  # type: ignore[operator]
        prompts = tokenize(clip, [c.name for c in task.classes], [c.template for c in task.classes])
        with torch.no_grad():
            parts = [
                functional_call(both, self.start, (part, prompts)) for part in torch.split(task.pixels, 128)
            ]
            logits = self.scale * torch.cat([images for images, _ in parts]) @ parts[0][1].T
        self.before = F.softmax(logits, dim=-1)

    def trained(self, weights: dict[str, Tensor]) -> list[Tensor]:
        """One skew matrix per block of rows of each matrix."""
        self.rotated = {n: w for n, w in weights.items() if _is_matrix_of_a_block(n, w)}
        self.skew = {
            name: torch.zeros(len(w) // _ORTHOGONAL_BLOCK, *[_ORTHOGONAL_BLOCK] * 2, requires_grad=True)
            for name, w in self.rotated.items()
        }
        return list(self.skew.values())

    def swapped(self) -> dict[str, Tensor]:
        """R W of every rotated matrix."""
        eye = torch.eye(_ORTHOGONAL_BLOCK)
        swapped = {}
        for name, weight in self.rotated.items():
            q = self.skew[name] - self.skew[name].mT
            rotation = torch.linalg.solve(eye - q, eye + q)  # Cayley: orthogonal for every skew q
            rows = weight.view(len(q), _ORTHOGONAL_BLOCK, -1)
            swapped[name] = (rotation @ rows).view_as(weight)
        return swapped

    def restraint(
        self, images: Tensor, texts: Tensor, chosen: Tensor, weights: dict[str, Tensor], params: Params
    ) -> Tensor:
        """Weight · cross-entropy of the first model's answers."""
        del weights
        return params["weight"] * F.cross_entropy(self.scale * images @ texts.T, self.before[chosen])

    def settle(self, weights: dict[str, Tensor], params: Params) -> None:
        """Merge the rotations."""
        del params
        for name, rotated in self.swapped().items():
            weights[name].copy_(rotated)


class Joint(FullTuning):
    """Full tuning on all tasks' images at once, with the steps of all: the upper bound."""

    name, is_joint = "joint", True


def _is_matrix_of_a_block(name: str, weight: Tensor) -> bool:
    is_inside = ".attn." in name or ".mlp." in name
    return is_inside and weight.ndim == 2 and len(weight) % _ORTHOGONAL_BLOCK == 0
