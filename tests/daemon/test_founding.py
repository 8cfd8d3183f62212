"""Class names and the tokenizer that a store has from the start."""

import hashlib
from pathlib import Path

import pytest

from daemon import standing_by
from daemon.errors import ConfigError
from daemon.founding import plain_tokenizer_json, read_class_names
from deploy.opening import open_tokenizer
from dynlora.clip import plain_tokenizer


def test_names_are_read_as_editors_write_them(tmp_path):
    """A byte order mark, Windows line ends, indented comments and blank lines are no names."""
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffcat\r\n  # animals above\r\n\r\n  Polar Bear \r\n".encode())

    assert [entry.name for entry in read_class_names(path)] == ["cat", "Polar Bear"]


def test_a_file_of_comments_holds_no_name(tmp_path):
    """It is refused, not taken for an empty list."""
    path = tmp_path / "classes.txt"
    path.write_text("\ufeff# nothing yet\n", encoding="utf-8")

    with pytest.raises(ConfigError, match="holds no class name"):
        read_class_names(path)


def test_a_worker_that_stands_by_has_clips_tokenizer_ready():
    """A version that carries it is opened without reading the file, which takes a tenth of a second."""
    standing_by._get_ready()
    sha256 = hashlib.sha256(plain_tokenizer_json(plain_tokenizer(77)).encode()).hexdigest()
    tokenizer = open_tokenizer(Path("nowhere"), sha256)
    assert tokenizer(["a hat"])[0, :4].tolist() == [49406, 320, 3801, 49407]
