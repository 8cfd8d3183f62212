"""Files, folders and names as strangers send them: what is learnt from, what is set aside and why."""

import os
import struct
import zlib
from pathlib import Path


def png_header(path: Path, width: int, height: int) -> None:
    """A PNG that says how large it is and holds no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + b"\0" * 4)


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
