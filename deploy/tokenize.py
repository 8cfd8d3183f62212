"""Text to token ids, without torch: equal to open_clip's tokenizer on every string.

The byte-pair merging is done by the `tokenizers` library out of a version's tokenizer.json. Cleaning
(ftfy, HTML entities, white space, lower case) and the split into words stay here, done as open_clip
does them: the library's own normalizers know other Unicode tables and no ftfy. So a program that reads
tokenizer.json alone is exact on clean text only.
"""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import regex
import tokenizers
from numpy.typing import NDArray

from deploy.errors import ExportError, VerifyError

BOS = "<start_of_text>"
EOT = "<end_of_text>"
PAD_ID = 0

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_NORMALIZERS = (
    {"type": "NFC"},
    {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
    {"type": "Lowercase"},
)
_PRETOKENIZERS = (
    {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Removed", "invert": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
)
_DECODER = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
_SPLIT = regex.compile(f"{BOS}|{EOT}|{_WORDS}", regex.IGNORECASE)


def build_tokenizer_json(
    encoder: Mapping[str, int], merges: Sequence[tuple[str, str]], context_length: int
) -> str:
    """Return the Hugging Face tokenizer.json of CLIP's byte-pair encoder.

    Args:
        encoder: token to id, BOS and EOT included (open_clip's ``tokenizer.encoder``).
        merges: pairs in the order of their rank (``sorted(tokenizer.bpe_ranks, key=...get)``).
        context_length: tokens per text, BOS and EOT included.

    Raises:
        ExportError: this is not CLIP's vocabulary: 256 bytes, each also as the end of a word, one
            token per merge, BOS and EOT.
    """
    _check_is_clips(encoder, merges)
    special = {BOS: encoder[BOS], EOT: encoder[EOT]}
    pad_token = next(token for token, number in encoder.items() if number == PAD_ID)
    return json.dumps(
        {
            "version": "1.0",
            "truncation": {
                "direction": "Right",
                "max_length": context_length,
                "strategy": "LongestFirst",
                "stride": 0,
            },
            "padding": {
                "strategy": {"Fixed": context_length},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": PAD_ID,
                "pad_type_id": 0,
                "pad_token": pad_token,
            },
            "added_tokens": [_added_token(token, number) for token, number in special.items()],
            "normalizer": {"type": "Sequence", "normalizers": _NORMALIZERS},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRETOKENIZERS},
            "post_processor": _post_processor(special),
            "decoder": _DECODER,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "</w>",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": dict(sorted(encoder.items(), key=lambda item: item[1])),
                "merges": [list(pair) for pair in merges],
            },
        },
        ensure_ascii=False,
    )


def _check_is_clips(encoder: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
    expected = 2 * 256 + len(merges) + 2
    if BOS not in encoder or EOT not in encoder or len(encoder) != expected:
        raise ExportError(
            f"this tokenizer is not CLIP's: expected {expected} tokens for {len(merges)} merges, with {BOS} "
            f"and {EOT} as the only special ones, found {len(encoder)} tokens"
        )


class Tokenizer:
    """Turns texts into token ids, exactly as open_clip does; may be called from several threads."""

    def __init__(self, tokenizer_json: str) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        if not self._tokenizer.truncation or not self._tokenizer.padding:
            raise ValueError("it does not set truncation and padding to the context length")
        self.context_length = int(self._tokenizer.truncation["max_length"])
        self.vocabulary_size: int = self._tokenizer.get_vocab_size()
        # Both steps are done in _words, as open_clip does them.
        self._tokenizer.normalizer = None
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        )

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a version's tokenizer.json.

        Raises:
            VerifyError: it is not one that ``build_tokenizer_json`` wrote.
        """
        try:
            return cls(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise VerifyError(
                f"{path} cannot be used: expected a Hugging Face tokenizer.json with truncation and padding, "
                f"found {error}. Copy or download the version again."
            ) from error

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return token ids (N, context_length): BOS, the text, EOT, then PAD_ID.

        A text that is too long is cut so that EOT stays the last token.
        """
        ids = np.empty((len(texts), self.context_length), np.int64)
        for row, text in zip(ids, texts, strict=True):
            # One by one: encode_batch would start a thread pool that survives no fork.
            row[:] = self._tokenizer.encode(_words(text), is_pretokenized=True).ids
        return ids


def _words(text: str) -> list[str]:
    """Clean a text and split it into the pieces that byte-pair merging works on."""
    cleaned = html.unescape(html.unescape(ftfy.fix_text(text)))
    words: list[str] = _SPLIT.findall(" ".join(cleaned.split()).lower())
    return words


def _added_token(token: str, number: int) -> dict[str, Any]:
    return {
        "id": number,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _post_processor(special: Mapping[str, int]) -> dict[str, Any]:
    """Put BOS before and EOT after the text; truncation leaves room for both."""

    def token(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    def sequence(name: str) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": 0}}

    return {
        "type": "TemplateProcessing",
        "single": [token(BOS), sequence("A"), token(EOT)],
        "pair": [token(BOS), sequence("A"), token(EOT), sequence("B"), token(EOT)],
        "special_tokens": {
            name: {"id": name, "ids": [number], "tokens": [name]} for name, number in special.items()
        },
    }
