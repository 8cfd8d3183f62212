"""A zip's table of contents is a stranger's claim: it is counted before anything reads it whole."""

import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from daemon.archive import extract
from daemon.config import InboxConfig
from daemon.errors import ArchiveError

CONFIG = InboxConfig.model_validate({"max_archive_members": 1000})


def table_of(path: Path, entries: int, *, claimed: int, is_large: bool, comment: bytes = b"") -> Path:
    """A zip that is only a table of contents."""
    table = (b"PK\x01\x02" + bytes(42)) * entries
    claimed_bytes = 0xFFFFFFFF if is_large else len(table)
    end = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, claimed, claimed, claimed_bytes, 0, len(comment))
    if is_large:
        large = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, claimed, claimed, len(table), 0)
        end = large + struct.pack("<4sLQL", b"PK\x06\x07", 0, len(table), 1) + end
    path.write_bytes(table + end + comment)
    return path


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("comment", [b"", b"from a friend"])
def test_too_many_members_are_refused_before_the_table_is_read(
    tmp_path: Path, is_large: bool, comment: bytes
) -> None:
    """However few the end record claims; in next to no memory."""
    archive = table_of(tmp_path / "a.zip", 100_000, claimed=3, is_large=is_large, comment=comment)
    assert archive.stat().st_size > 4_000_000
    tracemalloc.start()
    try:
        with pytest.raises(ArchiveError, match=r"has more than 1,000 members \(inbox.max_archive_members\)"):
            extract(archive, tmp_path, config=CONFIG)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1_000_000


def test_a_table_too_large_for_memory_is_refused_unread(tmp_path: Path) -> None:
    """A file with a hole costs its sender nothing."""
    size = 300 << 20
    with (tmp_path / "a.zip").open("wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 1, 1, size, 0, 0))

    with pytest.raises(ArchiveError, match=r"its table of contents has 314,572,800 bytes, expected at most"):
        extract(tmp_path / "a.zip", tmp_path, config=CONFIG)


@pytest.mark.parametrize("kind", ["plain", "with a comment", "behind a program", "large"])
def test_tables_that_zipfile_reads_are_counted_alike(tmp_path: Path, monkeypatch, kind: str) -> None:
    """None that is in order is refused."""
    if kind == "large":
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)  # makes zipfile write the large records
    archive = tmp_path / "a.zip"
    if kind == "behind a program":
        archive.write_bytes(b"#!/bin/sh\n" * 100)
    with zipfile.ZipFile(archive, "a") as packed:
        for number in range(1000):
            packed.writestr(f"dress/{number}.png", b"x" * number)
        if kind == "with a comment":
            packed.comment = b"PK" * 1000
    (tmp_path / "out").mkdir()

    assert extract(archive, tmp_path / "out", config=CONFIG) == []
    assert len(list((tmp_path / "out" / "dress").iterdir())) == 1000
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr("one more", b"")
    with pytest.raises(ArchiveError, match="more than 1,000 members"):
        extract(archive, tmp_path / "out", config=CONFIG)
