"""Whatever is dropped, in whatever order: what the user is told, and where the data is afterwards."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon import inbox, taking
from daemon.errors import InboxError


def test_class_folders_dropped_together_become_one_batch(bench) -> None:
    """Two folders, one batch, all images in place and split, the inbox empty."""
    bench.class_folder("dress", 10)
    bench.class_folder("hat", 10)

    messages = bench.settle()

    batch = bench.only("queued")
    assert messages == ["000001-dress-and-1-more is queued: 20 images of dress, hat"]
    assert bench.names_and_counts(batch) == {"dress": 10, "hat": 10}
    assert [batch.count(split) for split in ("train", "tune", "exam")] == [16, 0, 4]
    assert (batch.kind, batch.set_aside, batch.warnings) == ("folders", [], [])
    assert list(bench.inbox.iterdir()) == []
    assert bench.intake.is_idle


def test_nothing_is_taken_before_the_whole_inbox_is_quiet(bench) -> None:
    """A second folder dropped within gather_seconds joins the first."""
    bench.class_folder("dress")
    bench.step()
    bench.class_folder("hat")

    assert bench.step(9) == []
    assert not bench.intake.is_idle
    assert bench.step(9) == []
    (event,) = bench.step(1.5)
    assert event.batch == "000001-dress-and-1-more"


def test_a_batch_folder_is_taken_by_itself_with_its_note(bench) -> None:
    """batch.toml gives the id, the submitter, templates and the names to show."""
    folder = bench.inbox / "spring"
    bench.class_folder("dress", under=folder)
    bench.class_folder("n01", under=folder)
    (folder / "batch.toml").write_text(
        'id = "order-7"\nsubmitter = "Ada"\ntemplate = "a photo of a {}, a garment."\n'
        '[classes.n01]\nname = "Straw hat"\ntemplate = "a {} on a head"\n'
        '[classes.boots]\nname = "Boots"\n'
    )

    bench.settle()

    batch = bench.only("queued")
    assert (batch.id, batch.kind, batch.producer_id, batch.submitter) == (
        "000001-spring",
        "batch",
        "order-7",
        "Ada",
    )
    assert [(c.name, c.key, c.template) for c in batch.classes] == [
        ("dress", "dress", "a photo of a {}, a garment."),
        ("Straw hat", "straw hat", "a {} on a head"),
    ]
    assert batch.warnings == ["batch.toml speaks of a class 'boots', but there is no such folder beside it"]


@pytest.mark.parametrize(
    ("note", "told"),
    [
        ("id = 7", "spring/batch.toml cannot be used: id is 7; Input should be a valid string"),
        ('color = "red"', "unknown key color; the keys are id, submitter, template and classes"),
        ('template = "a photo"', "template is 'a photo'; expected exactly one {}"),
        ("id = ", "spring/batch.toml cannot be read: Invalid value"),
        ("id = " + "[" * 5000, "spring/batch.toml cannot be read: it is nested too deeply"),
        ("#" * (1 << 20) + "#", "spring/batch.toml cannot be used: it is larger than 1,048,576 bytes"),
    ],
)
def test_a_broken_note_fails_the_batch_and_says_where(bench, note: str, told: str) -> None:
    """An id that cannot be read might be one that was learnt already: nothing is guessed."""
    folder = bench.inbox / "spring"
    bench.class_folder("dress", under=folder)
    (folder / "batch.toml").write_text(note)

    (message,) = bench.settle()

    failed = bench.spool.path("000001-spring")
    assert told in message
    assert message.endswith(f"It is kept in {failed}")
    assert told in bench.spool.reason("000001-spring").reason
    assert "drop it again" in bench.spool.reason("000001-spring").what_to_do
    assert len(list((failed / "source" / "spring" / "dress").iterdir())) == 5


def test_a_folder_still_being_copied_is_left_until_it_is_complete(make_bench, tmp_path: Path) -> None:
    """A writer that takes longer than several scans loses no image."""
    bench = make_bench(tmp_path, settle_seconds=0.4, gather_seconds=0.4)
    pictures = [bench.paint(tmp_path / "there" / f"{number}.png") for number in range(15)]

    def write_slowly() -> None:
        for picture in pictures:
            content = picture.read_bytes()
            with (bench.inbox / "dress" / picture.name).open("wb") as file:
                file.write(content[:40])
                file.flush()
                time.sleep(0.04)
                file.write(content[40:])
            time.sleep(0.04)

    (bench.inbox / "dress").mkdir()
    writer = threading.Thread(target=write_slowly)
    writer.start()
    deadline = time.monotonic() + 30
    while not bench.spool.ids("queued") and time.monotonic() < deadline:
        bench.intake.step(time.monotonic())
        time.sleep(0.05)
    writer.join()

    batch = bench.only("queued")
    assert bench.names_and_counts(batch) == {"dress": 15}
    assert batch.set_aside == []


def test_a_drop_taken_back_before_the_claim_is_nothing_to_us(bench) -> None:
    """It was there at one scan and not at the next."""
    bench.class_folder("dress")
    bench.step()
    shutil.rmtree(bench.inbox / "dress")

    assert bench.step(60) == []
    assert bench.intake.is_idle


def test_batch_folders_in_a_folder_are_refused_by_name(bench) -> None:
    """One level too deep: the message says what to drop instead."""
    for batch in ("clothing", "groceries"):
        bench.class_folder("one", under=bench.inbox / "all" / batch)

    (message,) = bench.settle()

    assert "all holds no class folders but folders of class folders (clothing, groceries)" in message
    assert "drop each of these on its own" in message
    assert bench.spool.ids("failed") == ["000001-all"]


def test_a_missing_inbox_is_an_error_that_says_so(bench) -> None:
    """Not an empty inbox."""
    bench.inbox.rmdir()

    with pytest.raises(InboxError, match=r"the inbox .* cannot be read .*create it"):
        bench.step()


def test_stopping_in_the_middle_goes_on_at_the_next_start(bench) -> None:
    """Asked between two images, nothing was decided yet and nothing is lost."""
    bench.class_folder("dress", 10)
    bench.intake.should_stop = lambda: True

    assert bench.settle() == []
    assert "asked to stop" in (bench.intake.waits or "")
    assert bench.spool.ids("incoming") == ["000001-dress"]
    assert not bench.intake.is_idle

    bench.restart()
    (event,) = bench.step()
    assert event.message == "000001-dress is queued: 10 images of dress"


def test_one_bad_batch_does_not_hold_up_the_next(bench) -> None:
    """A claim that cannot be read fails its batch; the others go on."""
    bad = bench.spool.state_dir("incoming") / "000001-bad"
    bad.mkdir()
    (bad / "claim.json").write_text("{")
    bench.class_folder("dress")

    messages = bench.settle()

    assert "000001-bad was not taken in" in messages[0]
    assert messages[1] == "000002-dress is queued: 5 images of dress"


def test_the_next_look_is_when_something_can_become_ready(bench) -> None:
    """No busy waiting, no needless delay."""
    bench.step()
    assert bench.intake.seconds_to_next_scan(bench.now) == 30
    bench.class_folder("dress")
    bench.step(1)
    assert bench.intake.seconds_to_next_scan(bench.now) == 10
    bench.step(4)
    assert bench.intake.seconds_to_next_scan(bench.now) == 6
    bench.class_folder("hat", under=bench.inbox / "spring")
    bench.step(2)
    assert bench.intake.seconds_to_next_scan(bench.now) == 4
    bench.step(4)
    assert bench.intake.seconds_to_next_scan(bench.now) == 1
    bench.step(1)
    assert bench.intake.seconds_to_next_scan(bench.now) == 30


def test_folders_without_end_are_told_of_and_the_others_go_on(bench) -> None:
    """Six hundred levels in the inbox."""
    deep = bench.inbox / "deep"
    deep.joinpath(*["d"] * 300).mkdir(parents=True)
    (deep / "d" / "top").mkdir()
    bench.class_folder("dress")

    messages = bench.settle()

    assert messages[0].startswith("deep has folders nested more than 64 deep")
    assert messages[1] == "000001-dress is queued: 5 images of dress"
    assert deep.is_dir()


def test_an_item_that_cannot_be_looked_at_does_not_hide_the_others(bench, monkeypatch) -> None:
    """Whatever the file system answers."""
    bench.class_folder("bad")
    bench.class_folder("dress")
    look = inbox.surveying

    def broken(path: Path) -> Iterator[None]:
        if path.name == "bad":
            raise OSError(5, "Input/output error", str(path))
        return look(path)

    monkeypatch.setattr(inbox, "surveying", broken)

    messages = bench.settle()

    assert "bad cannot be read ([Errno 5] Input/output error" in messages[0]
    assert messages[1] == "000001-dress is queued: 5 images of dress"


def test_a_drop_that_nobody_foresaw_fails_alone(bench, monkeypatch) -> None:
    """Any error while it is read makes a failed batch and no dead daemon."""
    bench.class_folder("dress", under=bench.inbox / "spring")
    bench.class_folder("hat", under=bench.inbox / "autumn")
    read = taking.read_source

    def broken(claim, directory, *, config):
        if claim.slug == "spring":
            raise KeyError("surprise")
        return read(claim, directory, config=config)

    monkeypatch.setattr(taking, "read_source", broken)

    bench.settle()

    assert "KeyError: 'surprise'" in bench.spool.reason(bench.spool.ids("failed")[0]).reason
    assert len(bench.spool.ids("queued")) == 1


def test_what_changes_while_another_drop_is_taken_in_is_waited_for(bench, monkeypatch) -> None:
    """Ready at the look before is not ready now."""
    for name in ("a", "b"):
        bench.class_folder("dress", under=bench.inbox / name)
    first = bench.step()
    read = taking.read_source

    def slow(claim, directory, *, config):
        for name in ("a", "b"):
            if (bench.inbox / name).exists():
                bench.paint(bench.inbox / name / "dress" / "late.png")
        return read(claim, directory, config=config)

    monkeypatch.setattr(taking, "read_source", slow)

    (event,) = first + bench.step(60)

    assert event.message.endswith("is queued: 5 images of dress")
    assert [item.quiet_since for item in bench.intake.scan.items] == [bench.now]
