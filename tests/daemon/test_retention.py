"""What is deleted after its time, and what is not."""

import os
import shutil
from pathlib import Path

import pytest

from daemon.config import RetentionConfig
from daemon.retention import sweep
from deploy import atomic

WEEK = 7 * 86_400.0


def done(bench, name: str) -> Path:
    """A batch in done/ for a long time."""
    bench.settle()
    directory = bench.spool.move(name, "done")
    os.utime(directory / "batch.json", (0, 0))
    return directory


def test_what_was_never_learnt_stays(bench) -> None:
    """The images go; the folder with what was set aside does not."""
    folder = bench.class_folder("dress")
    (folder / "notes.txt").write_text("wash cold")
    directory = done(bench, "000001-dress")

    sweep(bench.home, RetentionConfig(), 2 * WEEK)

    assert not (directory / "images").exists()
    assert bench.aside(bench.spool.load("000001-dress")).keys() == {"notes.txt"}
    assert sorted(path.name for path in directory.iterdir()) == ["batch.json", "source"]


def test_a_batch_of_which_all_was_learnt_leaves_its_record_only(bench) -> None:
    """As before."""
    bench.class_folder("dress")
    directory = done(bench, "000001-dress")

    sweep(bench.home, RetentionConfig(), 2 * WEEK)

    assert [path.name for path in directory.iterdir()] == ["batch.json"]


def test_one_batch_that_cannot_be_deleted_does_not_stop_the_sweep(
    bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither does a record that cannot be read: without it nobody knows what was set aside."""
    directories = []
    for number, name in enumerate(("dress", "hat", "shoe"), 1):
        bench.class_folder(name)
        directories.append(done(bench, f"{number:06d}-{name}"))
    first, second, third = directories
    (second / "batch.json").write_text("{")
    os.utime(second / "batch.json", (0, 0))

    def remove(path: Path) -> None:
        if path.is_relative_to(first):
            raise PermissionError(13, "Permission denied", str(path))
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    monkeypatch.setattr(atomic, "remove_tree", remove)

    sweep(bench.home, RetentionConfig(), 2 * WEEK)

    assert (first / "images").is_dir()
    assert (second / "images").is_dir()
    assert not (third / "images").exists()
