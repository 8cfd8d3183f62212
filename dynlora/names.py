"""When two spellings are the same name, as far as learning goes."""

import re
import unicodedata


def same_name_key(name: str) -> str:
    """Composed, case-folded, with runs of space, `_` and `-` as one space."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", name).casefold()).strip()
