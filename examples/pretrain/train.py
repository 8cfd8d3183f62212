"""The contrastive training of the vision tower against the words, with or without a teacher's opinion."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from images import ImageSet, coarsen, crop, jittered, normalize, paste, random_boxes, recolour
from names import TEMPLATES, Names
from teacher import Views, soft_labels
from torch import Tensor, nn
from words import text_parameters

from dynlora.clip import Clip
from dynlora.prompts import encode_text, tokenize


@dataclass(frozen=True)
class Recipe:
    """How long and how hard to train."""

    epochs: int = 30
    batch: int = 192
    peak: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: float = 0.04  # share of the steps
    jitter: float = 0.08  # of the place and size of the teacher's crops, in shares of the image
    own_weight: float = 1.0
    names_weight: float = 1.0
    feature_weight: float = 1.0
    trust: float = 0.5  # in the teacher, where it and the image's label do not agree
    label_smoothing: float = 0.1  # without a teacher
    paste_share: float = 0.4  # of the batches
    coarse_share: float = 0.25  # of the batches lose up to half of their resolution
    ema_epochs: float = 1.0  # how far back the average reaches
    bfloat16: bool = True  # products of the vision tower; weights, losses and the average stay float32
    text: bool = False  # train the text tower too, for a start without distilled words
    seed: int = 0


class Training:
    """One run: `epoch()` by `epoch()`, with a state that can be kept and restored."""

    def __init__(self, clip: Clip, images: ImageSet, own: Names, recipe: Recipe) -> None:
        """`own` has one row per class of `images`."""
        self.clip, self.images, self.own, self.recipe = clip, images, own, recipe
        self.teacher: tuple[Views, Names, Tensor] | None = None
        self.steps_per_epoch = len(images.labels) // recipe.batch
        if not self.steps_per_epoch:
            raise SystemExit(
                f"{len(images.labels)} images do not fill one batch of {recipe.batch}; lower --batch"
            )
        self.total = recipe.epochs * self.steps_per_epoch
        self.step = 0
        visual = clip.model.visual
        visual.requires_grad_(True)
        visual.to(memory_format=torch.channels_last)  # an eighth more images a second
        self.logit_scale = nn.Parameter(torch.tensor(math.log(20.0)))
        self.to_features = nn.Linear(visual.head.proj.in_features, 1)  # replaced by with_teacher
        self.text = text_parameters(clip.model) if recipe.text else []
        self.own_columns = torch.arange(len(own.own))
        self.share = torch.from_numpy(own.share)
        self.names = own.names

    def with_teacher(self, views: Views, theirs: Names, own_class: Tensor) -> "Training":
        """Learn from a teacher as well.

        Args:
            views: what it saw.
            theirs: names of its classes.
            own_class: (C,) which of its classes each of ours is.
        """
        self.teacher = (views, theirs, own_class)
        joint = list(dict.fromkeys([*self.own.names, *theirs.names]))
        column = {name: i for i, name in enumerate(joint)}
        share = torch.zeros(len(theirs.own), len(joint))
        share[:, [column[n] for n in theirs.names]] = torch.from_numpy(theirs.share)
        ours = torch.zeros(len(self.own.own), len(joint))
        ours[:, [column[n] for n in self.own.names]] = torch.from_numpy(self.own.share)
        share[own_class] = ours  # we have better names for classes that are ours
        self.names, self.share = joint, share
        self.own_columns = torch.tensor([column[n] for n in self.own.own])
        self.to_features = nn.Linear(self.to_features.in_features, views.features.shape[2])
        return self

    def prepare(self) -> "Training":
        """Make the optimizer and the average; call once, when nothing else is to be set up."""
        visual = self.clip.model.visual
        everything = [*visual.parameters(), *self.to_features.parameters(), *self.text]
        matrices = [p for p in everything if p.ndim >= 2]
        rest = [p for p in everything if not any(p is m for m in matrices)]
        groups = [
            {"params": matrices, "weight_decay": self.recipe.weight_decay},
            {"params": [*rest, self.logit_scale], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.recipe.peak, betas=(0.9, 0.98), fused=True)
        self.average = {k: v.detach().clone() for k, v in self.clip.model.state_dict().items()}
        moving = [name for name in self.average if self.text or name.startswith("visual.")]
        self.moving = {name: self.clip.model.state_dict()[name] for name in moving}
        if not self.text:
            with torch.no_grad():
                rows = [_embed(self.clip, self.names, template) for template in TEMPLATES]
            self.frozen_names = torch.stack(rows)
        return self

    def epoch(self) -> Iterator[dict[str, float]]:
        """Train on every image once; yields the mean losses now and then.

        With several processes each takes its share of every batch, and all make the same step.
        """
        processes, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        seed = self.recipe.seed * 1_000_000 + self.step
        order = torch.randperm(len(self.images.labels), generator=torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed * processes + rank)
        sums: dict[str, float] = {}
        count, start = 0, time.monotonic()
        for i in range(self.steps_per_epoch):
            rows = order[i * self.recipe.batch : (i + 1) * self.recipe.batch].chunk(processes)[rank]
            for name, value in self._one_step(rows, generator).items():
                sums[name] = sums.get(name, 0.0) + value
            count += 1
            if time.monotonic() - start > 30 or i == self.steps_per_epoch - 1:
                seconds = time.monotonic() - start
                means = {name: value / count for name, value in sums.items()}
                yield {"step": self.step, **means, "images_per_s": count * self.recipe.batch / seconds}
                sums, count, start = {}, 0, time.monotonic()

    def _one_step(self, rows: Tensor, generator: torch.Generator) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.peak * self._pace()
        losses = self._losses(rows, generator)
        weights = {
            "own": self.recipe.own_weight,
            "names": self.recipe.names_weight,
            "features": self.recipe.feature_weight,
        }
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack([weights[name] * loss for name, loss in losses.items()]).sum().backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        _share_gradients(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(100.0))
        self.step += 1
        self._follow()
        return {name: loss.item() for name, loss in losses.items()}

    def _losses(self, rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        pixels, labels = self.images.pixels[rows], self.images.labels[rows]
        view = torch.zeros(len(rows), dtype=torch.long)
        if self.teacher is None:
            boxes = random_boxes(len(rows), least=0.35, generator=generator)
        else:
            view = torch.randint(len(self.teacher[0].boxes), (len(rows),), generator=generator)
            boxes = jittered(self.teacher[0].boxes[view, rows], self.recipe.jitter, generator)
        mirror = torch.rand(len(rows), generator=generator) < 0.5
        batch = recolour(crop(pixels, boxes, pixels.shape[-1], mirror), generator)
        if torch.rand(1, generator=generator).item() < self.recipe.coarse_share:
            batch = coarsen(batch, 0.5 + 0.5 * torch.rand(1, generator=generator).item())
        parts = [(torch.arange(len(rows)), 1.0)]
        if torch.rand(1, generator=generator).item() < self.recipe.paste_share:
            batch, order, own = paste(batch, generator)
            parts = [(parts[0][0], own), (order, 1 - own)]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bfloat16):
            seen = normalize(batch).contiguous(memory_format=torch.channels_last)
            pooled = self.clip.model.visual.trunk(seen)  # (B, width)
        pooled = pooled.float()
        vectors = F.normalize(self.clip.model.visual.head(pooled), dim=1)
        names = self._name_vectors(generator)
        logits = self.logit_scale.exp() * vectors @ names.T

        said, shares, features = self._targets(rows, labels, view)
        own_target, name_target, feature_target = (
            sum(part * target[index] for index, part in parts) for target in (said, shares, features)
        )
        losses = {
            "own": F.cross_entropy(
                logits[:, self.own_columns],
                own_target,
                label_smoothing=self.recipe.label_smoothing if self.teacher is None else 0.0,
            ),
            "names": F.cross_entropy(logits, name_target),
        }
        if self.teacher is not None:
            losses["features"] = F.mse_loss(self.to_features(pooled), feature_target)
        return losses

    def _targets(self, rows: Tensor, labels: Tensor, view: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What images should say of our classes (B, C), of all names (B, N), and the teacher's features."""
        if self.teacher is None:
            return F.one_hot(labels, len(self.own.own)).float(), self.share[labels], torch.zeros(len(rows), 1)
        views, _, own_class = self.teacher
        features = views.features[view, rows].float()
        opinion = views.logits(features)
        said = soft_labels(opinion[:, own_class], labels, trust=self.recipe.trust)
        shares = soft_labels(opinion, own_class[labels], trust=self.recipe.trust) @ self.share
        return said, shares, features

    def _name_vectors(self, generator: torch.Generator) -> Tensor:
        chosen = int(torch.randint(len(TEMPLATES), (1,), generator=generator))
        if self.text:
            return _embed(self.clip, self.names, TEMPLATES[chosen])
        return self.frozen_names[chosen]

    def _pace(self) -> float:
        """Linear warm-up, then cosine to nothing."""
        warmup = max(1, round(self.recipe.warmup * self.total))
        if self.step < warmup:
            return (self.step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (self.step - warmup) / max(1, self.total - warmup)))

    @torch.no_grad()
    def _follow(self) -> None:
        """Exponential moving average of all weights; young averages reach less far back."""
        keep = 1 - 1 / min(max(1, self.step), max(1.0, self.recipe.ema_epochs * self.steps_per_epoch))
        for name, value in self.moving.items():
            self.average[name].lerp_(value, 1 - keep)
        self.average["logit_scale"].copy_(self.logit_scale)

    def keep(self, path: Path) -> None:
        """Write all that `restore` needs; a reader never sees half a file."""
        state = {
            "model": self.clip.model.state_dict(),
            "average": self.average,
            "to_features": self.to_features.state_dict(),
            "logit_scale": self.logit_scale.detach(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def restore(self, path: Path) -> None:
        """Go on where `keep` left off."""
        state = torch.load(path, weights_only=True)
        self.clip.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.to_features.load_state_dict(state["to_features"])
        with torch.no_grad():
            self.logit_scale.copy_(state["logit_scale"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def _share_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace gradients by their mean over all processes, if there are several."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _embed(clip: Clip, names: list[str], template: str) -> Tensor:
    return encode_text(clip.model, tokenize(clip, names, template))
