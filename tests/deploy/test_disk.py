import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deploy import disk


def test_a_write_goes_on_where_the_system_took_only_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte is there, of arrays too, however little each call takes."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    with disk.new_file(tmp_path / "a") as descriptor:
        disk.write(descriptor, b"0123456789")
        disk.write(descriptor, np.arange(4, dtype=np.int32).data)
        disk.write(descriptor, b"")

    assert (tmp_path / "a").read_bytes() == b"0123456789" + np.arange(4, dtype=np.int32).tobytes()


@pytest.mark.parametrize("make", [lambda path: path.touch(), lambda path: path.symlink_to("elsewhere")])
def test_a_new_file_replaces_nothing(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Neither a file nor what a link points at."""
    make(tmp_path / "a")
    with pytest.raises(FileExistsError):
        disk.write_new(tmp_path / "a", b"new")

    assert not (tmp_path / "elsewhere").exists()


def test_a_copy_has_the_content_and_follows_no_link(tmp_path: Path) -> None:
    """Whoever may put a link in the place of a file gets nothing copied by it."""
    (tmp_path / "a").write_bytes(bytes(range(256)) * 100_000)
    (tmp_path / "link").symlink_to("a")
    disk.copy(tmp_path / "a", tmp_path / "b")
    with pytest.raises(OSError, match="symbolic links"):
        disk.copy(tmp_path / "link", tmp_path / "c")

    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) & 0o600 == 0o600
    assert not (tmp_path / "c").exists()


def test_what_is_gone_already_is_removed_where_that_is_fine(tmp_path: Path) -> None:
    """And is an error where it is not said to be."""
    disk.unlink(tmp_path / "a", missing_ok=True)
    with pytest.raises(FileNotFoundError):
        disk.unlink(tmp_path / "a")


def test_no_descriptor_is_inherited_by_another_program(tmp_path: Path) -> None:
    """A worker holds neither the daemon's lock nor its files."""
    descriptor = disk.open_file(tmp_path / "a", os.O_WRONLY | os.O_CREAT)
    try:
        assert not os.get_inheritable(descriptor)
    finally:
        os.close(descriptor)
