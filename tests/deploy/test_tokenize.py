"""The torch-free tokenizer: the same ids as open_clip's on any text, and on clean text from the raw file."""

import html
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deploy.errors import ExportError, VerifyError
from deploy.tokenize import BOS, EOT, Tokenizer, adopt_tokenizer_json, build_tokenizer_json
from tests.e2e.towers import write_tokenizer

CONTEXT_LENGTH = 77
# First and last code point of scripts from all over the world, and of what is not a script.
SCRIPTS = {
    "ASCII": (0x20, 0x7E),
    "Latin-1": (0xA0, 0xFF),
    "Latin Extended": (0x100, 0x24F),
    "IPA": (0x250, 0x2AF),
    "Modifiers": (0x2B0, 0x2FF),
    "Combining": (0x300, 0x36F),
    "Greek": (0x370, 0x3FF),
    "Cyrillic": (0x400, 0x52F),
    "Armenian": (0x530, 0x58F),
    "Hebrew": (0x590, 0x5FF),
    "Arabic": (0x600, 0x6FF),
    "Syriac": (0x700, 0x74F),
    "Devanagari": (0x900, 0x97F),
    "Bengali": (0x980, 0x9FF),
    "Gurmukhi": (0xA00, 0xA7F),
    "Tamil": (0xB80, 0xBFF),
    "Telugu": (0xC00, 0xC7F),
    "Malayalam": (0xD00, 0xD7F),
    "Sinhala": (0xD80, 0xDFF),
    "Thai": (0xE00, 0xE7F),
    "Tibetan": (0xF00, 0xFFF),
    "Myanmar": (0x1000, 0x109F),
    "Georgian": (0x10A0, 0x10FF),
    "Hangul Jamo": (0x1100, 0x11FF),
    "Ethiopic": (0x1200, 0x137F),
    "Cherokee": (0x13A0, 0x13FF),
    "Khmer": (0x1780, 0x17FF),
    "Mongolian": (0x1800, 0x18AF),
    "Greek Extended": (0x1F00, 0x1FFF),
    "Spaces and joiners": (0x2000, 0x206F),
    "Super- and subscripts": (0x2070, 0x209F),
    "Letterlike and numbers": (0x2100, 0x218F),
    "Arrows and symbols": (0x2190, 0x27BF),
    "Circled letters": (0x2460, 0x24FF),
    "Glagolitic": (0x2C00, 0x2C5F),
    "Hiragana, Katakana": (0x3000, 0x30FF),
    "Han": (0x4E00, 0x9FFF),
    "Yi": (0xA000, 0xA4CF),
    "Hangul": (0xAC00, 0xD7A3),
    "Private use": (0xE000, 0xE0FF),
    "Ligatures, presentation forms": (0xFB00, 0xFDFF),
    "Halfwidth and specials": (0xFF00, 0xFFFF),
    "Gothic, Old Persian": (0x10330, 0x103DF),
    "Deseret": (0x10400, 0x1044F),
    "Mathematical": (0x1D400, 0x1D7FF),
    "Emoji": (0x1F300, 0x1FAFF),
    "Han extension": (0x20000, 0x200FF),
    "Tags and variation": (0xE0000, 0xE01EF),
    "Control": (0x00, 0x1F),
    "Control C1": (0x7F, 0x9F),
}
HOSTILE = [
    "",
    " ",
    " \t\n\r\x0b\x0c\x1c\x85\u00a0\u2003\u3000 ",
    "a\u200bb\u200cc\u200dd\ufeffe\u2060f",
    "tab\tnew\nline\r\nand\u2028separator\u2029end",
    "It's, they're, I've, I'm, we'll, he'd, can't -- IT'S THEY'RE",
    "it\u2019s it\u02bcs it\uff07s 'S 'ſ 'ſt",
    "&lt;b&gt; &amp;amp; &amp;lt; &nbsp; &#39; &#x1F600; &notanentity; &copy &eacute;",
    "&amp;amp;amp;lt; &#0; &#xD800; &#x110000; &#128;",
    "\x00\x01\x07\x1b[31mred\x1b[0m\x7f\x80\x9f",
    "Ã©tÃ© â€œquotedâ€\x9d naÃ¯ve ÃƒÂ©",  # mojibake that ftfy mends
    "l\u2019\u00e9t\u00e9 vs le\u0301te\u0301",
    "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪 1️⃣",
    "Straße STRASSE ẞ ß İstanbul ıI ΣΑΣ ΌΣΟΣ ǅ ﬁ ﬀ ℌ Å Ω",
    "H̸̡̪̯ͨ͊̽̅̾̎Ȩ̬̩̾͛ͪ̈́̀́͘ ̶̧̨̱̹̭̯ͧ̾ͬC̷̙̲̝͖ͭ̏ͥͮ͟Oͮ͏̮̪̝͍M̲̖͊̒ͪͩͬ̚̚͜Ȇ̴̟̟͙̞ͩ͌͝S̨̥̫͎̭ͯ̿̔̀ͅ",
    "0 1 12 1234567890 ١٢٣ ४५६ ⅷ ½ ② 三 1,000.5 3e-7 0x1F",
    "don’t—do…that！？，。「」",
    "<start_of_text>",
    "a <end_of_text> b",
    "!<start_of_text>",
    "<START_OF_TEXT> <End_Of_Text> <ſtart_of_text>",
    "<|startoftext|> <|endoftext|>",
    "a photo of a {}.",
    "http://example.org/a?b=c&d=e#f user@example.org C:\\path\\file.jpg",
    "ab" * 3000,
    "a " * 3000,
    "word " * 74 + "last one",
    "word " * 75,
    "word " * 76,
    "é" * 500,
    "你" * 400,
    "😀" * 300,
    "!" * 2000,
    "\u202eright to left\u202c \u2066isolate\u2069",
    "\ud83d\ude00 \ud800 lone \udc00",
    "a\u0345 ͅι ᾳ \u0130\u0307",
    "x\u0300" * 200,
]


@pytest.fixture(scope="module")
def reference() -> Any:
    """open_clip's tokenizer."""
    return open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)


@pytest.fixture(scope="module")
def tokenizer_path(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json as a version holds it."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    merges = sorted(reference.bpe_ranks, key=reference.bpe_ranks.__getitem__)
    path.write_text(build_tokenizer_json(reference.encoder, merges, CONTEXT_LENGTH), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    """Ours, read from the file."""
    return Tokenizer.load(tokenizer_path)


def _differing(reference: Any, ids: np.ndarray, texts: list[str]) -> list[str]:
    expected = reference(texts).numpy()

    assert expected.shape == ids.shape
    return [text for text, same in zip(texts, (expected == ids).all(axis=1), strict=True) if not same]


def _texts_of_scripts(per_script: int) -> list[str]:
    rng, texts = random.Random(7), []
    ranges = list(SCRIPTS.values())
    for first, last in ranges:
        for _ in range(per_script):
            words = ["".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 9))) for _ in "abc"]
            texts.append(rng.choice([" ", "", "  ", "'s ", "-"]).join(words))
            other = rng.choice(ranges)
            texts.append(words[0] + chr(rng.randint(*other)) + words[1] + " " + chr(rng.randint(*other)))
    return texts


def test_equals_open_clip_on_thousands_of_texts_in_fifty_scripts(
    reference: Any, tokenizer: Tokenizer
) -> None:
    """Words of every script, alone and mixed, upper case, decomposed, escaped and mis-decoded."""
    texts = _texts_of_scripts(per_script=25)
    texts += [text.upper() for text in texts[::5]] + [text.title() for text in texts[1::5]]
    texts += [unicodedata.normalize("NFD", text) for text in texts[2::5]]
    texts += [html.escape(html.escape(text)) for text in texts[3::7]]
    texts += [text.encode().decode("latin-1") for text in texts[4::7]]
    texts += [text.encode().decode("windows-1252", "replace") for text in texts[5::7]]
    differing = _differing(reference, tokenizer(texts), texts)

    print(f"{len(texts)} texts in {len(SCRIPTS)} scripts: {len(differing)} differ")
    assert len(texts) > 4000
    assert differing == []


def test_equals_open_clip_on_hostile_texts(reference: Any, tokenizer: Tokenizer) -> None:
    """White space, entities, control characters, mojibake, special tokens as text, endless words."""
    assert _differing(reference, tokenizer(HOSTILE), HOSTILE) == []


def test_equals_open_clip_on_every_character_of_the_first_planes(
    reference: Any, tokenizer: Tokenizer
) -> None:
    """Each of 65,000 code points between two letters: no table of letters, numbers or spaces differs."""
    points = [point for point in range(0x110, 0x10600) if not 0xD800 <= point < 0xE000]
    texts = ["".join(f"a{chr(point)}b " for point in points[i : i + 8]) for i in range(0, len(points), 8)]

    assert _differing(reference, tokenizer(texts), texts) == []


@settings(max_examples=300, deadline=None)
@given(st.text())
@example("\ud800")
@example("'\u017f \u017ftart")
def test_equals_open_clip_on_any_text(reference: Any, tokenizer: Tokenizer, text: str) -> None:
    """Whatever hypothesis thinks of."""
    assert _differing(reference, tokenizer([text]), [text]) == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([BOS, EOT, "'", "s", "&amp;", "<", " ", "\u200b", "é", "1", "ſ", "_", ">"])))
def test_equals_open_clip_on_special_tokens_within_words(
    reference: Any, tokenizer: Tokenizer, parts: list[str]
) -> None:
    """BOS and EOT written out in a text are special exactly where open_clip takes them so."""
    text = "".join(parts)

    assert _differing(reference, tokenizer([text]), [text]) == []


def test_long_texts_are_cut_so_that_eot_stays_last(reference: Any, tokenizer: Tokenizer) -> None:
    """A text of any length gives one row of the context length, framed by BOS and EOT."""
    row = tokenizer(["a very long text " * 500])[0]

    assert row.shape == (CONTEXT_LENGTH,)
    assert (row[0], row[-1]) == (reference.sot_token_id, reference.eot_token_id)
    assert (row[1:-1] < reference.sot_token_id).all()


def test_no_texts_give_no_rows(tokenizer: Tokenizer) -> None:
    """An empty list is answered with an empty array of the right width and type."""
    found = tokenizer([])

    assert (found.shape, found.dtype) == ((0, CONTEXT_LENGTH), np.int64)


def test_the_raw_file_is_exact_on_clean_text(reference: Any, tokenizer_path: Path) -> None:
    """A program that reads tokenizer.json alone gets open_clip's ids for ordinary captions."""
    raw = tokenizers.Tokenizer.from_file(str(tokenizer_path))
    texts = [
        "a photo of a cat.",
        "A Red T-Shirt, size 42, isn't it?",
        "Ein Foto von einem Bären über dem Fluß",
        "фото собаки",
        "一张猫的照片",
        "",
        "many words " * 60,
    ]
    ids = np.array([encoding.ids for encoding in raw.encode_batch(texts)])

    assert _differing(reference, ids, texts) == []


@pytest.mark.parametrize("length", [4, 16, 128])
def test_other_context_lengths(length: int, reference: Any) -> None:
    """The context length is in the file, not in the code."""
    merges = sorted(reference.bpe_ranks, key=reference.bpe_ranks.__getitem__)
    ours = Tokenizer(build_tokenizer_json(reference.encoder, merges, length))
    texts = ["a cat", "", "long " * 200]

    assert np.array_equal(reference(texts, context_length=length).numpy(), ours(texts))


def test_the_file_is_the_same_every_time(reference: Any, tokenizer_path: Path) -> None:
    """Equal tokenizers give equal bytes, so that its hash never changes from version to version."""
    merges = sorted(reference.bpe_ranks, key=reference.bpe_ranks.__getitem__)
    shuffled = dict(random.Random(0).sample(list(reference.encoder.items()), len(reference.encoder)))

    assert tokenizer_path.read_text() == build_tokenizer_json(shuffled, merges, CONTEXT_LENGTH)


def test_another_vocabulary_is_refused(reference: Any) -> None:
    """A tokenizer with further special tokens would be written down wrongly, so it is not."""
    merges = sorted(reference.bpe_ranks, key=reference.bpe_ranks.__getitem__)
    for encoder in ({**reference.encoder, "<mask>": 49408}, {"a": 0}):
        with pytest.raises(ExportError, match="not CLIP's: expected 49408 tokens"):
            build_tokenizer_json(encoder, merges, CONTEXT_LENGTH)


@pytest.mark.parametrize(
    ("clean", "text"),
    [("canonicalize", " Red_Shoe! "), ("lower", " RED \n shoe"), ("whitespace", " red \n shoe")],
)
def test_an_adopted_tokenizer_is_told_from_clips_own(clean: str, text: str, tmp_path: Path) -> None:
    """It cleans text as its model was taught, and splits it by itself."""
    write_tokenizer(tmp_path, 64)
    content = (tmp_path / "tokenizer.json").read_text()
    ours = Tokenizer(adopt_tokenizer_json(content, context_length=8, clean=clean, pad_id=1))
    plain = tokenizers.Tokenizer.from_str(content).encode("red shoe").ids
    assert ours([text])[0, : len(plain)].tolist() == plain


@pytest.mark.parametrize("damage", ["empty", "cut", "no truncation", "missing"])
def test_a_broken_file_is_named(damage: str, tokenizer_path: Path, tmp_path: Path) -> None:
    """The error names the file, what it should be and what to do."""
    path, content = tmp_path / "tokenizer.json", tokenizer_path.read_text()
    if damage == "no truncation":
        path.write_text(json.dumps({**json.loads(content), "truncation": None}))
    elif damage != "missing":
        path.write_text(content[:1000] if damage == "cut" else "")

    with pytest.raises(VerifyError, match=r"tokenizer\.json cannot be used: expected.*again"):
        Tokenizer.load(path)
