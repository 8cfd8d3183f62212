"""Room for what is about to start: two limits, told with numbers and what to do."""

import os
from pathlib import Path

import pytest

from daemon import budget
from daemon.budget import check_space, needed_bytes, needs_of_learning, used_bytes
from daemon.config import DiskConfig
from deploy.errors import StoreError
from deploy.manifest import load_manifest

NEEDS = {"the staged version": 600, "checkpoints and the delta": 400}


@pytest.fixture
def thousand_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system with a thousand bytes left, whatever this machine has."""
    monkeypatch.setattr(budget, "free_bytes", lambda path: 1000)


def test_what_fits_exactly_is_begun(tmp_path: Path, thousand_free) -> None:
    """A thousand bytes are needed and a thousand free."""
    check_space(tmp_path, DiskConfig(), NEEDS, "learn 000001-cups")


def test_what_others_are_promised_is_not_used(tmp_path: Path, thousand_free) -> None:
    """What is needed and for what, free, reserved, where the batch waits, and what to do."""
    with pytest.raises(StoreError) as refused:
        check_space(
            tmp_path, DiskConfig(reserve_bytes=1), NEEDS, "learn 000001-cups", waits="It waits in work."
        )

    said = str(refused.value)
    assert said.startswith("the disk is too full to learn 000001-cups: 1,000 bytes are needed (600 for")
    assert (
        f", 1,000 are free on the file system of {tmp_path}, of which 1 stay free (disk.reserve_bytes)."
        in said
    )
    assert "It waits in work. Free some space: `dynlora prune`" in said
    assert said.endswith(", or lower disk.reserve_bytes.")


def test_a_home_that_may_not_grow_is_not_made_to(tmp_path: Path, thousand_free) -> None:
    """The other limit, with what the home takes already."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(os.urandom(100_000))
    used = used_bytes(tmp_path)
    check_space(tmp_path, DiskConfig(max_home_bytes=used + 1000), NEEDS, "learn 000001-cups")
    with pytest.raises(StoreError, match=rf"it takes {used:,} already, and {used + 999:,} are allowed"):
        check_space(tmp_path, DiskConfig(max_home_bytes=used + 999), NEEDS, "learn 000001-cups")


def test_what_a_folder_takes_is_counted_without_following_links(tmp_path: Path) -> None:
    """Neither twice nor outside; a sparse file takes what it takes."""
    home, outside = tmp_path / "home", tmp_path / "outside"
    home.mkdir()
    outside.write_bytes(os.urandom(1_000_000))
    empty = used_bytes(home)
    (home / "link").symlink_to(outside)
    with (home / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    assert used_bytes(home) - empty < 100_000
    (home / "real").write_bytes(os.urandom(500_000))
    assert 500_000 <= used_bytes(home) - empty < 700_000


def test_learning_needs_a_version_and_as_much_again(version_dir: Path) -> None:
    """By what the live version's files take; the reserve comes on top in what a metric tells."""
    live = load_manifest(version_dir)
    size = sum(path.stat().st_size for path in version_dir.iterdir() if path.name in live.files)
    assert set(needs_of_learning(live).values()) == {size}
    assert needed_bytes(live, DiskConfig(reserve_bytes=7)) == 2 * size + 7
