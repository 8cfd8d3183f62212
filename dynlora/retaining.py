"""The default objective: new classes rise above what is known, and what is known stays where it is.

The published loss says nothing about names outside the batch, and nothing at all for one class alone. Here
every step also looks at names that are not in the batch (those known before, and a fixed bank of everyday
ones), as text only, and at stand-in images made out of the batch's own: no image of the past is needed.

    supervised  cross-entropy image→text over the batch's classes; 0 for one class alone
    rise        each image's own class above all other names, which do not move: softplus(lse(others) − own)
    hold        text embeddings of known and bank names stay where the previous model had them, known most
    apart       a new name comes no closer to other names than the previous model had it
    aloof       nor to where images of those names must lie: it rises on its own images, not everywhere
    look        embeddings of the batch's images, and of stand-ins, stay near the previous model's

Shapes: B images of a step, C classes of the task, K known names, S names in all, D embedding width.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynlora import augment, prompts
from dynlora.attach import Site
from dynlora.clip import Clip
from dynlora.encoders import Encoders
from dynlora.names import same_name_key
from dynlora.sampling import BatchSampler, generator_for
from dynlora.settings import Settings
from dynlora.task import Name, Task

SCALES = (1.0, 0.75, 0.5)  # the largest wins a draw

# Bound the memory while the previous model is asked.
_PROMPTS_AT_ONCE = 256
_IMAGES_AT_ONCE = 64


class RetainingObjective:
    """The default preset's loss for one task."""

    def __init__(self, clip: Clip, task: Task, settings: Settings, *, seed: int) -> None:
        self.task, self.settings, self.seed = task, settings, seed
        self.encoders = Encoders.by(settings, clip.model)
        self.own, self.known = len(task.classes), len(task.known)
        names = [*task.classes, *task.known, *_bank(task)]
        self.prompts = prompts.tokenize(clip, [n.name for n in names], [n.template for n in names])
        self.before = self._encode_all()  # (S, D), by the model as it is before learning
        self.scale = float(clip.model.logit_scale.exp())  # type: ignore[operator]
        self.batches = BatchSampler(len(task.labels), settings.batch_size, seed=seed)
        self._draw_images(generator_for(seed, -1))

    def parameter_groups(self, sites: list[Site]) -> list[dict[str, Any]]:
        """Towers at their own pace, gates at a multiple of it."""
        s = self.settings
        paces = {"vision": s.vision_learning_rate or s.learning_rate, "text": s.learning_rate}
        groups = []
        for tower, pace in paces.items():
            loras = [site.lora for site in sites if site.tower == tower]
            matrices = itertools.chain(*((lora.lora_A, lora.lora_B) for lora in loras))
            groups.append({"params": list(matrices), "lr": pace})
            gates = [lora.importance for lora in loras]
            groups.append({"params": gates, "lr": pace * s.gate_learning_rate_factor})
        return groups

    def loss(self, step: int) -> Tensor:
        """The weighted sum of the terms."""
        s, generator = self.settings, generator_for(self.seed, -2 - step)
        image = self.batches.at(step)
        labels = self.task.labels[image]
        view = torch.randint(s.views, image.shape, generator=generator)
        other = torch.randperm(len(self.stand_ins), generator=generator)[: s.stand_ins_per_step]
        pixels = torch.cat([self.views.render(self.task.pixels, image, view), self.stand_ins[other]])
        images = self.encoders.images(pixels)  # (B + stand-ins, D)
        images_before = torch.cat([self.seen_before[view, image], self.stand_ins_before[other]])
        chosen = self._choose_names(generator)  # (own + others,), own first
        texts = self.encoders.texts(self.prompts.rows(chosen))
        own, held = texts[: self.own], texts[self.own :]
        held_before = self.before[chosen[self.own :]]
        of_batch = images[: len(labels)]
        rise = self._rise(of_batch.detach(), own[labels], held_before)
        if self.own > 1:
            loss = s.rise * rise + F.cross_entropy(self.scale * of_batch @ own.T, labels)
        else:
            loss = s.rise * s.rise_alone_factor * rise
        weight = self._weight(len(held))
        loss = loss + s.hold * (weight * _moved(held, held_before)).mean()
        loss = loss + s.apart * self._closer(own, held_before) @ weight
        loss = loss + s.aloof * self._closer(own, F.normalize(held_before + self.gap, dim=-1)) @ weight
        return loss + s.look * _moved(images, images_before).mean()

    def choose_scale(self, sites: list[Site]) -> float:
        """The share of the update that tells the tuning images apart best; all of it without any.

        A guard against overfitting large or noisy batches: judged by cross-entropy among all names.
        """
        if not len(self.task.tune_labels):
            return 1.0
        learnt = [site.lora.importance.detach().clone() for site in sites]
        losses = {}
        with torch.no_grad():
            for scale in SCALES:
                for site, importance in zip(sites, learnt, strict=True):
                    site.lora.importance.copy_(importance * scale)
                losses[scale] = self._tune_loss()
            for site, importance in zip(sites, learnt, strict=True):
                site.lora.importance.copy_(importance)
        return min(SCALES, key=lambda scale: losses[scale])

    def _tune_loss(self) -> float:
        parts = torch.split(self.task.tune_pixels, _IMAGES_AT_ONCE)
        images = torch.cat([self.encoders.images(part) for part in parts])
        logits = self.scale * images @ self._encode_all().T
        return float(F.cross_entropy(logits, self.task.tune_labels))

    def _rise(self, images: Tensor, own: Tensor, others: Tensor) -> Tensor:
        """How far each image's own class is from standing above the others by the margin; (B, D), (N, D)."""
        logits = self.scale * (images * own).sum(-1)
        highest = torch.logsumexp(self.scale * images @ others.T, dim=-1)
        return F.softplus(highest + self.settings.margin - logits).mean()

    def _closer(self, own: Tensor, others_before: Tensor) -> Tensor:
        """Squared growth of the new names' cosines to other names or images; (C, D), (N, D) → (N,)."""
        before = self.before[: self.own] @ others_before.T
        growth = F.relu(own @ others_before.T - before.clamp(min=0))
        return growth.square().mean(0)

    def _choose_names(self, generator: torch.Generator) -> Tensor:
        """The batch's own names, and a sample of known and of bank names."""
        s, total = self.settings, len(self.prompts)
        known = torch.randperm(self.known, generator=generator)[: s.names_per_step] + self.own
        bank = torch.randperm(total - self.own - self.known, generator=generator)[: s.names_per_step]
        return torch.cat([torch.arange(self.own), known, bank + self.own + self.known])

    def _weight(self, names: int) -> Tensor:
        """(names,) of `_choose_names` but the batch's own: those that clients ask about count more."""
        weight = torch.ones(names)
        weight[: min(self.known, self.settings.names_per_step)] = self.settings.known_factor
        return weight

    def _draw_images(self, generator: torch.Generator) -> None:
        """Draw all views and stand-ins, and keep what the previous model sees in them."""
        s, pixels = self.settings, self.task.pixels
        self.views = augment.draw_views(
            pixels, s.views, generator, min_area=s.crop_min_area, jitter=s.colour_jitter
        )
        self.stand_ins = augment.stand_ins(pixels, s.stand_ins, generator)
        everyone = torch.split(torch.arange(len(pixels)), _IMAGES_AT_ONCE)
        with torch.no_grad():
            self.seen_before = torch.stack(  # (V, N, D)
                [torch.cat([self._view_before(part, view) for part in everyone]) for view in range(s.views)]
            )
            self.stand_ins_before = torch.cat(
                [self.encoders.images(part) for part in torch.split(self.stand_ins, _IMAGES_AT_ONCE)]
            )

        # CLIP keeps images and texts in two clouds. A name's text, shifted from one cloud to the other,
        # stands for the images of that name that nobody has any more.
        self.gap = self.seen_before.mean((0, 1)) - self.before[self.own :].mean(0)

    def _view_before(self, image: Tensor, view: int) -> Tensor:
        pixels = self.views.render(self.task.pixels, image, torch.full_like(image, view))
        return self.encoders.images(pixels)

    def _encode_all(self) -> Tensor:
        rows = torch.split(torch.arange(len(self.prompts)), _PROMPTS_AT_ONCE)
        with torch.no_grad():
            return torch.cat([self.encoders.texts(self.prompts.rows(part)) for part in rows])


def _moved(now: Tensor, before: Tensor) -> Tensor:
    """1 − cosine between embeddings now and before; (N, D), (N, D) → (N,)."""
    return 1 - (now * before).sum(-1)


def _bank(task: Task) -> list[Name]:
    """The everyday names that are neither in the batch nor known, in the singular or the plural."""
    taken = {_singular(n.name) for n in (*task.classes, *task.known)}
    return [Name(name) for name in prompts.generic_names() if _singular(name) not in taken]


def _singular(name: str) -> str:
    """Enough of a singular that `shoes` need not rise above `shoe`."""
    return same_name_key(name).removesuffix("s")
