"""When two spellings are the same name, as far as learning goes."""

import re
import unicodedata


def same_name_key(name: str) -> str:
    """Case-folded and composed, with runs of space, `_` and `-` as one space."""
    # Folding can undo a composition, and composing first can hide a letter from it.
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())
    return re.sub(r"[\s_-]+", " ", folded).strip()
