"""A model's own tokenizer.json, adopted: the same ids as open_clip's wrapper of Hugging Face tokenizers."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from deploy.errors import ExportError
from deploy.tokenize import Tokenizer, adopt_tokenizer_json
from dynlora.errors import ModelError
from dynlora.tokenizer import read_published, read_tokenizer
from tests.deploy.test_tokenize import HOSTILE
from tests.e2e.towers import WORDS, write_tokenizer

LENGTH = 16
pytest.importorskip("transformers", reason="the reference is open_clip's wrapper of it")
texts_of_words = st.lists(st.sampled_from([*WORDS, "_", "!", "  ", "\n", "</s>", "&amp;", "İ"]), max_size=30)


@pytest.fixture(scope="module", params=["canonicalize", "lower", "whitespace"])
def clean(request):
    """How open_clip cleans the text first."""
    return request.param


@pytest.fixture(scope="module")
def three(clean, tmp_path_factory):
    """open_clip's tokenizer, the learner's and the client's, out of the same two files."""
    from open_clip.tokenizer import HFTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, 64)
    text_cfg = {"context_length": LENGTH, "vocab_size": 64, "tokenizer_kwargs": {"clean": clean}}
    learner = read_tokenizer(lambda name: directory / name, text_cfg)
    adopted = adopt_tokenizer_json(learner.content, context_length=LENGTH, clean=clean, pad_id=learner.pad_id)
    published = directory / "published.json"
    published.write_text(adopted, encoding="utf-8")
    reference = HFTokenizer(str(directory), context_length=LENGTH, clean=clean)
    return reference, learner, read_published(published, text_cfg), Tokenizer.load(published)


def _same(three, texts):
    reference, learner, published, client = three
    expected = reference(texts).tolist()
    assert learner(texts).tolist() == expected
    assert published(texts).tolist() == expected
    assert client(texts).tolist() == expected


def test_hostile_texts_become_the_same_ids_everywhere(three):
    """Mojibake, HTML, control characters, Greek capitals, texts that are too long."""
    _same(three, HOSTILE)


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.text(max_size=40), texts_of_words.map(" ".join)))
def test_any_text_becomes_the_same_ids_everywhere(three, text):
    """The learner, a version read back, the client, and open_clip with transformers."""
    _same(three, [text])


def test_the_adopted_file_says_length_padding_and_cleaning_itself(three, clean):
    """So that a program that reads it alone is right on clean text."""
    from tokenizers import Tokenizer as Plain

    written = json.loads(adopt_tokenizer_json(three[1].content, context_length=9, clean=clean, pad_id=1))
    assert written["truncation"]["max_length"] == 9
    assert written["padding"]["strategy"] == {"Fixed": 9}
    content = adopt_tokenizer_json(three[1].content, context_length=LENGTH, clean=clean, pad_id=1)
    assert Plain.from_str(content).encode("a red  shoe").ids == three[0](["a red  shoe"])[0].tolist()


def test_what_is_no_tokenizer_or_no_cleaning_is_refused(three):
    """In words that say what was expected."""
    with pytest.raises(ExportError, match=r"expected a Hugging Face tokenizer\.json"):
        adopt_tokenizer_json("{}", context_length=9, clean="lower", pad_id=1)
    with pytest.raises(ExportError, match="a cleaning of canonicalize, lower, whitespace"):
        adopt_tokenizer_json(three[1].content, context_length=9, clean="upper", pad_id=1)


@pytest.mark.parametrize(
    ("changes", "text_cfg", "words"),
    [
        ({"pad_token": "<nothing>"}, {}, "asks for padding with '<nothing>' on the right"),
        ({"padding_side": "left"}, {}, "on the left; expected"),
        ({}, {"vocab_size": 9}, "the text tower embeds 9: it is another model's tokenizer"),
        ({}, {"tokenizer_kwargs": {"clean": "upper"}}, "cleaning 'upper'"),
    ],
)
def test_files_that_do_not_fit_the_model_are_refused(tmp_path, changes, text_cfg, words):
    """Before anything is loaded."""
    write_tokenizer(tmp_path, 64)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=words):
        read_tokenizer(lambda name: tmp_path / name, {"vocab_size": 64} | text_cfg)
