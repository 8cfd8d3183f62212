"""Nouns of WordNet 3.0, read from its database file (Debian: `apt install wordnet-base`)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEFAULT_PATH = Path("/usr/share/wordnet/data.noun")
PHYSICAL_ENTITY = "00001930"


@dataclass(frozen=True)
class Synset:
    """One meaning: the words for it, what it is, and the wider meanings it falls under."""

    lemmas: tuple[str, ...]
    gloss: str
    hypernyms: tuple[str, ...]  # offsets


class WordNet:
    """Synsets by offset, the eight digits that also name ImageNet's classes (n02084071 is 02084071)."""

    def __init__(self, path: Path = DEFAULT_PATH) -> None:
        """Raises SystemExit if the file is missing."""
        if not path.is_file():
            raise SystemExit(f"{path} is not there; install WordNet 3.0 (Debian: apt install wordnet-base)")
        lines = path.read_text(encoding="utf-8").splitlines()
        self.synsets = dict(_parse(line) for line in lines if not line.startswith("  "))

    def __getitem__(self, offset: str) -> Synset:
        return self.synsets[offset]

    def ancestors(self, offset: str) -> Iterator[str]:
        """Offsets of all wider meanings, nearest first, each once."""
        seen, row = {offset}, [offset]
        while row:
            row = [up for here in row for up in self.synsets[here].hypernyms if up not in seen]
            row = list(dict.fromkeys(row))
            seen.update(row)
            yield from row

    def things(self) -> list[str]:
        """Offsets of what can be seen or touched: everything under *physical entity*."""
        is_thing: dict[str, bool] = {PHYSICAL_ENTITY: True}

        def check(offset: str) -> bool:
            if offset not in is_thing:
                is_thing[offset] = False  # WordNet's graph has no cycles among nouns, but be safe
                is_thing[offset] = any(check(up) for up in self.synsets[offset].hypernyms)
            return is_thing[offset]

        return [offset for offset in self.synsets if check(offset)]


def _parse(line: str) -> tuple[str, Synset]:
    """`offset file type count(hex) {word id}… count {symbol offset pos ends}… | gloss`."""
    data, _, gloss = line.partition(" | ")
    fields = data.split()
    words = int(fields[3], 16)
    lemmas = tuple(word.replace("_", " ") for word in fields[4 : 4 + 2 * words : 2])
    pointers = fields[5 + 2 * words :]
    hypernyms = tuple(pointers[i + 1] for i in range(0, len(pointers) - 3, 4) if pointers[i] in {"@", "@i"})
    return fields[0], Synset(lemmas, gloss.split(';  "')[0].split('; "')[0].strip(), hypernyms)
