"""Whatever is dropped: what the user is told, and where the data is afterwards."""

import os
import shutil
import struct
import threading
import time
import zlib
from pathlib import Path

import pytest

from daemon import inbox, intake
from daemon.compose import Known, KnownClass
from daemon.errors import InboxError


def png_header(path: Path, width: int, height: int) -> None:
    """A PNG that says how large it is and holds no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + b"\0" * 4)


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


def test_an_empty_class_folder_is_told_of_and_stays(bench) -> None:
    """It may be about to be filled; once it is, it is taken."""
    (bench.inbox / "dress").mkdir()

    assert bench.settle() == ["dress is an empty folder; put at least 4 images into it"]
    assert bench.step(60) == []  # once is enough
    assert (bench.inbox / "dress").is_dir()
    assert bench.intake.is_idle

    bench.class_folder("dress")
    assert bench.settle() == ["000001-dress is queued: 5 images of dress"]


def test_an_empty_class_in_a_batch_is_set_aside_by_name(bench) -> None:
    """The other classes are learnt."""
    bench.class_folder("hat", under=bench.inbox / "spring")
    (bench.inbox / "spring" / "dress").mkdir()

    bench.settle()

    batch = bench.only("queued")
    assert bench.names_and_counts(batch) == {"hat": 5}
    (item,) = batch.set_aside
    assert item.sentence == (
        "spring/dress was set aside: it holds no file; a class needs at least 4 "
        "(inbox.min_images_per_class): add images and drop the folder again"
    )
    assert (bench.spool.path(batch.id) / "source/spring/dress").is_dir()


def test_one_image_in_a_class_is_too_few(bench) -> None:
    """Dropped alone the batch fails with that sentence; the image is kept."""
    bench.class_folder("dress", 1)

    (message,) = bench.settle()

    told = "dress was set aside: it has 1 usable image; a class needs at least 4"
    reason = bench.spool.reason("000001-dress")
    assert message.startswith(f"000001-dress was not taken in: {told}")
    assert reason.reason.startswith(told)
    assert (bench.spool.path("000001-dress") / "source/dress/0.png").is_file()
    assert bench.only("failed").classes == []
    assert bench.intake.is_idle


def test_files_that_are_no_usable_images_are_set_aside_one_by_one(bench) -> None:
    """Text called .jpg, cut short, empty, 1×1, 30,000×30,000, too many bytes, an archive among images."""
    folder = bench.class_folder("dress", 5)
    (folder / "text.jpg").write_text("not an image")
    whole = bench.paint(folder / "cut.jpg", size=(64, 64)).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    bench.paint(folder / "dot.png", size=(1, 1))
    png_header(folder / "huge.png", 30_000, 30_000)
    with (folder / "heavy.jpg").open("wb") as file:
        file.truncate(60_000_000)
    (folder / "inner.zip").write_bytes(b"PK\x05\x06" + b"\0" * 18)

    messages = bench.settle()

    batch = bench.only("queued")
    aside = bench.aside(batch)
    record = bench.spool.root / "*" / batch.id / "batch.json"
    assert messages == [
        f"000001-dress is queued: 5 images of dress; 7 set aside, named in {record}",
        *(item.sentence for item in batch.set_aside),
    ]
    assert bench.names_and_counts(batch) == {"dress": 5}
    assert "not an image" in aside["text.jpg"]
    assert "cut short" in aside["cut.jpg"]
    assert "0 bytes" in aside["empty.jpg"]
    assert "too small: 1 × 1" in aside["dot.png"]
    assert "too many pixels" in aside["huge.png"]
    assert "60,000,000 bytes, at most 50,000,000" in aside["heavy.jpg"]
    assert "not an image" in aside["inner.zip"]
    assert all("send" in reason for reason in aside.values())  # each says what to do
    assert {item.sentence.partition(" was")[0] for item in batch.set_aside} == {
        f"dress/{name}" for name in aside
    }
    directory = bench.spool.path(batch.id)
    assert {path.name for path in (directory / "source/dress").iterdir()} == set(aside)


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


def test_a_file_deleted_while_being_read_is_named(bench) -> None:
    """The others are learnt."""
    bench.class_folder("dress", 6)

    def delete_the_third() -> bool:
        third = bench.spool.state_dir("incoming") / "000001-dress/source/dress/3.png"
        third.unlink(missing_ok=True)
        return False

    bench.intake.should_stop = delete_the_third
    bench.settle()

    batch = bench.only("queued")
    assert bench.names_and_counts(batch) == {"dress": 5}
    assert bench.aside(batch) == {"3.png": "it disappeared while it was being read; send it again"}


def test_a_drop_taken_back_before_the_claim_is_nothing_to_us(bench) -> None:
    """It was there at one scan and not at the next."""
    bench.class_folder("dress")
    bench.step()
    shutil.rmtree(bench.inbox / "dress")

    assert bench.step(60) == []
    assert bench.intake.is_idle


def test_images_beside_subfolders_are_set_aside(bench) -> None:
    """The folder is a batch; a loose image in it belongs to no class."""
    bench.class_folder("dress", under=bench.inbox / "spring")
    bench.paint(bench.inbox / "spring" / "loose.png")
    bench.paint(bench.inbox / "spring" / "dress" / "deep" / "inner.png")

    bench.settle()

    batch = bench.only("queued")
    assert bench.names_and_counts(batch) == {"dress": 5}
    assert bench.aside(batch) == {
        "loose.png": "it lies beside class folders; put it into the folder of its class",
        "deep": "it is a folder inside the class folder dress; put its images directly into dress",
    }


def test_batch_folders_in_a_folder_are_refused_by_name(bench) -> None:
    """One level too deep: the message says what to drop instead."""
    for batch in ("clothing", "groceries"):
        bench.class_folder("one", under=bench.inbox / "all" / batch)

    (message,) = bench.settle()

    assert "all holds no class folders but folders of class folders (clothing, groceries)" in message
    assert "drop each of these on its own" in message
    assert bench.spool.ids("failed") == ["000001-all"]


def test_loose_files_in_the_inbox_are_told_of_and_stay(bench) -> None:
    """Once each, with what to do; they hinder nothing."""
    bench.paint(bench.inbox / "photo.png")
    (bench.inbox / "images.7z").write_bytes(b"7z")
    bench.class_folder("dress")

    messages = bench.settle()

    assert messages == [
        "images.7z is an archive of a kind that is not unpacked; use .zip, .tar, .tar.gz, .tgz",
        "photo.png lies loose in the inbox; put it into a folder named after its class",
        "000001-dress is queued: 5 images of dress",
    ]
    assert [problem.name for problem in bench.intake.problems] == ["images.7z", "photo.png"]
    assert bench.intake.is_idle
    assert {path.name for path in bench.inbox.iterdir()} == {"images.7z", "photo.png"}


def test_awkward_names_are_taken_as_they_are(bench) -> None:
    """Spaces, quotes, emoji, line breaks: shown as spelled, safe on our disk."""
    names = ["red  t-shirt", "rock 'n' \"roll\"", "🐈 cat", "two\nlines", "$(rm -rf)", "100%"]
    for name in names:
        folder = bench.class_folder(name, 4)
        (folder / "0.png").rename(folder / 'it\'s "0" 🐈\n.png')

    messages = bench.settle()

    batch = bench.only("queued")
    counts = bench.names_and_counts(batch)
    assert counts == dict.fromkeys(
        ["red t-shirt", "rock 'n' \"roll\"", "🐈 cat", "two lines", "$(rm -rf)", "100%"], 4
    )
    for entry in batch.classes:
        assert entry.folder.replace("-", "").isalnum()
        assert entry.folder.isascii()
    assert batch.set_aside == []
    shown = "$(rm -rf), 100%, red t-shirt, rock 'n' \"roll\", two lines, 🐈 cat"
    assert messages == [f"000001-rm-rf-and-5-more is queued: 24 images of {shown}"]


def test_names_with_a_leading_dot_are_told_of_and_not_learnt(bench) -> None:
    """In the inbox root they stay; in a class folder they are named in the record."""
    bench.paint(bench.inbox / ".hidden" / "0.png")
    folder = bench.class_folder("dress")
    bench.paint(folder / "._shadow.png")
    (folder / "Thumbs.db").write_bytes(b"x")

    messages = bench.settle()

    aside = bench.aside(bench.only("queued"))
    assert messages[0] == (
        ".hidden is ignored because its name starts with a dot; rename it if it was meant to be learnt, "
        "else take it out of the inbox"
    )
    assert (bench.inbox / ".hidden" / "0.png").exists()
    assert "its name starts with a dot; rename it if it was meant to be learnt" in aside["._shadow.png"]
    assert aside["Thumbs.db"].startswith("ignored")


def test_a_name_that_is_not_unicode_is_told_of_and_stays(bench) -> None:
    """It could be neither shown nor written down."""
    os.mkdir(os.fsencode(bench.inbox) + b"/caf\xe9")  # noqa: PTH102 - pathlib has no bytes
    folder = bench.class_folder("dress")
    os.rename(folder / "0.png", os.fsencode(folder) + b"/caf\xe9.png")  # noqa: PTH104 - as above

    messages = bench.settle()

    batch = bench.only("queued")
    assert messages[0] == "b'caf\\xe9' has a name that is not valid UTF-8; rename it"
    assert bench.names_and_counts(batch) == {"dress": 4}
    assert batch.set_aside[0].reason == "its name is not valid UTF-8; rename it and send it again"


def test_a_name_without_letters_is_no_class(bench) -> None:
    """Under which name should it be learnt?"""
    bench.class_folder("___")

    (message,) = bench.settle()

    assert "___ was set aside: its name has no letters or digits; give it the name of its class" in message
    assert bench.spool.ids("failed") == ["000001-batch"]


def test_links_are_never_followed(bench, tmp_path: Path) -> None:
    """A file linked from a class folder, a folder linked in the inbox: told of, not read, not lost."""
    secret = bench.paint(tmp_path / "private" / "secret.png")
    folder = bench.class_folder("dress")
    (folder / "link.png").symlink_to(secret)
    (folder / "sub").symlink_to(secret.parent)
    (bench.inbox / "private").symlink_to(secret.parent)
    (bench.inbox / "zip.zip").symlink_to(secret)

    messages = bench.settle()

    batch = bench.only("queued")
    link = "is a link, and links are never followed"
    assert messages[0].startswith(f"private {link}; put a copy of what it points to into the inbox")
    assert messages[1].startswith(f"zip.zip {link}")
    assert bench.names_and_counts(batch) == {"dress": 5}
    assert bench.aside(batch) == dict.fromkeys(
        ["link.png", "sub"], f"it {link}; send a copy of the file itself"
    )
    assert (bench.inbox / "private").is_symlink()
    assert secret.exists()


def test_pipes_and_sockets_are_not_opened(bench) -> None:
    """Opening a pipe would wait for ever."""
    folder = bench.class_folder("dress")
    os.mkfifo(folder / "pipe.jpg")
    os.mkfifo(bench.inbox / "pipe")

    messages = bench.settle()

    assert messages[0] == "pipe is neither a file nor a folder; remove it"
    assert bench.aside(bench.only("queued")) == {
        "pipe.jpg": "it is neither a file nor a folder; send an image file"
    }


def test_a_class_that_exists_already_gets_more_images(bench) -> None:
    """Under its first spelling and with its own template, in a new batch."""
    live = Known(classes={"polar bear": KnownClass("Polar Bear", "a drawing of a {}")})
    bench.intake.known = lambda: live
    bench.class_folder("polar_bear")

    bench.settle()

    batch = bench.only("queued")
    (entry,) = batch.classes
    assert (entry.name, entry.key, entry.template) == ("Polar Bear", "polar bear", "a drawing of a {}")
    assert not entry.is_new
    assert batch.warnings == ["'polar_bear' exists already, as 'Polar Bear'; this batch adds images to it"]


def test_two_spellings_in_one_batch_are_one_class(bench) -> None:
    """Same file names in both do not collide; the first spelling is shown."""
    bench.class_folder("Polar Bear", 3)
    bench.class_folder("polar_bear", 3)

    bench.settle()

    batch = bench.only("queued")
    assert bench.names_and_counts(batch) == {"Polar Bear": 6}
    assert len({image.file for image in batch.images}) == 6
    assert batch.warnings == ["'polar_bear' and 'Polar Bear' are one class, shown as 'Polar Bear'"]


def test_two_spellings_in_two_batches_are_one_class(bench) -> None:
    """Also while the first batch still waits to be learnt."""
    bench.class_folder("Polar Bear")
    bench.settle()
    bench.class_folder("POLAR-bear")
    messages = bench.settle()

    first, second = (bench.spool.load(name) for name in bench.spool.ids("queued"))
    assert first.classes[0].name == second.classes[0].name == "Polar Bear"
    assert (first.classes[0].is_new, second.classes[0].is_new) == (True, False)
    assert messages == [
        "000002-polar-bear is queued: 5 images of Polar Bear",
        "'POLAR-bear' exists already, as 'Polar Bear'; this batch adds images to it",
    ]


def test_copies_of_an_image_count_once(bench) -> None:
    """The copy is named; it counts neither for the minimum nor for the split."""
    folder = bench.class_folder("dress", 4)
    shutil.copy(folder / "0.png", folder / "copy.png")

    bench.settle()

    batch = bench.only("queued")
    assert bench.names_and_counts(batch) == {"dress": 4}
    assert bench.aside(batch) == {"copy.png": "it is a copy of 0.png, which is enough; nothing to do"}


def test_an_image_under_two_classes_teaches_neither(bench) -> None:
    """Contradictory labels are named on both sides."""
    dress, hat = bench.class_folder("dress"), bench.class_folder("hat")
    shutil.copy(dress / "0.png", hat / "same.png")

    bench.settle()

    batch = bench.only("queued")
    assert bench.names_and_counts(batch) == {"dress": 4, "hat": 5}
    assert bench.aside(batch) == {
        "0.png": "the same image is also in the class 'hat'; leave it in the right one only",
        "same.png": "the same image is also in the class 'dress'; leave it in the right one only",
    }


def test_exam_images_of_an_earlier_batch_are_not_learnt_from(bench) -> None:
    """The class dropped again with more images keeps its exam; what was learnt from never grades."""
    folder = bench.class_folder("dress", 10)
    kept = folder.parent.parent / "kept"
    shutil.copytree(folder, kept)
    bench.settle()
    shutil.copytree(kept, bench.class_folder("dress", 20), dirs_exist_ok=True)
    bench.settle()

    first, second = (bench.spool.load(name) for name in bench.spool.ids("queued"))
    graded = {image.sha256 for image in first.split("exam")}
    learnt = {image.sha256 for image in first.images} - graded
    assert graded <= {image.sha256 for image in second.images}
    assert graded <= {image.sha256 for image in second.split("exam")}
    assert not learnt & {image.sha256 for image in second.split("exam")}


def test_a_class_of_exam_images_only_is_set_aside(bench) -> None:
    """Nothing in it may be learnt from."""
    folder = bench.class_folder("dress", 20)
    kept = bench.home / "kept"
    shutil.copytree(folder, kept)
    bench.settle()
    for image in bench.only("queued").split("exam"):
        name = Path(image.origin).name
        (bench.inbox / "dress").mkdir(exist_ok=True)
        shutil.copy(kept / name, bench.inbox / "dress" / name)

    (message,) = bench.settle()

    assert "all its images already grade earlier batches, so none may be learnt from; add others" in message
    assert bench.spool.ids("failed") == ["000002-dress"]


def test_the_same_content_waiting_already_is_not_learnt_twice(bench) -> None:
    """It goes to done/ at once and names the batch that brought it."""
    folder = bench.class_folder("dress", 10)
    shutil.copytree(folder, bench.home / "kept")
    bench.settle()
    shutil.copytree(bench.home / "kept", folder)

    assert bench.settle() == [
        "000002-dress brings the same as 000001-dress did and is not learnt again",
    ]
    assert bench.only("done").duplicate_of == "000001-dress"
    assert bench.spool.ids("queued") == ["000001-dress"]


@pytest.mark.parametrize("state", ["work", "held", "done"])
def test_a_producers_id_is_learnt_once(bench, state) -> None:
    """Also with other images, and whatever became of the first."""
    for _ in range(2):
        bench.class_folder("dress", under=bench.inbox / "spring")
        (bench.inbox / "spring" / "batch.toml").write_text('id = "order-7"')
        bench.settle()
        if bench.spool.find("000001-spring") == "queued":
            bench.spool.move("000001-spring", state)

    assert bench.spool.load("000002-spring").duplicate_of == "000001-spring"
    assert bench.spool.find("000002-spring") == "done"


def test_published_batches_are_recognised_when_the_spool_has_forgotten_them(bench) -> None:
    """By the producer's id in any manifest, by content in the live lineage."""
    bench.class_folder("dress", under=bench.inbox / "spring")
    shutil.copytree(bench.inbox / "spring" / "dress", bench.home / "kept")
    (bench.inbox / "spring" / "batch.toml").write_text('id = "order-7"')
    bench.settle()
    content = bench.only("queued").content_sha256
    shutil.rmtree(bench.spool.path("000001-spring"))
    bench.intake.known = lambda: Known(
        producer_ids={"order-7": "000001-spring"},
        contents={content: "000001-spring"},
        batch_ids=["000001-spring"],
    )
    shutil.copytree(bench.home / "kept", bench.inbox / "dress")
    bench.settle()
    bench.class_folder("hat", under=bench.inbox / "autumn")
    (bench.inbox / "autumn" / "batch.toml").write_text('id = "order-7"')
    bench.settle()

    records = [bench.spool.load(name) for name in bench.spool.ids("done")]
    assert [record.id for record in records] == ["000002-dress", "000003-autumn"]
    assert {record.duplicate_of for record in records} == {"000001-spring"}


def test_a_failed_batch_may_be_dropped_again(bench) -> None:
    """Corrected, under the same id."""
    for count in (1, 5):
        bench.class_folder("dress", count, under=bench.inbox / "spring")
        (bench.inbox / "spring" / "batch.toml").write_text('id = "order-7"')
        bench.settle()

    assert (bench.spool.ids("failed"), bench.spool.ids("queued")) == (["000001-spring"], ["000002-spring"])


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
    look = inbox.tree_fingerprint

    def broken(path: Path) -> str:
        if path.name == "bad":
            raise OSError(5, "Input/output error", str(path))
        return look(path)

    monkeypatch.setattr(inbox, "tree_fingerprint", broken)

    messages = bench.settle()

    assert "bad cannot be read ([Errno 5] Input/output error" in messages[0]
    assert messages[1] == "000001-dress is queued: 5 images of dress"


def test_a_drop_that_nobody_foresaw_fails_alone(bench, monkeypatch) -> None:
    """Any error while it is read makes a failed batch and no dead daemon."""
    bench.class_folder("dress", under=bench.inbox / "spring")
    bench.class_folder("hat", under=bench.inbox / "autumn")
    read = intake.read_source

    def broken(claim, directory, *, config):
        if claim.slug == "spring":
            raise KeyError("surprise")
        return read(claim, directory, config=config)

    monkeypatch.setattr(intake, "read_source", broken)

    bench.settle()

    assert "KeyError: 'surprise'" in bench.spool.reason(bench.spool.ids("failed")[0]).reason
    assert len(bench.spool.ids("queued")) == 1


def test_what_changes_while_another_drop_is_taken_in_is_waited_for(bench, monkeypatch) -> None:
    """Ready at the look before is not ready now."""
    for name in ("a", "b"):
        bench.class_folder("dress", under=bench.inbox / name)
    first = bench.step()
    read = intake.read_source

    def slow(claim, directory, *, config):
        for name in ("a", "b"):
            if (bench.inbox / name).exists():
                bench.paint(bench.inbox / name / "dress" / "late.png")
        return read(claim, directory, config=config)

    monkeypatch.setattr(intake, "read_source", slow)

    (event,) = first + bench.step(60)

    assert event.message.endswith("is queued: 5 images of dress")
    assert [item.quiet_since for item in bench.intake.scan.items] == [bench.now]
