"""From class names and templates to text embeddings, tokenised once and cut at the last EOT.

The text tower is causal and pools at EOT, so tokens after it can change nothing: cutting them is exact.
Knows nothing of images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynlora.clip import Clip

DEFAULT_TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts, (N, longest), and where each one's EOT stands, (N,)."""

    tokens: Tensor
    eot: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, index: Tensor) -> "Prompts":
        """The prompts at `index`, cut to their own longest."""
        eot = self.eot[index]
        return Prompts(self.tokens[index, : int(eot.max()) + 1], eot)


def tokenize(clip: Clip, names: Sequence[str], templates: Sequence[str] | str = DEFAULT_TEMPLATE) -> Prompts:
    """Fill each name into its template and tokenise.

    Args:
        names: N class names, N >= 1.
        templates: one for all, or one per name, each with one `{}`.
    """
    per_name = [templates] * len(names) if isinstance(templates, str) else templates
    tokens = clip.tokenizer([template.format(name) for template, name in zip(per_name, names, strict=True)])
    eot = tokens.argmax(dim=-1)  # EOT is the highest token id
    return Prompts(tokens[:, : int(eot.max()) + 1].contiguous(), eot)


def encode_text(model: nn.Module, prompts: Prompts) -> Tensor:
    """open_clip's `encode_text(normalize=True)` on cut prompts: (N, dim), L2-normalised, differentiable."""
    length = prompts.tokens.shape[1]
    x = model.token_embedding(prompts.tokens) + model.positional_embedding[:length]  # type: ignore[operator, index]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])  # type: ignore[operator, index]
    x = model.ln_final(x)[torch.arange(len(prompts)), prompts.eot]  # type: ignore[operator]
    projection = model.text_projection
    x = projection(x) if isinstance(projection, nn.Linear) else x @ projection
    return F.normalize(x.float(), dim=-1)


def generic_names() -> list[str]:
    """The fixed bank of everyday names that stands for what a pre-trained model knows."""
    text = resources.files("dynlora.bundled").joinpath("generic_names.txt").read_text(encoding="utf-8")
    return text.split("\n")[:-1]
