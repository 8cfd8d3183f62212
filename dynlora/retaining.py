"""The default objective: new classes stand above what is known, and what is known stays where it is.

Before the first step `dynlora.aiming` looks for the place where each new class's text should lie, given what
the model sees in its images. The steps then move the text tower until its answers lie there; names that are
not in the batch (those known before, and a fixed bank of everyday ones) are held where they were. No image of
the past is needed or kept.

    aim     text embeddings of the batch's classes lie at their targets
    hold    text embeddings of known and bank names stay where the previous model had them, known most
    sharpen cross-entropy image→text at the targets, in which only the vision tower moves
    look    embeddings of the batch's images, and of stand-ins, stay near the previous model's

The last two look at images, which cost most of a step: only every `image_every`th step does.
Shapes: B images of a step, C classes of the task, K known names, S names in all, D embedding width.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynlora import augment, prompts
from dynlora.aiming import Aim
from dynlora.attach import Site
from dynlora.clip import Clip
from dynlora.encoders import Encoders
from dynlora.moments import ImageMoments
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
        self.targets = self._find_targets(generator_for(seed, -1_000_000))

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
        chosen = self._choose_names(generator)  # (own + others,), own first
        texts = self.encoders.texts(self.prompts.rows(chosen))
        own, held = texts[: self.own], texts[self.own :]
        weight = self._weight(len(held))
        loss = s.aim * _moved(own, self.targets).mean()
        loss = loss + s.hold * (weight * _moved(held, self.before[chosen[self.own :]])).sum() / weight.sum()
        if s.image_every and step % s.image_every == 0:
            loss = loss + self._image_loss(step, self.before[chosen[self.own :]], generator)
        return loss

    def _image_loss(self, step: int, others: Tensor, generator: torch.Generator) -> Tensor:
        s = self.settings
        image = self.batches.at(step // s.image_every)
        view = torch.randint(s.views, image.shape, generator=generator)
        other = torch.randperm(len(self.stand_ins), generator=generator)[: s.stand_ins_per_step]
        pixels = torch.cat([self.views.render(self.task.pixels, image, view), self.stand_ins[other]])
        images = self.encoders.images(pixels)  # (B + stand-ins, D)
        images_before = torch.cat([self.seen_before[view, image], self.stand_ins_before[other]])
        logits = self.scale * images[: len(image)] @ torch.cat([self.targets, others]).T
        sharpen = F.cross_entropy(logits, self.task.labels[image])
        return s.sharpen * sharpen + s.look * _moved(images, images_before).mean()

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

    def _find_targets(self, generator: torch.Generator) -> Tensor:
        """Where the batch's classes should lie, (C, D)."""
        images = self.seen_before.flatten(0, 1)
        general = self.task.moments or ImageMoments.of(torch.cat([images, self.stand_ins_before]))
        aim = Aim(self.scale, self.settings.guard, self.settings.margin)
        labels = self.task.labels.repeat(self.settings.views)
        own, others = self.before[: self.own], self.before[self.own :]
        return aim.targets(images, labels, own, others, general, generator)

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
