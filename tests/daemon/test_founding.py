"""Class names that a store knows from the start."""

import pytest

from daemon.errors import ConfigError
from daemon.founding import read_class_names


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
