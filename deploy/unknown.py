"""How unlike all classes that were asked about a picture is, as a probability.

A softmax over the classes alone says which of them is likeliest, never that it is none of them. So the
picture is also compared with a background: everyday names that stand for everything else. The score is the
share of the softmax that the background takes when classes and background stand side by side:

    unknown = Σ_background exp(s·cos) / (Σ_classes exp(s·cos) + Σ_background exp(s·cos))

This is the complement of NegLabel's score (Jiang and others, 2024, arXiv 2403.20078), with its way of
choosing the background: of BACKGROUND, the half that is least like any class, so that *animal* is not held
against *cat*. It costs no pass of the image tower; the background is embedded once per version. The scale s
is the one of the scores. It is a score and not a promise: near 0 the picture is like a class, near 1 like
other things, and where to draw the line is found on pictures of one's own.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Broad and plain, from many corners of life, places and textures included.
BACKGROUND = (
    "person", "crowd", "hand", "face", "animal", "bird", "fish", "insect", "dog", "horse", "tree",
    "flower", "leaf", "grass", "forest", "mountain", "beach", "sky", "cloud", "water", "river", "snow",
    "desert", "rock", "street", "building", "house", "bridge", "room", "kitchen", "office", "stairs",
    "door", "window", "wall", "car", "train", "airplane", "boat", "bicycle", "machine", "engine",
    "tool", "computer", "screen", "phone", "book", "text", "map", "drawing", "painting", "statue",
    "toy", "furniture", "lamp", "clothing", "jewellery", "musical instrument", "weapon", "food",
    "fruit", "drink", "bottle", "box", "paper", "fabric pattern", "texture", "light", "shadow",
    "darkness", "noise", "fire",
)  # fmt: skip

Float32 = NDArray[np.float32]


def choose_background(classes: Float32, background: Float32) -> NDArray[np.intp]:
    """Return the rows of ``background`` (names, dim) least like any of ``classes`` (classes, dim)."""
    likeness = (background @ classes.T).max(axis=1)
    return np.sort(np.argsort(likeness, kind="stable")[: (len(background) + 1) // 2])


def unknown_scores(class_logits: Float32, background_logits: Float32) -> list[float]:
    """Return the background's share of the softmax for each picture: (N, classes) and (N, names) to N."""
    top = np.maximum(class_logits.max(axis=1), background_logits.max(axis=1))[:, None]
    known = np.exp(class_logits - top).sum(axis=1)
    other = np.exp(background_logits - top).sum(axis=1)
    return [float(share) for share in other / (known + other)]


def rows_beside(keys: Sequence[str]) -> list[int]:
    """Return the rows of BACKGROUND whose name is not one of the classes' keys."""
    asked = set(keys)
    return [row for row, name in enumerate(BACKGROUND) if name not in asked]
