"""Where the text embeddings of new classes should lie, given what the model sees in their images.

A classifier of text embeddings is linear in the image embeddings. With the vision tower as it is, everything
about a class's images is in N embeddings, and a loss over them costs next to nothing: the class's text is to
stand above all other names on the class's own images, and below the best other name on images in general,
which `ImageMoments` stand for.

Shapes: N image embeddings, C new classes, S other names, D width. All embeddings are L2-normalised.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dynlora.moments import ImageMoments
from dynlora.settings import Settings

_DRAWN = 1024  # images in general, new ones in each step


class Aim:
    """The loss of C texts, given everything that stays as it is while they move."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        before: Tensor,
        others: Tensor,
        *,
        general: ImageMoments,
        scale: float,
        settings: Settings,
    ) -> None:
        """Of images (N, D) with labels (N,), other names (S, D), and the model's logit scale."""
        self.images, self.labels, self.others = images, labels, others
        self.general, self.scale = general, scale
        self.guard, self.margin = settings.guard, settings.margin
        self.keep, self.pull = settings.keep, settings.pull
        self.before = before
        self._among_others = torch.logsumexp(scale * images @ others.T, dim=1, keepdim=True)  # (N, 1)

    def loss(self, texts: Tensor, generator: torch.Generator) -> Tensor:
        """Of texts (C, D), differentiable."""
        own = self.scale * self.images @ texts.T
        stand_out = F.cross_entropy(torch.cat([own, self._among_others], dim=1), self.labels)
        return stand_out + self._in_general(texts, generator)

    def _in_general(self, texts: Tensor, generator: torch.Generator) -> Tensor:
        """Images in general keep the best name they had, be it another or one of these."""
        drawn = self.general.draw(_DRAWN, generator)
        other, new = self.scale * drawn @ self.others.T, self.scale * drawn @ texts.T
        best_before, place = (self.scale * drawn @ self.before.T).max(dim=1)
        best_other = other.amax(dim=1)
        was_own = best_before > best_other
        intrusion = F.softplus(torch.logsumexp(new, dim=1) - best_other + self.margin)
        rest = torch.cat([new.scatter(1, place[:, None], float("-inf")), other], dim=1)
        loss_of = F.softplus(torch.logsumexp(rest, dim=1) - new.gather(1, place[:, None])[:, 0])
        weight = torch.where(was_own, self.keep, self.guard)
        return (weight * torch.where(was_own, loss_of, intrusion)).mean()
