"""From class names and templates to text embeddings, tokenised once and cut where that changes nothing.

CLIP's text tower is causal and pools at EOT, so tokens after it can change nothing: cutting them is exact.
A tower that looks at all tokens, as SigLIP's does, is given all of them. Knows nothing of images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynlora.blocks import text_tower
from dynlora.clip import Clip
from dynlora.errors import TaskError

DEFAULT_TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts, (N, longest), and where each one's EOT stands, (N,).

    `eot` is None where the tower looks at every token: nothing is cut then.
    """

    tokens: Tensor
    eot: Tensor | None

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, index: Tensor) -> "Prompts":
        """The prompts at `index`, cut to their own longest."""
        if self.eot is None:
            return Prompts(self.tokens[index], None)
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
    eot = last_seen(clip.model, tokens)
    if eot is None:
        return Prompts(tokens, None)
    return Prompts(tokens[:, : int(eot.max()) + 1].contiguous(), eot)


def check_distinct(prompts: Prompts, names: Sequence[str], own: int) -> None:
    """Of the first len(names) prompts, the first `own` are a task's: each must differ from all the others.

    Raises:
        TaskError: a tokenizer makes the same of two names, so that no image could ever be told the one's.
    """
    seen: dict[bytes, int] = {}
    for number, tokens in enumerate(prompts.tokens[: len(names)].cpu().numpy()):
        first = seen.setdefault(tokens.tobytes(), number)
        if first != number and first < own:
            raise TaskError(
                f"the model's tokenizer makes the same of the class names {names[first]!r} and "
                f"{names[number]!r}: it leaves out what sets them apart, or cuts it off after "
                f"{prompts.tokens.shape[1]} tokens; rename the new class"
            )


def last_seen(model: nn.Module, tokens: Tensor) -> Tensor | None:
    """(N,) where each of N prompts is pooled, if nothing after it can matter; else None.

    That takes a causal mask, and pooling at EOT: the highest token id, or the id that the tower names.
    """
    text = text_tower(model)
    pooling = getattr(text, "pool_type", None) or text.text_pool_type
    if text.attn_mask is None or pooling not in {"argmax", "eos"}:
        return None
    if pooling == "argmax":
        return tokens.argmax(dim=-1)
    eos_id = int(text.eos_id if hasattr(text, "eos_id") else text.text_eos_id)  # type: ignore[arg-type]
    return torch.eq(tokens, eos_id).int().argmax(dim=-1)


def encode_text(model: nn.Module, prompts: Prompts) -> Tensor:
    """open_clip's `encode_text(normalize=True)` on prompts: (N, dim), L2-normalised, differentiable."""
    if prompts.eot is None:
        whole: Tensor = model.encode_text(prompts.tokens, normalize=True)  # type: ignore[operator]
        return whole.float()
    text, length = text_tower(model), prompts.tokens.shape[1]
    x = text.token_embedding(prompts.tokens) + text.positional_embedding[:length]  # type: ignore[operator, index]
    x = text.transformer(x, attn_mask=text.attn_mask[:length, :length])  # type: ignore[operator, index]
    x = text.ln_final(x)[torch.arange(len(prompts)), prompts.eot]  # type: ignore[operator]
    return F.normalize(project(text, x).float(), dim=-1)


def project(text: nn.Module, pooled: Tensor) -> Tensor:
    """What a text tower pooled (N, D) → (N, dim)."""
    projection = text.text_projection
    if projection is None:
        return pooled
    projected: Tensor = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection  # type: ignore[operator]
    return projected


def generic_names() -> list[str]:
    """The fixed bank of everyday names that stands for what a pre-trained model is asked about."""
    return _lines("generic_names.txt")


def held_words() -> list[str]:
    """Nouns for visible things, out of WordNet: words that a new name may share a part with."""
    return _lines("held_words.txt")


def _lines(name: str) -> list[str]:
    text = resources.files("dynlora.bundled").joinpath(name).read_text(encoding="utf-8")
    return text.split("\n")[:-1]
