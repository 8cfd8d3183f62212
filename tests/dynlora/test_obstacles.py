"""The table in docs/models.md against every architecture that open_clip registers."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import open_clip
import pytest

from dynlora.clip import _refuse_by_config
from dynlora.errors import ModelError

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
# What the table says of a refusal, and what the refusal itself says.
WORDS = {
    "FastVit": "timm tower FastVit has .*ConvMlp",
    "ResNet vision tower": "a ResNet vision tower",
    "captioning decoder": r"a captioning decoder \(CoCa\)",
    "strip_sep_token": "a tokenizer with strip_sep_token",
    "Hugging Face text tower": r"a Hugging Face text tower \(",
}


def _rows():
    """(patterns, adapted, reason) of each row."""
    rows = re.findall(r"^\| (`.+) \| (yes|no) \| (.+) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    return [(re.findall(r"`([^`]+)`", names), adapted == "yes", reason) for names, adapted, reason in rows]


def _registered():
    """open_clip's own configurations, less what tests and we register."""
    folder = Path(open_clip.__file__).parent / "model_configs"
    return sorted(path.stem for path in folder.glob("*.json"))


def _row_of(name):
    """More than one pattern may fit; the last row does, as refusals stand below."""
    fitting = [row for row in _rows() if any(fnmatchcase(name, pattern) for pattern in row[0])]
    assert fitting, f"{name} is not in the table of docs/models.md"
    return fitting[-1]


def _check(name):
    _, is_adapted, reason = _row_of(name)
    if is_adapted:
        _refuse_by_config(name)
        return
    words = next(words for key, words in WORDS.items() if key in reason)
    with pytest.raises(ModelError, match=words):
        _refuse_by_config(name)


def test_every_registered_architecture_is_in_the_table_and_every_pattern_fits_one():
    """A new release of open_clip with new architectures fails here first."""
    names = _registered()
    assert len(names) > 100
    for name in names:
        _row_of(name)
    for patterns, _, _ in _rows():
        for pattern in patterns:
            assert any(fnmatchcase(name, pattern) for name in names), f"{pattern} fits nothing"


@pytest.mark.parametrize(
    "name",
    ["ViT-S-32", "ViT-B-16-SigLIP2", "ViT-L-14-worldwide", "PE-Core-T-16-384", "convnext_tiny",
     "MobileCLIP2-S0", "RN50", "coca_base", "ViT-L-14-CLIPA", "nllb-clip-base-siglip"],
)  # fmt: skip
def test_one_of_each_row_is_covered_or_refused_as_the_table_says(name):
    """Its blocks are looked at without making any weights."""
    _check(name)


@pytest.mark.nightly
def test_every_registered_architecture_is_covered_or_refused_as_the_table_says():
    """All of them, built on the meta device."""
    for name in _registered():
        _check(name)
