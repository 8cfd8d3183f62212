"""What the training images may be called: class names, synonyms, and wider words for them."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from wordnet import WordNet

TEMPLATES = (
    "a photo of a {}.",
    "{}",
    "a photo of the {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a close-up photo of a {}.",
    "a small photo of a {}.",
    "a bad photo of a {}.",
    "a cropped photo of a {}.",
)
TOO_WIDE = 0.3  # a word that covers a larger share of all classes says little about any of them
TAXONOMY = {
    "vascular plant",
    "chordate",
    "vertebrate",
    "placental",
    "eutherian",
    "tetrapod",
    "instrumentality",
}
OWN, SYNONYMS, WIDER = 0.5, 0.2, 0.3  # how a class's captions are shared out


class Names:
    """Names, N of them, and the share of each class's captions that uses each: (C, N), rows sum to 1."""

    def __init__(self, own: list[str], synonyms: list[list[str]], wider: list[list[str]]) -> None:
        """One entry per class in each list."""
        self.own = own
        everything = [*own, *(name for lists in (synonyms, wider) for names in lists for name in names)]
        self.names = list(dict.fromkeys(everything))
        column = {name: i for i, name in enumerate(self.names)}
        self.share: npt.NDArray[np.float32] = np.zeros((len(own), len(self.names)), np.float32)
        for c, name in enumerate(own):
            for names, part in (([name], OWN), (synonyms[c], SYNONYMS), (wider[c], WIDER)):
                for other in names:
                    self.share[c, column[other]] += part / len(names)
        self.share /= self.share.sum(axis=1, keepdims=True)


def plain(classes: list[str]) -> Names:
    """Nothing but the class names, for images that WordNet does not know."""
    nothing: list[list[str]] = [[] for _ in classes]
    return Names(classes, nothing, nothing)


def from_wordnet(wordnet: WordNet, own: dict[str, str | None]) -> Names:
    """Synonyms and wider words for classes: {WordNet offset: own name, or None for the first lemma}."""
    offsets = list(own)
    first = [own[offset] or wordnet[offset].lemmas[0] for offset in offsets]
    synonyms = [[lemma for lemma in wordnet[o].lemmas if lemma != first[c]] for c, o in enumerate(offsets)]
    above = [list(wordnet.ancestors(offset)) for offset in offsets]
    covered: dict[str, int] = {}
    for chain in above:
        for offset in chain:
            covered[offset] = covered.get(offset, 0) + 1

    def telling(offset: str) -> bool:
        return covered[offset] <= TOO_WIDE * len(offsets) and wordnet[offset].lemmas[0] not in TAXONOMY

    wider = [[wordnet[offset].lemmas[0] for offset in chain if telling(offset)] for chain in above]
    return Names(first, synonyms, wider)


def offsets_in(path: Path) -> dict[str, str]:
    """{class name: WordNet offset} from a JSON file whose `wnid_to_name` has ImageNet's identifiers."""
    table = json.loads(path.read_text(encoding="utf-8"))["wnid_to_name"]
    return {name: wnid.removeprefix("n") for wnid, name in table.items()}
