"""Where the text embeddings of new classes should lie, given what the model sees in their images.

A classifier of text embeddings is linear in the image embeddings. With the vision tower as it is, everything
about a class's images is in their embeddings, and a loss over them costs next to nothing. A new name is to
stand above all other names on its own images, and to change nothing about images in general, which
`ImageMoments` stand for: those keep the best name they had, be it another one or, where the model knew the
word before, this one.

Shapes: N image embeddings, C new classes, S other names, P draws, D width. All embeddings are L2-normalised.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dynlora.moments import ImageMoments, MixedMoments

_DRAWN = 1024  # images in general, new ones in each step
_LOOKED_AT = 8192  # of the batch's own views in a step, at most: memory grows by this times the classes


@dataclass(frozen=True)
class Aim:
    """The loss of C texts, given everything that stays as it is while they move.

    images (N, D) with labels (N,); before (C, D): the texts as they were; others (S, D): other names' texts.
    guard and keep weigh images in general: those of other names, and those that were the batch's own already.
    margin: by how many logits new names have to stay below.
    """

    images: Tensor
    labels: Tensor
    before: Tensor
    others: Tensor
    general: ImageMoments | MixedMoments
    scale: float  # the model's, of logits
    guard: float
    keep: float
    margin: float
    _among_others: Tensor = field(init=False, repr=False)  # (N, 1): log Σ exp over other names

    def __post_init__(self) -> None:
        parts = [
            torch.logsumexp(self.scale * part @ self.others.T, dim=1, keepdim=True)
            for part in torch.split(self.images, _DRAWN)
        ]
        object.__setattr__(self, "_among_others", torch.cat(parts))

    def loss(self, texts: Tensor, generator: torch.Generator) -> Tensor:
        """Of texts (C, D), differentiable."""
        images, among_others, labels = self.images, self._among_others, self.labels
        if len(images) > _LOOKED_AT:
            some = torch.randint(len(images), (_LOOKED_AT,), generator=generator)
            images, among_others, labels = images[some], among_others[some], labels[some]
        own = self.scale * images @ texts.T
        stand_out = F.cross_entropy(torch.cat([own, among_others], dim=1), labels)
        return stand_out + self._in_general(texts, generator)

    def _in_general(self, texts: Tensor, generator: torch.Generator) -> Tensor:
        drawn = self.general.draw(_DRAWN, generator)  # (P, D)
        new, other = self.scale * drawn @ texts.T, self.scale * drawn @ self.others.T
        best_before, place = (self.scale * drawn @ self.before.T).max(dim=1)
        best_other = other.amax(dim=1)
        intruding = F.softplus(torch.logsumexp(new, dim=1) - best_other + self.margin)
        rivals = torch.cat([new.scatter(1, place[:, None], float("-inf")), other], dim=1)
        losing = F.softplus(torch.logsumexp(rivals, dim=1) - new.gather(1, place[:, None])[:, 0])
        return torch.where(best_before > best_other, self.keep * losing, self.guard * intruding).mean()
