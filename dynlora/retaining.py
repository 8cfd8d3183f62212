"""The default objective: new classes get the place their images ask for, and everything else stays.

The vision tower stays as it is, so images are looked at once, before the first step. Then the text tower
learns to put the batch's names where those images are. It can do so in two ways: the embeddings of the
tokens that names are made of, which few other names share, and low-rank updates of the tower's matrices,
which all names share. No image of the past is needed or kept.

    aim     the batch's names above all others on their images; images in general keep the name they had
    hold    known names, everyday ones and a vocabulary stay where the previous model had them, known most
    shrink  a small update rather than a large one

What own images ask for is a mean over them: one class alone would pull as much as ten together. So a batch of
few classes holds, shrinks and, given the model's moments, guards more: many small batches move the model
about as much as one large one.

"Learning to Name Classes for Vision and Language Models" (arXiv 2304.01830) learns token embeddings of
classes; here they are updates of the model's own rows, merged and ranked as every other matrix is.

Shapes: N image embeddings, C classes of the task, S names in all, D embedding width.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynlora import augment, prompts
from dynlora.aiming import Aim
from dynlora.attach import Site
from dynlora.clip import Clip
from dynlora.encoders import Encoders
from dynlora.errors import TaskError
from dynlora.lora import LoRA
from dynlora.moments import ImageMoments, MixedMoments
from dynlora.names import same_name_key
from dynlora.sampling import generator_for
from dynlora.settings import Settings
from dynlora.task import Name, Task

SCALES = (1.0, 0.75, 0.5)  # the largest wins a draw

# Bound the memory while the previous model is asked.
_PROMPTS_AT_ONCE = 256
_IMAGES_AT_ONCE = 64
# Of names that share no token with the batch: enough that no step sees much of what another saw.
_FAR_WORDS = 2_000
# A drop's own images are alike; without moments of the model, what stands for images in general says less.
_BLIND_STAND_INS = 128
# Of the draws, those from what earlier batches showed: beside the model's moments, and beside a batch's own.
_SHARE_OF_SEEN, _BLIND_SHARE_OF_SEEN = 0.5, 0.75


class RetainingObjective:
    """The default preset's loss for one task.

    Raises:
        TaskError: two names are one to the tokenizer, or nothing of the names can be learnt.
    """

    def __init__(self, clip: Clip, task: Task, settings: Settings, *, seed: int) -> None:
        self.task, self.settings, self.seed = task, settings, seed
        self.encoders = Encoders.by(settings, clip.model)
        self.own, self.known = len(task.classes), len(task.known)
        self.care = max(1.0, settings.few_classes / self.own)
        everyday, words = _free(task, prompts.generic_names()), _free(task, prompts.held_words())
        names = [*task.classes, *task.known, *everyday, *words]
        self.asked = torch.arange(len(names) - len(words))  # the vocabulary is only held
        self.prompts = prompts.tokenize(clip, [n.name for n in names], [n.template for n in names])
        prompts.check_distinct(self.prompts, [n.name for n in names[: self.own + self.known]], self.own)
        self.tokens = _own_tokens(clip, task) if settings.token_learning_rate else []
        if not (self.tokens or settings.learning_rate):
            own = ", ".join(repr(name.name) for name in task.classes)
            raise TaskError(
                f"{own}: every word of these names is one of their templates, too; expected a token of their "
                "own, or a learning rate for the text tower's matrices"
            )
        self._sort_names()
        self.before = self._encode_all()  # (S, D), by the model as it is before learning
        self.scale = float(clip.model.logit_scale.exp())  # type: ignore[operator]
        self.aim = self._look(generator_for(seed, -1))
        self.sites: list[Site] = []

    def wants(self, site: Site) -> bool:
        """Rows of the batch's tokens, and the text tower's matrices."""
        return site.kind == "token" or (site.tower == "text" and self.settings.learning_rate > 0)

    def begin(self, sites: list[Site]) -> None:
        """Keep them: `shrink` looks at their updates."""
        self.sites = sites

    def parameter_groups(self, sites: list[Site]) -> list[dict[str, Any]]:
        """Rows, matrices and gates, each at their own pace."""
        s = self.settings
        rows = [site.lora for site in sites if site.kind == "token"]
        matrices = [site.lora for site in sites if site.kind != "token"]
        groups = [
            {"params": _factors(matrices), "lr": s.learning_rate},
            {"params": _factors(rows), "lr": s.token_learning_rate},
            {"params": [lora.importance for lora in (*matrices, *rows)], "lr": s.gate_learning_rate},
        ]
        return [group for group in groups if group["params"]]

    def loss(self, step: int) -> Tensor:
        """The weighted sum of the terms."""
        s, generator = self.settings, generator_for(self.seed, -2 - step)
        held = self._choose_held(generator)
        texts = self.encoders.texts(self.prompts.rows(torch.cat([torch.arange(self.own), held])))
        loss = s.aim * self.aim.loss(texts[: self.own], generator)
        if len(held):
            weight = self._weight(held)
            moved = _moved(texts[self.own :], self.before[held])
            loss = loss + self.care * s.hold * (weight * moved).sum() / weight.sum()
        norms = [site.lora.squared_norm() for site in self.sites]
        return loss + self.care * s.shrink * torch.stack(norms).sum()

    def choose_scale(self, sites: list[Site]) -> float:
        """The share of the update that tells the tuning images apart best; all of it without any.

        A guard against overfitting large or noisy batches: judged by cross-entropy among all names.
        """
        if not len(self.task.tune_labels):
            return 1.0
        learnt = [site.lora.importance.detach().clone() for site in sites]
        losses = {}
        with torch.no_grad():
            parts = torch.split(self.task.tune_pixels, _IMAGES_AT_ONCE)
            images = torch.cat([self.encoders.images(part) for part in parts])
            for scale in SCALES:
                for site, importance in zip(sites, learnt, strict=True):
                    site.lora.importance.copy_(importance * scale)
                logits = self.scale * images @ self._encode(self.asked).T
                losses[scale] = float(F.cross_entropy(logits, self.task.tune_labels))
            for site, importance in zip(sites, learnt, strict=True):
                site.lora.importance.copy_(importance)
        return min(SCALES, key=lambda scale: losses[scale])

    @property
    def own_moments(self) -> ImageMoments:
        """Of the task's images, for tasks to come."""
        return ImageMoments.of_classes(self.aim.images, self.aim.labels)

    def _sort_names(self) -> None:
        """Which of the names share a token with the batch's own, and which are asked about at all."""
        shares = torch.isin(self.prompts.tokens, torch.tensor(self.tokens)).any(1)  # (S,)
        everyone = torch.arange(len(self.prompts))
        is_held, is_known = everyone >= self.own, everyone < self.own + self.known
        self.near_known = everyone[is_held & shares & is_known]
        self.near = everyone[is_held & shares & ~is_known]
        self.far_known = everyone[is_held & ~shares & is_known]
        far = everyone[is_held & ~shares & ~is_known]
        drawn = torch.randperm(len(far), generator=generator_for(self.seed, -1_000_000))
        self.far = far[drawn[:_FAR_WORDS]]

    def _choose_held(self, generator: torch.Generator) -> Tensor:
        """Names that are to stay: of each kind at most `names_per_step`.

        Names without a token of the batch's cannot move unless matrices do.
        """
        pools = [self.near_known, self.near]
        if self.settings.learning_rate > 0:
            pools += [self.far_known, self.far]
        count = self.settings.names_per_step
        chosen = [pool[torch.randperm(len(pool), generator=generator)[:count]] for pool in pools]
        return torch.cat(chosen)

    def _weight(self, held: Tensor) -> Tensor:
        """(len(held),): names that clients ask about count more."""
        is_known = held < self.own + self.known
        return torch.where(is_known, self.settings.known_factor, 1.0)

    def _look(self, generator: torch.Generator) -> Aim:
        """See views of all images, once, with the previous model: it is the new one's vision tower, too."""
        s, pixels = self.settings, self.task.pixels
        views = augment.draw_views(
            pixels, s.views, generator, min_area=s.crop_min_area, jitter=s.colour_jitter
        )
        everyone = torch.split(torch.arange(len(pixels)), _IMAGES_AT_ONCE)
        with torch.no_grad():
            seen = [
                self.encoders.images(views.render(pixels, part, torch.full_like(part, view)))
                for view in range(s.views)
                for part in everyone
            ]
            images = torch.cat(seen)  # (V·N, D)
            general = self._moments_in_general(images, generator)
        return Aim(
            images,
            self.task.labels.repeat(s.views),
            self.before[: self.own],
            self.before[self.asked[self.own :]],
            general,
            self.scale,
            guard=self._guard(),
            keep=s.keep,
            margin=s.margin,
        )

    def _guard(self) -> float:
        """More for few classes, unless the draws are like the batch's own images: those are to be learnt."""
        return self.settings.guard * (self.care if self.task.moments else 1.0)

    def _moments_in_general(self, images: Tensor, generator: torch.Generator) -> ImageMoments | MixedMoments:
        """What the model was made with, or else the batch has; and what earlier batches showed."""
        moments, seen = self.task.moments, self.task.seen
        first = moments or self._moments_of(images, generator)
        share = _SHARE_OF_SEEN if moments else _BLIND_SHARE_OF_SEEN
        return MixedMoments(first, seen, share) if seen else first

    def _moments_of(self, images: Tensor, generator: torch.Generator) -> ImageMoments:
        """Of the batch's images and of stand-ins made out of them, for want of something more general."""
        stand_ins = augment.stand_ins(self.task.pixels, _BLIND_STAND_INS, generator)
        seen = [self.encoders.images(part) for part in torch.split(stand_ins, _IMAGES_AT_ONCE)]
        return ImageMoments.of(torch.cat([*seen, images[: len(self.task.labels)]]))

    def _encode_all(self) -> Tensor:
        """Names that no step asks about keep zeros: encoding them is the dearest part."""
        wanted = [self.asked, self.near]
        if self.settings.learning_rate > 0:
            wanted.append(self.far)
        rows: Tensor = torch.unique(torch.cat(wanted))
        with torch.no_grad():
            encoded = self._encode(rows)
        before = torch.zeros(len(self.prompts), encoded.shape[1])
        before[rows] = encoded
        return before

    def _encode(self, rows: Tensor) -> Tensor:
        parts = torch.split(rows, _PROMPTS_AT_ONCE)
        return torch.cat([self.encoders.texts(self.prompts.rows(part)) for part in parts])


def _moved(now: Tensor, before: Tensor) -> Tensor:
    """1 − cosine between embeddings now and before; (N, D), (N, D) → (N,)."""
    return 1 - (now * before).sum(-1)


def _own_tokens(clip: Clip, task: Task) -> Sequence[int]:
    """Tokens of the batch's names that no template has: those of templates are in every prompt."""
    templates = {name.template for name in (*task.classes, *task.known)} | {prompts.DEFAULT_TEMPLATE}
    common = set(clip.tokenizer([template.format("") for template in templates]).flatten().tolist())
    named = clip.tokenizer([name.template.format(name.name) for name in task.classes])
    return sorted(set(named.flatten().tolist()) - common)


def _factors(loras: list[LoRA]) -> list[Tensor]:
    return list(itertools.chain(*((lora.lora_A, lora.lora_B) for lora in loras)))


def _free(task: Task, names: Sequence[str]) -> list[Name]:
    """Those that are neither in the batch nor known, in the singular or the plural."""
    taken = set[str]().union(*(_singulars(n.name) for n in (*task.classes, *task.known)))
    return [Name(name) for name in names if taken.isdisjoint(_singulars(name))]


def _singulars(name: str) -> set[str]:
    """The name and what it may be the plural of: `boxes` need not rise above `box`."""
    key = same_name_key(name)
    endings = (("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe"))
    return {key, *(key.removesuffix(end) + singular for end, singular in endings if key.endswith(end))}
