"""Text to token ids, without torch: equal to open_clip's tokenizer on every string.

Two kinds. CLIP's own, `build_tokenizer_json`: the byte-pair merging is done by the `tokenizers` library,
out of a version's tokenizer.json. Cleaning (ftfy, HTML entities, white space, lower case) and the split
into words stay here, done as open_clip does them: the library's own normalizers know other Unicode tables
and no ftfy. So a program that reads tokenizer.json alone is exact on clean text only.

Any other, `adopt_tokenizer_json`: a model's own tokenizer.json, with the length, the padding and the cleaning
that open_clip would use put in. The cleaning is recognised when the file is read, and done here as well.
"""

import html
import json
import string
from collections.abc import Callable, Mapping, Sequence
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
_SPACES: dict[str, Any] = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
_STRIP: dict[str, Any] = {"type": "Strip", "strip_left": True, "strip_right": True}
_LOWER: dict[str, Any] = {"type": "Lowercase"}
_NO_PUNCTUATION: tuple[dict[str, Any], ...] = (
    {"type": "Replace", "pattern": {"String": "_"}, "content": " "},
    {"type": "Replace", "pattern": {"Regex": f"[{regex.escape(string.punctuation)}]"}, "content": ""},
)
# How open_clip cleans text, nearly (no ftfy, no HTML), in the words of the format: the first normalizer of an
# adopted tokenizer, before the model's own.
_CLEANING: dict[str, list[dict[str, Any]]] = {
    "canonicalize": [*_NO_PUNCTUATION, _LOWER, _SPACES, _STRIP],
    "lower": [_SPACES, _STRIP, _LOWER],
    "whitespace": [_SPACES, _STRIP],
}
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


def adopt_tokenizer_json(content: str, *, context_length: int, clean: str, pad_id: int) -> str:
    """Return a model's own tokenizer.json as its versions carry it.

    Args:
        content: of the model's tokenizer.json.
        context_length: tokens per text; what is too long is cut, what is too short filled up on the right.
        clean: open_clip's name for how text is cleaned: canonicalize, lower or whitespace.
        pad_id: what fills up.

    Raises:
        ExportError: it is no tokenizer.json, or the cleaning is not one of these.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content)
        tokenizer.enable_truncation(context_length)
        tokenizer.enable_padding(
            length=context_length, pad_id=pad_id, pad_token=tokenizer.id_to_token(pad_id)
        )
        written = json.loads(tokenizer.to_str())
        own = written["normalizer"]
        cleaning = _CLEANING[clean]
    except Exception as error:  # the library raises bare Exception
        raise ExportError(
            f"this tokenizer cannot be published, cleaning text by {clean!r}: expected a Hugging Face "
            f"tokenizer.json and a cleaning of {', '.join(_CLEANING)}, found {error!r}"
        ) from error
    steps = [{"type": "Sequence", "normalizers": cleaning}, *([own] if own else [])]
    written["normalizer"] = {"type": "Sequence", "normalizers": steps}
    return json.dumps(written, ensure_ascii=False)


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
        self._clean = None
        if _may_be_adopted(self._tokenizer):  # else its 2 MB need not be read once more
            own, self._clean = _without_cleaning(json.loads(tokenizer_json))
        if self._clean is not None:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(own))
        else:
            # CLIP's own. Both steps are done in _words, as open_clip does them.
            self._tokenizer.normalizer = None
            self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
                add_prefix_space=False, use_regex=False
            )

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a version's tokenizer.json.

        Raises:
            VerifyError: neither ``build_tokenizer_json`` nor ``adopt_tokenizer_json`` wrote it.
        """
        try:
            return cls(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise VerifyError(
                f"{path} cannot be used: expected a Hugging Face tokenizer.json with truncation and padding, "
                f"found {error}. Copy or download the version again."
            ) from error

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return token ids (N, context_length); CLIP's are BOS, the text, EOT, then PAD_ID.

        A text that is too long is cut so that the end mark stays the last token.
        """
        ids = np.empty((len(texts), self.context_length), np.int64)
        for row, text in zip(ids, texts, strict=True):
            # One by one: encode_batch would start a thread pool that survives no fork.
            if self._clean is None:
                row[:] = self._tokenizer.encode(_words(text), is_pretokenized=True).ids
            else:
                row[:] = self._tokenizer.encode(self._clean(text)).ids
        return ids


def _may_be_adopted(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether the first normalizer is a sequence of its own: that of CLIP's own tokenizer never is."""
    if tokenizer.normalizer is None:
        return False
    steps = json.loads(tokenizer.normalizer.__getstate__()).get("normalizers", [])
    return bool(steps) and "normalizers" in steps[0]


def _without_cleaning(content: dict[str, Any]) -> tuple[dict[str, Any], Callable[[str], str] | None]:
    """Return an adopted tokenizer without its first normalizer, and the function to call in its place."""
    steps = (content.get("normalizer") or {}).get("normalizers", [])
    first = steps[0].get("normalizers") if steps else None
    for name, cleaning in _CLEANING.items():
        if first == cleaning:
            return content | {"normalizer": {"type": "Sequence", "normalizers": steps[1:]}}, _CLEANERS[name]
    return content, None


def _words(text: str) -> list[str]:
    """Clean a text and split it into the pieces that byte-pair merging works on."""
    words: list[str] = _SPLIT.findall(_one_space(text).lower())
    return words


def _one_space(text: str) -> str:
    """Repair a text's encoding and HTML, and leave single blanks only, as open_clip always does."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def _canonical(text: str) -> str:
    """As big_vision cleans text: no punctuation, lower case."""
    plain = _one_space(text).replace("_", " ").translate(_UNPUNCTUATED).lower()
    return " ".join(plain.split())


_UNPUNCTUATED = str.maketrans("", "", string.punctuation)
_CLEANERS: dict[str, Callable[[str], str]] = {
    "canonicalize": _canonical,
    "lower": lambda text: _one_space(text).lower(),
    "whitespace": _one_space,
}


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
