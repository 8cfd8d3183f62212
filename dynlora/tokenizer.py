"""Tokenizers other than CLIP's own: a tokenizer.json, used as open_clip's HFTokenizer uses it.

Needs the `tokenizers` package only. The text is cleaned first, as the model's config asks for.
"""

import html
import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ftfy
import tokenizers
import torch
from torch import Tensor

from dynlora.errors import ModelError

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class FileTokenizer:
    """Texts to ids, (N, context_length) int64, padded to the right.

    Attributes:
        content: the tokenizer.json it was made from.
        clean: how texts are cleaned: `canonicalize`, `lower` or `whitespace`.
        pad_id: what fills up short texts.
    """

    def __init__(self, content: str, *, context_length: int, clean: str, pad_id: int) -> None:
        if clean not in CLEANERS:
            raise ModelError(f"the config asks for cleaning {clean!r}; expected one of {', '.join(CLEANERS)}")
        self.content, self.clean, self.pad_id = content, clean, pad_id
        self.context_length = context_length
        self._tokenizer = tokenizers.Tokenizer.from_str(content)
        self._tokenizer.enable_truncation(context_length)
        self._tokenizer.enable_padding(length=context_length, pad_id=pad_id)
        self.vocabulary_size: int = max(self._tokenizer.get_vocab().values()) + 1

    def __call__(self, texts: Sequence[str] | str) -> Tensor:
        """(N, context_length); a text that is too long is cut, its end mark kept."""
        listed = [texts] if isinstance(texts, str) else texts
        cleaner = CLEANERS[self.clean]
        return torch.tensor([self._tokenizer.encode(cleaner(text)).ids for text in listed]).view(
            len(listed), self.context_length
        )


def read_tokenizer(fetch: Callable[[str], Path], text_cfg: dict[str, Any]) -> FileTokenizer:
    """The tokenizer that `text_cfg` asks for, out of tokenizer.json and tokenizer_config.json.

    Args:
        fetch: gives the path of a file by its name; raises OSError if there is none.

    Raises:
        ModelError: a file is missing or cannot be used; says which.
        OSError: `fetch` found none.
    """
    path = fetch(TOKENIZER_NAME)
    config_path = fetch(CONFIG_NAME)
    try:
        content = path.read_text(encoding="utf-8")
        config = json.loads(config_path.read_text(encoding="utf-8"))
        pad = config["pad_token"]
        pad_token = pad["content"] if isinstance(pad, dict) else pad
        pad_id = tokenizers.Tokenizer.from_str(content).token_to_id(pad_token)
        side = config.get("padding_side", "right")
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path} and {config_path} cannot be used together: {error!r}") from error
    if pad_id is None or side != "right":
        raise ModelError(
            f"{config_path} asks for padding with {pad_token!r} on the {side}; expected a token of "
            f"{path.name} and the right side"
        )
    return from_text_cfg(content, text_cfg, pad_id=pad_id)


def read_published(path: Path, text_cfg: dict[str, Any]) -> FileTokenizer:
    """The same from a version's tokenizer.json, which has padding, and cleaning before the own normalizer."""
    content = json.loads(path.read_text(encoding="utf-8"))
    own = content["normalizer"]["normalizers"][1:]
    content["normalizer"] = {"type": "Sequence", "normalizers": own}
    return from_text_cfg(json.dumps(content), text_cfg, pad_id=int(content["padding"]["pad_id"]))


def from_text_cfg(content: str, text_cfg: dict[str, Any], *, pad_id: int) -> FileTokenizer:
    """Length and cleaning are in the model's config.

    Raises:
        ModelError: it is no tokenizer.json, or knows more ids than the tower has embeddings.
    """
    clean = (text_cfg.get("tokenizer_kwargs") or {}).get("clean", "whitespace")
    try:
        tokenizer = FileTokenizer(
            content, context_length=text_cfg.get("context_length", 77), clean=clean, pad_id=pad_id
        )
    except ModelError:
        raise
    except Exception as error:  # as above
        raise ModelError(f"{TOKENIZER_NAME} cannot be used: {error}") from error
    expected = text_cfg.get("vocab_size", 49408)
    if tokenizer.vocabulary_size > expected:
        raise ModelError(
            f"{TOKENIZER_NAME} has ids up to {tokenizer.vocabulary_size - 1}, the text tower embeds "
            f"{expected}: it is another model's tokenizer"
        )
    return tokenizer


def _repair(text: str) -> str:
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def _one_space(text: str) -> str:
    return " ".join(_repair(text).split())


def _canonical(text: str) -> str:
    plain = _repair(text).replace("_", " ").translate(_NO_PUNCTUATION).lower()
    return " ".join(plain.split())


CLEANERS: dict[str, Callable[[str], str]] = {
    "canonicalize": _canonical,
    "lower": lambda text: _one_space(text).lower(),
    "whitespace": _one_space,
}
