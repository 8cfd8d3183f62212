"""What a step minimises: the published loss.

An objective owns the task's tensors and prompts; the loop in `learner.py` only asks for a loss per step.
Shapes: B images of a step, C classes of the task, S names seen before.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from dynlora import prompts
from dynlora.attach import Site
from dynlora.clip import Clip
from dynlora.encoders import Encoders
from dynlora.moments import ImageMoments
from dynlora.retaining import RetainingObjective
from dynlora.sampling import BatchSampler
from dynlora.settings import Settings
from dynlora.task import Task


class Objective(Protocol):
    """One task's loss, and what belongs to it."""

    tokens: Sequence[int]  # whose embeddings are to be adapted

    def wants(self, site: Site) -> bool:
        """Whether this matrix is to be adapted."""

    def begin(self, sites: list[Site]) -> None:
        """Told once, before the first step, what is being adapted."""

    def parameter_groups(self, sites: list[Site]) -> list[dict[str, Any]]:
        """AdamW's parameter groups over everything trainable."""

    def loss(self, step: int) -> Tensor:
        """The loss of step number `step`; everything random about it follows from seed and step."""

    @property
    def own_moments(self) -> ImageMoments | None:
        """Of the task's images, where the objective looks at them with a vision tower that stays as it is."""

    def choose_scale(self, sites: list[Site]) -> float:
        """The share of the learnt update to keep, in (0, 1]; asked once, after the last step."""


class PublishedObjective:
    """CoDyRA's supervised loss: cross-entropy image→text over the task's classes, plus text→image.

    The target of a class row is the indicator of its images in the batch, not normalised. Names seen before
    add rows with an all-zero target to the text→image mean: they only rescale it, so they are not encoded.
    Over a single class image→text is 0 and text→image is least where all images are equally similar to the
    name: nothing sets the class apart from any other.

    A model of pairwise sigmoids (SigLIP: it has a logit bias) is taught by the loss it was trained with: for
    every image and class of the step, whether they belong together.
    """

    tokens: Sequence[int] = ()
    own_moments = None

    def __init__(self, clip: Clip, task: Task, settings: Settings, *, seed: int) -> None:
        self.encoders, self.task = Encoders.by(settings, clip.model), task
        self.prompts = prompts.tokenize(
            clip, [c.name for c in task.classes], [c.template for c in task.classes]
        )
        prompts.check_distinct(self.prompts, [c.name for c in task.classes], len(task.classes))
        self.scale = float(clip.model.logit_scale.exp())  # type: ignore[operator]
        self.bias = clip.logit_bias
        self.batches = BatchSampler(len(task.labels), settings.batch_size, seed=seed)
        self.seen_rows = len(task.known)

    def wants(self, site: Site) -> bool:  # noqa: ARG002 - part of the protocol
        """Every matrix, as published."""
        return True

    def begin(self, sites: list[Site]) -> None:
        """The loss looks at embeddings alone."""

    def parameter_groups(self, sites: list[Site]) -> list[dict[str, Any]]:
        """One group: the published recipe treats all parameters alike."""
        return [{"params": list(itertools.chain(*(site.lora.parameters() for site in sites)))}]

    def loss(self, step: int) -> Tensor:
        """Image→text plus text→image cross-entropy, or the pairwise sigmoid loss."""
        index = self.batches.at(step)
        labels = self.task.labels[index]
        images = self.encoders.images(self.task.pixels[index])
        texts = self.encoders.texts(self.prompts)
        logits = self.scale * images @ texts.T  # (B, C)
        members = F.one_hot(labels, len(texts)).T.float()  # (C, B)
        if self.bias is not None:
            signs = 2 * members.T - 1  # (B, C): 1 where image and class belong together, else -1
            return -F.logsigmoid(signs * (logits + self.bias)).sum(1).mean()
        text_to_image = F.cross_entropy(logits.T, members) * len(texts) / (len(texts) + self.seen_rows)
        return F.cross_entropy(logits, labels) + text_to_image

    def choose_scale(self, sites: list[Site]) -> float:  # noqa: ARG002 - part of the protocol
        """The whole update, as published."""
        return 1.0


def build_objective(clip: Clip, task: Task, settings: Settings, *, seed: int) -> Objective:
    """The objective that `settings` names."""
    if settings.objective == "default":
        return RetainingObjective(clip, task, settings, seed=seed)
    return PublishedObjective(clip, task, settings, seed=seed)
