"""Write the words that learning holds in place: nouns for visible things, out of WordNet.

    python held.py WITHOUT > ../../dynlora/bundled/held_words.txt

WITHOUT is a file of names, one per line, to leave out with their plurals: those that our benchmarks ask about
without teaching them, so that they measure what nobody held.
"""

import random
import sys
from pathlib import Path

from wordnet import WordNet

COUNT = 12_000
LONGEST = 2  # words of a name


def singular(name: str) -> str:
    """Enough of one."""
    return name.lower().removesuffix("s")


def main() -> None:
    """Print the words, one per line, in alphabetical order."""
    without = {singular(line.strip()) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()}
    wordnet = WordNet()
    lemmas = {
        lemma for offset in wordnet.things() for lemma in wordnet[offset].lemmas if lemma == lemma.lower()
    }
    words = sorted(w for w in lemmas if singular(w) not in without and len(w.split()) <= LONGEST)
    print(*sorted(random.Random(0).sample(words, COUNT)), sep="\n")


if __name__ == "__main__":
    main()
