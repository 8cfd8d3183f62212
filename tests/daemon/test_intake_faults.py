"""Trouble in the middle of taking in: files that leave, processes that end, a home at fault."""

import os
import signal
from pathlib import Path

import pytest

from daemon.batch import BATCH_FILE
from daemon.claim import read_claim
from daemon.compose import Known
from daemon.delivery import without
from daemon.lifecycle import Launch
from daemon.progress import LineView
from daemon.service import Service
from daemon.taking import MAX_CRASHES
from deploy.errors import StoreError


def in_child(work) -> int:
    """Run `work` in a process of its own; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def claimed(bench, **folders: int):
    """A batch that has been claimed and no further: class name → images. Its id."""
    for name, count in folders.items():
        bench.class_folder(name, count)
    bench.intake.should_stop = lambda: True
    bench.settle()
    (batch,) = bench.spool.ids("incoming")
    bench.restart()
    return batch


def delete_when_asked(bench, call: int, *names: str) -> None:
    """Delete these files at the n-th image that is looked at: the earlier ones are checked then."""
    calls = iter(range(1, 1000))

    def delete() -> bool:
        if next(calls) == call:
            for name in names:
                (source,) = bench.spool.state_dir("incoming").glob(f"*/source/{name}")
                source.unlink()
        return False

    bench.intake.should_stop = delete


def test_a_file_deleted_after_it_was_checked_is_named_and_the_others_are_learnt(bench) -> None:
    """The record says what is left, and its identity is that of the images that are there."""
    bench.class_folder("dress", 6)
    bench.class_folder("hat", 6)
    delete_when_asked(bench, 12, "dress/0.png", "dress/3.png")

    messages = bench.settle()

    batch = bench.only("queued")
    assert messages[0].startswith("000001-dress-and-1-more is queued: 10 images of dress, hat")
    assert bench.names_and_counts(batch) == {"dress": 4, "hat": 6}
    gone = "it disappeared after it was checked and before it could be moved; send it again"
    assert bench.aside(batch) == {"0.png": gone, "3.png": gone}
    assert batch.content_sha256 == without(batch, [], min_images=1).content_sha256


def test_a_class_left_with_too_few_after_the_check_is_set_aside_and_kept(bench) -> None:
    """Its other images lie where the record names them, also those that had been moved already."""
    bench.class_folder("dress", 5)
    bench.class_folder("hat", 5)
    delete_when_asked(bench, 10, "dress/3.png", "dress/4.png")

    bench.settle()

    batch = bench.only("queued")
    assert bench.names_and_counts(batch) == {"hat": 5}
    assert batch.set_aside[-1].sentence == (
        "dress was set aside: it has 3 usable images; a class needs at least 4 "
        "(inbox.min_images_per_class): add images and drop the folder again"
    )
    kept = bench.spool.path(batch.id) / "source" / "dress"
    assert sorted(path.name for path in kept.iterdir()) == ["0.png", "1.png", "2.png"]


def test_too_few_left_in_all_fails_with_the_plain_sentence(bench) -> None:
    """And no number of the operating system."""
    bench.class_folder("dress", 4)
    delete_when_asked(bench, 4, "dress/0.png")

    (message, *_) = bench.settle()

    assert message.startswith("000001-dress was not taken in: no class in it has enough usable images. ")
    assert "0.png was set aside: it disappeared" in bench.spool.reason("000001-dress").details[0]


def test_a_delivery_cut_short_goes_on_although_a_moved_class_is_too_small_now(bench) -> None:
    """batch.json is there, half the images are moved, and then files leave."""
    batch = claimed(bench, dress=5, hat=5)

    def end_after_some_moves() -> None:
        rename, left = Path.rename, [7]

        def counted(source: Path, target: Path) -> Path:
            left[0] -= source.suffix == ".png"
            if left[0] == 0:
                os._exit(7)
            return rename(source, target)

        Path.rename = counted  # type: ignore[method-assign,assignment]
        bench.step()

    assert in_child(end_after_some_moves) == 7
    directory = bench.spool.path(batch)
    for image in bench.spool.load(batch).images:
        if image.class_key == "dress" and image.split == "train":
            (directory / image.file).unlink(missing_ok=True)
            (directory / image.origin).unlink(missing_ok=True)
    bench.step()

    assert bench.names_and_counts(bench.only("queued")) == {"hat": 5}


def test_the_images_are_on_the_disk_before_the_record_of_them(bench, monkeypatch) -> None:
    """After a power cut no batch.json names a file that was never written."""
    flushed: list[str] = []
    fsync = os.fsync

    def remember(descriptor: int) -> None:
        flushed.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    bench.class_folder("dress", 5)
    monkeypatch.setattr(os, "fsync", remember)
    bench.settle()

    record = next(i for i, name in enumerate(flushed) if f".tmp-{BATCH_FILE}" in name)
    before = {Path(name).name for name in flushed[:record]}
    assert before >= {"dress", "0.png", "1.png", "2.png", "3.png", "4.png"}


def test_a_drop_that_ends_the_process_each_time_is_put_into_failed(bench) -> None:
    """A decoder that crashes takes the daemon with it; the fourth start goes on without that drop."""
    batch = claimed(bench, dress=5)
    bench.class_folder("hat", 5)

    def crash() -> None:
        bench.intake.should_stop = lambda: os.kill(os.getpid(), signal.SIGKILL) is None
        bench.step()

    for number in range(1, MAX_CRASHES + 1):
        assert in_child(crash) == -signal.SIGKILL
        assert read_claim(bench.spool.path(batch)).attempts == number
    bench.restart()
    messages = bench.settle()

    assert messages[0].startswith(
        f"{batch} was not taken in: the process that read this drop ended 3 times in a row, which one of "
        "its files may have caused; find that file and leave it out. It is kept in "
    )
    assert len(list((bench.spool.path(batch) / "source/dress").iterdir())) == 5
    assert bench.spool.ids("queued") == ["000002-hat"]


def test_a_stop_in_good_order_is_no_crash(bench) -> None:
    """However often: the count is of processes that were gone."""
    batch = claimed(bench, dress=5)

    for _ in range(MAX_CRASHES + 2):
        bench.restart()
        bench.intake.should_stop = lambda: True
        bench.step()
        assert read_claim(bench.spool.path(batch)).attempts == 0
    bench.restart()
    bench.step()

    assert bench.spool.ids("queued") == [batch]


def break_store(home: Path) -> Path:
    """A version store whose `current` points nowhere; its link."""
    (home / "serving" / "versions" / "0").mkdir(parents=True)
    (home / "serving" / "current").symlink_to("versions/7")
    return home / "serving" / "current"


@pytest.mark.parametrize("is_claimed", [True, False])
def test_a_drop_does_not_fail_for_a_fault_of_the_home(bench, caplog, is_claimed: bool) -> None:
    """`current` points nowhere: the drop is kept where it is and the trouble is told."""
    if is_claimed:
        claimed(bench, dress=5)
    else:
        bench.class_folder("dress", 5)
    current = break_store(bench.home)
    service = Service(bench.home, bench.config, view=LineView(), launch=Launch())

    for now in (0.0, 60.0):
        service.tick(now)

    assert str(current.parent) in (service.trouble or "")
    assert bench.spool.ids("failed") == []
    kept = bench.spool.path("000001-dress") / "source/dress" if is_claimed else bench.inbox / "dress"
    assert len(list(kept.iterdir())) == 5
    assert "trouble" in caplog.text
    current.unlink()
    (bench.home / "serving" / "versions" / "0").rmdir()
    bench.settle()
    assert bench.spool.ids("queued") == ["000001-dress"]


def test_what_happened_before_a_fault_of_the_home_is_told_after_it(bench) -> None:
    """The first of two drops was queued; then the version store could not be read."""
    for name in ("a", "b"):
        bench.class_folder("dress", under=bench.inbox / name)
    bench.step()
    current = bench.home / "serving" / "current"

    def known() -> Known:
        if bench.spool.ids("queued"):
            raise StoreError(f"{current} points nowhere")
        return Known()

    bench.intake.known = known
    with pytest.raises(StoreError):
        bench.step(60)
    bench.intake.known = Known

    messages = [event.message for event in [*bench.step(60), *bench.step(60)]]

    assert messages[:2] == [f"{batch} is queued: 5 images of dress" for batch in ("000001-a", "000002-b")]
