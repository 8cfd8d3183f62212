"""Taking drops out of the inbox: by whoever, on whatever file system, full or not, killed at any moment."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy import atomic, disk

DAEMON, SENDER, GROUP = 64_001, 64_002, 64_003


def in_child(work: Callable[[], None], *, uid: int | None = None) -> int:
    """Run `work` in a process of its own, as another user if asked; its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            if uid is not None:
                os.setgroups([GROUP])
                os.setresgid(GROUP, GROUP, GROUP)
                os.setresuid(uid, uid, uid)
            work()
            status = 0
        except BaseException:  # noqa: BLE001 - whatever it was, the parent must hear of it
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def shared_home() -> Iterator[Path]:
    """A home that other users can reach."""
    if os.geteuid() != 0:
        pytest.skip("needs to be root to become other users")
    home = Path(tempfile.mkdtemp(prefix="dynlora-test-"))
    home.chmod(0o755)
    yield home
    shutil.rmtree(home)


def give(path: Path, uid: int, mode: int | None = None) -> None:
    """Make a tree belong to a user."""
    for entry in [path, *path.rglob("*")]:
        os.chown(entry, uid, GROUP)
    if mode is not None:
        path.chmod(mode)


def test_a_folder_of_another_user_is_copied_and_never_taken_again(make_bench, shared_home: Path) -> None:
    """Its owner keeps it under .claimed-<id>, the record and the scan say how to be rid of it."""
    bench = make_bench(shared_home)
    give(bench.spool.root, DAEMON)
    give(shared_home, DAEMON)
    bench.inbox.chmod(0o2775)
    give(bench.class_folder("dress"), SENDER, 0o2755)

    def take_in() -> None:
        message, note = bench.settle()
        assert message == "000001-dress is queued: 5 images of dress"
        assert note.endswith(f"delete {bench.inbox}/.claimed-000001-dress when you like")
        bench.restart()
        (message,) = bench.settle()
        assert ".claimed-000001-dress was copied" in message
        assert message.endswith(f"its owner can delete it with: rm -r {bench.inbox}/.claimed-000001-dress")
        assert bench.intake.is_idle

    assert in_child(take_in, uid=DAEMON) == 0
    batch = bench.only("queued")
    parked = bench.inbox / ".claimed-000001-dress"
    assert bench.names_and_counts(batch) == {"dress": 5}
    (warning,) = batch.warnings
    assert warning == (
        f"dress belongs to uid {SENDER} and could not be moved out of the inbox, so it was copied and will "
        f"not be taken again; delete {parked} when you like"
    )
    assert len(list(parked.iterdir())) == 5


def test_where_not_even_the_name_may_change_it_is_remembered(make_bench, shared_home: Path) -> None:
    """A sticky inbox: the drop stays as it is, and is taken again only when it changes."""
    bench = make_bench(shared_home)
    give(bench.spool.root, DAEMON)
    bench.inbox.chmod(0o1777)
    folder = bench.class_folder("dress")
    give(folder, SENDER, 0o755)

    def take_in() -> None:
        bench.settle()
        for _ in range(2):
            (message,) = bench.settle()
            assert message.startswith("dress was copied, because it could not be moved out of the inbox")
            bench.restart()

    assert in_child(take_in, uid=DAEMON) == 0
    assert bench.names_and_counts(bench.only("queued")) == {"dress": 5}
    assert len(list(folder.iterdir())) == 5

    bench.paint(folder / "more.png")
    give(folder, SENDER)
    assert in_child(bench.settle, uid=DAEMON) == 0
    assert bench.spool.ids("queued") == ["000001-dress", "000002-dress"]


def test_files_that_the_daemon_may_not_read_are_named(make_bench, shared_home: Path) -> None:
    """The rest is learnt; the file is still with its owner."""
    bench = make_bench(shared_home)
    give(bench.spool.root, DAEMON)
    give(shared_home, DAEMON)
    folder = bench.class_folder("dress")
    give(folder, SENDER, 0o755)
    (folder / "0.png").chmod(0o600)

    assert in_child(bench.settle, uid=DAEMON) == 0
    batch = bench.only("queued")
    assert bench.names_and_counts(batch) == {"dress": 4}
    assert (
        "dress/0.png was not copied: permission denied; correct its rights and drop it again"
        in batch.warnings
    )
    left = bench.inbox / ".claimed-000001-dress.incomplete"
    assert (left / "0.png").exists()
    assert f"keep {left}; see what is missing in batch 000001-dress" in batch.warnings[0]
    (told,) = bench.settle()
    assert "was only partly copied, because it could not be moved out of the inbox; keep it" in told
    assert "Batch 000001-dress says what is missing" in told
    assert "rm -r" not in told


def test_a_drop_that_cannot_be_copied_at_all_is_tried_once(make_bench, shared_home: Path) -> None:
    """It stays where it is and the failed batch says why; the archive is taken again once it changes."""
    bench = make_bench(shared_home)
    give(bench.spool.root, DAEMON)
    bench.inbox.chmod(0o1777)
    archive = bench.inbox / "spring.zip"
    archive.write_bytes(b"x")
    give(archive, SENDER, 0o600)

    def take_in() -> None:
        for _ in range(3):
            bench.settle()
            bench.restart()

    assert in_child(take_in, uid=DAEMON) == 0
    reason = bench.spool.reason("000001-spring")
    assert bench.spool.ids("failed") == ["000001-spring"]
    assert reason.reason == (
        "spring.zip was not copied: permission denied; correct its rights and drop it again"
    )
    assert archive.exists()


def test_a_drop_that_something_else_holds_is_copied(bench, monkeypatch) -> None:
    """A mount point in the inbox cannot be renamed: copied, remembered, and not taken for ever."""
    folder = bench.class_folder("dress")
    rename = atomic.rename

    def busy(source: Path, target: Path) -> None:
        if source == folder:
            raise OSError(errno.EBUSY, "Device or resource busy", str(source))
        rename(source, target)

    monkeypatch.setattr(atomic, "rename", busy)
    for _ in range(3):
        bench.settle()

    assert bench.spool.ids("queued") == ["000001-dress"]
    assert bench.names_and_counts(bench.only("queued")) == {"dress": 5}
    assert folder.exists()


def test_an_inbox_that_fails_does_not_make_one_batch_after_the_other(bench, monkeypatch) -> None:
    """The drop fails once, and again only when it has changed."""
    folder = bench.class_folder("dress")
    rename = atomic.rename

    def broken(source: Path, target: Path) -> None:
        if source == folder:
            raise OSError(errno.EIO, "Input/output error", str(source))
        rename(source, target)

    monkeypatch.setattr(atomic, "rename", broken)
    for _ in range(3):
        bench.settle()

    assert bench.spool.ids("failed") == ["000001-dress"]
    assert len(list(folder.iterdir())) == 5


@pytest.mark.parametrize("call", ["mkdir", "fsync"])
def test_a_disk_that_fails_before_anything_was_taken_leaves_the_drop_where_it_is(
    bench, monkeypatch, call: str
) -> None:
    """No batch has failed by it: the trouble is the home's, and the drop is taken in once that is over."""
    folder = bench.class_folder("dress")
    real = getattr(disk, call)

    def broken(on: Any, **options: Any) -> None:
        path = Path(f"/proc/self/fd/{on}").readlink() if call == "fsync" else on
        if path.name == "source" or (call == "fsync" and (path / "source").exists()):
            raise OSError(errno.EIO, "Input/output error", str(path))
        real(on, **options)

    monkeypatch.setattr(disk, call, broken)
    with pytest.raises(OSError, match="Input/output error"):
        bench.settle()
    assert (bench.spool.ids("incoming"), bench.spool.ids("failed")) == ([], [])
    assert folder.exists()

    monkeypatch.undo()
    bench.settle()
    assert bench.spool.ids("queued") == ["000001-dress"]
    assert bench.spool.ids("failed") == []


def test_a_folder_that_cannot_be_opened_is_told_of_and_stays(make_bench, shared_home: Path) -> None:
    """What is in it cannot even be counted."""
    bench = make_bench(shared_home)
    give(bench.spool.root, DAEMON)
    give(shared_home, DAEMON)
    give(bench.class_folder("dress"), SENDER, 0o700)

    def look() -> None:
        (message,) = bench.settle()
        assert message == (
            f"dress cannot be read ({bench.inbox}/dress: permission denied); correct its rights"
        )

    assert in_child(look, uid=DAEMON) == 0
    assert (bench.inbox / "dress/0.png").exists()


def test_a_subfolder_that_keeps_its_files_is_copied_from(make_bench, shared_home: Path) -> None:
    """The drop itself may be moved, the class folder in it belongs to somebody else."""
    bench = make_bench(shared_home)
    give(bench.spool.root, DAEMON)
    give(shared_home, DAEMON)
    folder = bench.class_folder("dress", under=bench.inbox / "spring")
    give(bench.inbox / "spring", DAEMON)
    give(folder, SENDER, 0o755)

    assert in_child(bench.settle, uid=DAEMON) == 0
    assert bench.names_and_counts(bench.only("queued")) == {"dress": 5}
    assert len(list((bench.spool.path("000001-spring") / "source/spring/dress").iterdir())) == 5


def test_an_inbox_on_another_file_system_is_copied_from(make_bench, tmp_path: Path, mount_tmpfs) -> None:
    """The source is parked, so that it is not taken twice."""
    bench = make_bench(tmp_path, mount_tmpfs("elsewhere", 1 << 20))
    bench.class_folder("dress")
    (bench.class_folder("hat") / "link.png").symlink_to("/etc/passwd")

    messages = bench.settle()

    batch = bench.only("queued")
    assert messages[0].startswith(f"{batch.id} is queued: 10 images of dress, hat; 1 set aside, named in ")
    assert messages[1:] == [batch.set_aside[0].sentence, *batch.warnings]
    assert bench.names_and_counts(batch) == {"dress": 5, "hat": 5}
    assert len(batch.warnings) == 2
    assert sorted(path.name for path in bench.inbox.iterdir()) == [
        ".claimed-000001-dress-and-1-more",
        ".claimed-000001-dress-and-1-more.2",
    ]


def fill(path: Path, leave: int = 0) -> Path:
    """Use up the file system that `path` is in, but for `leave` bytes; the file to delete."""
    ballast = path / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017 - any other would be a broken test
    if leave:
        os.truncate(ballast, max(0, ballast.stat().st_size - leave))
    return ballast


@pytest.mark.parametrize("pages", range(8))
def test_a_full_disk_at_any_moment_loses_nothing(make_bench, mount_tmpfs, pages: int) -> None:
    """Whichever write fails: the drop is in the inbox or in incoming/, and taken in once there is space."""
    bench = make_bench(mount_tmpfs("disk", 1 << 20))
    bench.class_folder("dress")
    bench.class_folder("hat")
    ballast = fill(bench.home, leave=pages * 4096)

    bench.settle()

    batches = bench.spool.ids("incoming") + bench.spool.ids("queued")
    here = list(bench.inbox.rglob("*.png")) + list(bench.spool.root.rglob("*.png"))
    assert len(here) == 10
    assert len(batches) <= 1
    assert bench.spool.ids("failed") == []
    if not bench.spool.ids("queued"):
        assert "the disk is full" in (bench.intake.waits or "")
        assert "is taken in once there is space; free some" in (bench.intake.waits or "")
        assert not bench.intake.is_idle
    ballast.unlink()
    bench.settle()
    assert bench.names_and_counts(bench.only("queued")) == {"dress": 5, "hat": 5}
    assert bench.intake.waits is None


def test_the_first_page_of_a_full_disk_already_fails(make_bench, mount_tmpfs) -> None:
    """So the test above does meet full disks: with nothing left the drop stays in the inbox."""
    bench = make_bench(mount_tmpfs("disk", 1 << 20))
    bench.class_folder("dress")
    fill(bench.home)

    (message,) = bench.settle()

    assert message.startswith("the disk is full")
    assert "dress stays in the inbox and is taken in once there is space; free some" in message
    assert len(list((bench.inbox / "dress").iterdir())) == 5
    assert bench.spool.ids("incoming") == []


def test_a_disk_that_fills_up_while_copying_keeps_the_source(make_bench, tmp_path: Path, mount_tmpfs) -> None:
    """From another file system: the half copy goes, the source stays parked until it is copied whole."""
    inbox = tmp_path / "there"
    bench = make_bench(mount_tmpfs("disk", 1 << 20), inbox)
    for number in range(5):
        bench.paint(inbox / "dress" / f"{number}.png", size=(120, 120))
    ballast = fill(bench.home, leave=100_000)

    (message,) = bench.settle()

    assert message.startswith("the disk is full")
    assert len(list((inbox / ".claimed-000001-dress").iterdir())) == 5
    ballast.unlink()
    bench.restart()
    bench.step()
    assert bench.names_and_counts(bench.only("queued")) == {"dress": 5}


def test_a_disk_too_small_for_an_archive_keeps_the_archive(make_bench, mount_tmpfs) -> None:
    """The message says how much is needed; with space it is unpacked."""
    bench = make_bench(mount_tmpfs("disk", 2 << 20))
    folder = bench.class_folder("dress", 0, under=bench.home / "pictures")
    for number in range(5):
        bench.paint(folder / f"{number}.bmp", size=(200, 200))
    shutil.make_archive(str(bench.inbox / "spring"), "zip", folder)
    shutil.rmtree(folder)
    ballast = fill(bench.home, leave=300_000)

    (message,) = bench.settle()

    assert message.startswith("spring.zip needs 600,")
    assert "it is kept and unpacked once there is space: free some" in message
    assert (bench.spool.path("000001-spring") / "source/spring.zip").is_file()
    assert not list(bench.spool.root.rglob("*.bmp"))
    ballast.unlink()
    bench.step()
    assert bench.names_and_counts(bench.only("queued")) == {"spring": 5}


def test_a_drop_too_large_for_the_disk_does_not_hold_up_the_others(
    make_bench, tmp_path: Path, mount_tmpfs
) -> None:
    """It waits, told of once, parked or claimed; what fits is taken in meanwhile."""
    bench = make_bench(mount_tmpfs("disk", 1 << 20), tmp_path / "there")
    for number in range(5):
        bench.paint(bench.inbox / "dress" / f"{number}.png", size=(300, 300))
    (message,) = bench.settle()
    assert message.startswith("the disk is full")
    bench.class_folder("hat")

    assert bench.settle()[:2] == [
        ".claimed-000001-dress is being taken in; leave it as it is until that is done",
        "000002-hat is queued: 5 images of hat",
    ]
    assert bench.spool.ids("incoming") == ["000001-dress"]
    assert bench.intake.waits == message


def die_at(call: int) -> None:
    """From now on the process ends, without any clean-up, at the n-th durable step it takes."""
    left = [call]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os._exit(7)
            return function(*arguments, **keywords)

        return step

    for owner, name in [
        (os, "fsync"), (Path, "rename"), (Path, "mkdir"), (atomic, "remove_tree"),
    ]:  # fmt: skip
        setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("inbox_is", ["beside the spool", "elsewhere"])
def test_killed_at_any_step_it_goes_on_and_takes_every_image_once(
    make_bench, mount_tmpfs, inbox_is: str
) -> None:
    """A class folder and an archive, moved or copied, the process gone before every single step."""
    disk = mount_tmpfs("disk", 8 << 20)
    there = disk if inbox_is == "beside the spool" else mount_tmpfs("elsewhere", 8 << 20)
    (disk / "model").mkdir()
    model = make_bench(disk / "model")
    model.class_folder("dress", 4)
    model.class_folder("hat", 4, under=model.home / "pack")
    shutil.make_archive(str(model.inbox / "pack"), "zip", model.home / "pack")
    statuses = []
    while 0 not in statuses:
        call = len(statuses)
        (disk / f"home-{call}").mkdir()
        shutil.copytree(model.inbox, there / f"inbox-{call}")
        bench = make_bench(disk / f"home-{call}", there / f"inbox-{call}")

        def take_in(bench=bench, call=call) -> None:
            die_at(call)
            bench.settle()

        statuses.append(in_child(take_in))
        bench.restart()
        bench.spool.recover()
        bench.settle()

        batches = [bench.spool.load(name) for name in bench.spool.ids("queued")]
        counts = sorted(str(bench.names_and_counts(batch)) for batch in batches)
        assert counts == ["{'dress': 4}", "{'hat': 4}"], f"killed before step {call}"
        assert [bench.spool.ids(state) for state in ("incoming", "failed", "done")] == [[], [], []]
        shutil.rmtree(bench.home)
        shutil.rmtree(bench.inbox)
    assert set(statuses) == {0, 7}
    assert len(statuses) > 40
