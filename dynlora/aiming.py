"""Where the text embeddings of new classes should lie, given what the model sees in their images.

A classifier of text embeddings is linear in the image embeddings. So the best place for a new class's text
can be looked for there, in D numbers a class, before any weight moves: above all other names on the class's
own images, and below the best other name on images in general, which `ImageMoments` stand for.

Shapes: N image embeddings, C new classes, S other names, D width. All embeddings are L2-normalised.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynlora.moments import ImageMoments

_STEPS = 120
_RATE = 0.02  # Adam's, on unit vectors
_DRAWN = 512  # images in general, new ones in each step


@dataclass(frozen=True)
class Aim:
    """What is wanted of the targets.

    scale: the model's logit scale; guard: weight of staying below on images in general; margin: by how many
    logits.
    """

    scale: float
    guard: float
    margin: float

    def targets(
        self,
        images: Tensor,
        labels: Tensor,
        texts: Tensor,
        others: Tensor,
        general: ImageMoments,
        generator: torch.Generator,
    ) -> Tensor:
        """Unit targets (C, D) for texts (C, D), from images (N, D), labels (N,) and other names (S, D)."""
        wanted = texts.clone().requires_grad_()
        optimizer = torch.optim.Adam([wanted], lr=_RATE)
        highest_other = torch.logsumexp(self.scale * images @ others.T, dim=1, keepdim=True)  # (N, 1)
        for step in range(_STEPS):
            optimizer.param_groups[0]["lr"] = _RATE * 0.5 * (1 + math.cos(math.pi * step / _STEPS))
            own = F.normalize(wanted, dim=-1)
            loss = F.cross_entropy(torch.cat([self.scale * images @ own.T, highest_other], 1), labels)
            loss = loss + self.guard * self._intrusion(own, others, general.draw(_DRAWN, generator))
            (wanted.grad,) = torch.autograd.grad(loss, [wanted])
            optimizer.step()
        return F.normalize(wanted.detach(), dim=-1)

    def _intrusion(self, own: Tensor, others: Tensor, drawn: Tensor) -> Tensor:
        """How far new names come up to the best other name on images in general, (drawn, D)."""
        best_other = (self.scale * drawn @ others.T).amax(1)
        new = torch.logsumexp(self.scale * drawn @ own.T, dim=1)
        return F.softplus(new - best_other + self.margin).mean()
