import errno
import json
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import atomic, disk


def names(directory: Path) -> set[str]:
    """What is in a directory, hidden or not."""
    return {path.name for path in directory.iterdir()}


def test_a_written_file_has_its_content_and_mode_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    """What is written is what is read, with the asked-for rights."""
    atomic.write_file(tmp_path / "a", iter((b"one ", b"two")), mode=0o444, size_bytes=7)
    assert (tmp_path / "a").read_bytes() == b"one two"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o444
    assert names(tmp_path) == {"a"}


def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    """An error while the content is being made changes nothing."""

    def content() -> Iterator[bytes]:
        yield b"half"
        raise OSError(errno.ENOSPC, "no space left")

    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OSError, match="no space left"):
        atomic.write_file(tmp_path / "a", content())
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == {"a"}


def test_a_failed_fsync_is_not_retried_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed fsync the pages may be gone: the new file must not appear."""
    calls = []

    def refuse(descriptor: int) -> None:
        calls.append(descriptor)
        raise OSError(errno.EIO, "input/output error")

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="input/output"):
        atomic.write_file(tmp_path / "a", b"new")
    assert len(calls) == 1
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == {"a"}


def test_a_file_of_a_directory_that_is_flushed_later_is_whole_at_once_and_not_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither itself nor its directory: that is for whoever publishes all of it."""

    def fsync(_descriptor: int) -> None:
        raise AssertionError("flushed")

    monkeypatch.setattr(os, "fsync", fsync)
    atomic.write_text(tmp_path / "file", "whole", is_flushed=False)

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "whole")]


def test_json_and_text_are_utf_8_as_people_wrote_them(tmp_path: Path) -> None:
    """Names in any script stay readable in the files."""
    atomic.write_json(tmp_path / "a.json", {"name": "Bäckerei 🥐"})
    assert "Bäckerei 🥐" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"name": "Bäckerei 🥐"}


def test_json_refuses_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    """A NaN would make a file that other programs cannot read."""
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert names(tmp_path) == set()


def test_lines_appended_by_many_threads_do_not_mix(tmp_path: Path) -> None:
    """Every line is one write to the end of the file."""
    path, count = tmp_path / "events.jsonl", 50

    def append(writer: int) -> None:
        for index in range(count):
            atomic.append_line(path, json.dumps({"writer": writer, "index": index, "text": "x" * 500}))

    threads = [threading.Thread(target=append, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 4 * count
    assert [line["index"] for line in lines if line["writer"] == 2] == list(range(count))


def test_a_link_is_replaced_without_a_moment_without_it(tmp_path: Path) -> None:
    """A reader that resolves the link all the time always finds one of its targets."""
    for version in ("1", "2"):
        (tmp_path / version).mkdir()
    link, stop, missing = tmp_path / "current", threading.Event(), []
    atomic.replace_symlink(link, "1")

    def look() -> None:
        while not stop.is_set():
            if not link.is_dir():
                missing.append(True)

    reader = threading.Thread(target=look)
    reader.start()
    for index in range(100):
        atomic.replace_symlink(link, "2" if index % 2 else "1")
    stop.set()
    reader.join()
    assert not missing
    assert names(tmp_path) == {"1", "2", "current"}


def test_a_tree_is_removed_but_not_what_its_links_point_at(tmp_path: Path) -> None:
    """Removing staging must never reach outside of it."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    (tmp_path / "gone" / "deep").mkdir(parents=True)
    (tmp_path / "gone" / "deep" / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("gone", "link", "never there"):
        atomic.remove_tree(tmp_path / name)
    assert names(tmp_path) == {"kept"}
    assert (tmp_path / "kept" / "file").read_text() == "x"


def test_directories_are_made_with_their_parents_and_a_second_time(tmp_path: Path) -> None:
    """Making a directory that is there is fine; a file in its place is not."""
    atomic.make_dir(tmp_path / "a" / "b")
    atomic.make_dir(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        atomic.make_dir(tmp_path / "file")


def test_a_tree_is_flushed_files_before_their_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and every directory of a tree reaches the disk, and links out of it are left alone."""
    (tmp_path / "t" / "sub").mkdir(parents=True)
    (tmp_path / "t" / "sub" / "file").write_text("x")
    (tmp_path / "t" / "link").symlink_to("/nonexistent")
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(str(Path(f"/proc/self/fd/{fd}").readlink())))
    atomic.fsync_tree(tmp_path / "t")
    assert flushed == [str(tmp_path / "t" / "sub" / "file"), str(tmp_path / "t" / "sub"), str(tmp_path / "t")]


def test_many_files_of_a_tree_are_flushed_at_once_and_before_its_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk takes many flushes as fast as one; a failing one among them is raised."""
    files = [tmp_path / "t" / str(number) for number in range(40)]
    (tmp_path / "t").mkdir()
    for file in files:
        file.write_text("x")
    flushed: list[str] = []
    both = threading.Barrier(2, timeout=60)

    def flush(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path in files[:2]:
            both.wait()  # for each other: one after the other they would never end
        flushed.append(str(path))

    monkeypatch.setattr(os, "fsync", flush)
    atomic.fsync_tree(tmp_path / "t")
    assert sorted(flushed[:-1]) == sorted(map(str, files))
    assert flushed[-1] == str(tmp_path / "t")

    def refuse(_descriptor: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="input/output error"):
        atomic.fsync_tree(tmp_path / "t")


def test_a_rename_flushes_both_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new place reaches the disk before the old one is forgotten."""
    for name in ("from", "to"):
        (tmp_path / name).mkdir()
    (tmp_path / "from" / "x").write_text("x")
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(str(Path(f"/proc/self/fd/{fd}").readlink())))
    atomic.rename(tmp_path / "from" / "x", tmp_path / "to" / "y")
    assert flushed == [str(tmp_path / "to"), str(tmp_path / "from")]
    assert (tmp_path / "to" / "y").read_text() == "x"


def test_a_large_file_is_begun_to_be_flushed_while_it_is_written_and_flushed_whole_at_the_end(
    tmp_path, monkeypatch
):
    """Ranges without a gap, each already written; the last word is fsync's."""
    told = []
    begin, flush = disk.begin_flush, disk.fsync

    def begun(descriptor, offset, size):
        assert os.fstat(descriptor).st_size >= offset + size
        told.append((offset, size))
        begin(descriptor, offset, size)

    monkeypatch.setattr(disk, "begin_flush", begun)
    monkeypatch.setattr(disk, "fsync", lambda descriptor: (told.append("fsync"), flush(descriptor)))
    pieces = [bytes([n]) * (7 << 20) for n in range(7)]

    atomic.write_file(tmp_path / "large", (memoryview(piece) for piece in pieces))

    assert (tmp_path / "large").read_bytes() == b"".join(pieces)
    assert told == [(0, 21 << 20), (21 << 20, 21 << 20), "fsync", "fsync"]


def test_where_the_system_knows_no_such_call_files_are_written_as_ever(tmp_path, monkeypatch):
    """It is no part of POSIX."""
    monkeypatch.setattr(disk, "_sync_file_range", None)

    atomic.write_file(tmp_path / "large", (bytes(9 << 20) for _ in range(2)))

    assert (tmp_path / "large").stat().st_size == 18 << 20
