"""Programs that write into the inbox as they please: nothing half is taken, nothing is lost."""

import shutil
import subprocess
import time
import zipfile
from pathlib import Path

import pytest


def look(bench, times: int = 4) -> list[str]:
    """Enough looks at a quiet inbox for everything in it; what was said."""
    return [event.message for _ in range(times) for event in bench.step(60)]


def test_rsync_is_taken_once_and_whole(bench, tmp_path: Path) -> None:
    """It writes to hidden names and renames, sets old times at the end, and is run again afterwards."""
    if shutil.which("rsync") is None:
        pytest.skip("there is no rsync program here")
    source = bench.class_folder("cup", 6, under=tmp_path / "source")
    copy = ["rsync", "-a", str(source), str(bench.inbox)]
    subprocess.run(copy, check=True)
    look(bench)
    subprocess.run(copy, check=True)
    messages = look(bench)

    assert bench.names_and_counts(bench.spool.load("000001-cup")) == {"cup": 6}
    assert [b for state in ("queued", "failed") for b in bench.spool.ids(state)] == ["000001-cup"]
    assert messages == ["000002-cup brings the same as 000001-cup did and is not learnt again"]


def test_scp_over_a_slow_line_is_taken_once_and_whole(make_bench, tmp_path: Path) -> None:
    """It writes in place under the final names, piece by piece, and sets old times at the end."""
    if shutil.which("scp") is None:
        pytest.skip("there is no scp program here")
    bench = make_bench(tmp_path, settle_seconds=1.0, gather_seconds=1.0)
    source = tmp_path / "source" / "cup"
    for number in range(6):
        bench.paint(source / f"{number}.png", size=(120, 90))
    shell = tmp_path / "ssh"  # in the place of ssh: the other end of the line is this machine
    shell.write_text('#!/bin/sh\nfor command; do :; done\nexec sh -c "$command"\n')
    shell.chmod(0o755)
    copy = ["scp", "-O", "-r", "-p", "-l", "700", "-S", shell, source, f"there:{bench.inbox}/"]
    with subprocess.Popen(copy) as writer:
        deadline = time.monotonic() + 60
        while not bench.spool.ids("queued"):
            assert time.monotonic() < deadline
            bench.intake.step(time.monotonic())
            time.sleep(0.05)
        assert writer.poll() == 0, "it was taken before it was there"

    assert bench.names_and_counts(bench.only("queued")) == {"cup": 6}
    assert bench.only("queued").set_aside == []
    assert bench.spool.ids("failed") == []


def test_an_archive_unpacked_in_place_is_taken_when_it_is_complete(bench, tmp_path: Path) -> None:
    """Folders appear one after the other while the inbox is looked at; they are one batch in the end."""
    for name in ("cup", "hat"):
        bench.class_folder(name, 5, under=tmp_path / "made")
    packed = shutil.make_archive(str(tmp_path / "drop"), "zip", tmp_path / "made")
    with zipfile.ZipFile(packed) as archive:
        for member in archive.namelist():
            archive.extract(member, bench.inbox)
            bench.step(1)
    look(bench)

    assert bench.names_and_counts(bench.only("queued")) == {"cup": 5, "hat": 5}


def test_a_writer_that_pauses_between_its_files_is_waited_for(bench) -> None:
    """Each file comes a moment before the folder would have been quiet for long enough."""
    folder = bench.class_folder("cup", 1)
    pause = bench.config.inbox.gather_seconds * 0.9
    for number in range(1, 8):
        bench.step(pause)
        bench.paint(folder / f"{number}.png")
        assert bench.spool.ids("queued") == []
    look(bench)

    assert bench.names_and_counts(bench.only("queued")) == {"cup": 8}


def test_what_editors_and_copies_leave_is_set_aside_by_name(bench) -> None:
    """Swap files, backups and unfinished downloads are no images, and the images beside them are learnt."""
    folder = bench.class_folder("cup", 5)
    names = ("0.png~", "#1.png#", "2.png.part", "3.png.filepart", "4.png.crdownload", "notes.txt.swp")
    for name in names:
        (folder / name).write_bytes(b"half of something")
    look(bench)

    batch = bench.only("queued")
    assert bench.names_and_counts(batch) == {"cup": 5}
    assert set(bench.aside(batch)) == set(names)


def test_nothing_but_wrong_files_fails_with_each_of_them_named(bench) -> None:
    """The next drop is taken all the same."""
    for number in range(6):
        path = bench.inbox / "cup" / f"{number}.docx"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"PK a letter")
    look(bench)
    bench.class_folder("hat", 5)
    look(bench)

    (failed,) = bench.spool.ids("failed")
    told = " ".join(bench.spool.reason(failed).details)
    assert all(f"{number}.docx was set aside" in told for number in range(6))
    assert bench.names_and_counts(bench.only("queued")) == {"hat": 5}


def test_folders_renamed_while_the_inbox_is_looked_at_lose_no_image(bench) -> None:
    """Another thread renames as fast as it can; in the end every image is in one batch, once."""
    for number in range(6):
        bench.class_folder(f"class-{number}", 5)
    with bench.renaming("class-*"):
        for _ in range(30):
            bench.step(1)
    look(bench)

    hashes = [image.sha256 for name in bench.spool.ids("queued") for image in bench.spool.load(name).images]
    assert len(hashes) == len(set(hashes)) == 30
