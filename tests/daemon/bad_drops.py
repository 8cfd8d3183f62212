"""Drops that cannot be used, by the name under which docs/operations.md lists what is said about each."""

import io
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMITS: dict[str, float] = {
    "max_image_bytes": 10_000,
    "max_image_pixels": 2_000,
    "max_archive_bytes": 3_000,
    "max_archive_members": 20,
}


def beside_images(name: str, make: Callable[[Path], object]) -> Callable[[Any], None]:
    """A drop of a class whose one file is bad."""

    def drop(bench: Any) -> None:
        make(bench.class_folder("cup", 5) / name)

    return drop


def with_note(text: bytes) -> Callable[[Any], None]:
    """A batch folder with a bad batch.toml."""

    def drop(bench: Any) -> None:
        bench.class_folder("cup", 5, under=bench.inbox / "spring")
        (bench.inbox / "spring" / "batch.toml").write_bytes(text)

    return drop


def _cut_short(path: Path) -> None:
    path.write_bytes((path.parent / "0.png").read_bytes()[:-100])


def _batches(bench: Any) -> None:
    for name in ("one", "two"):
        bench.class_folder("cup", 4, under=bench.inbox / "all" / name)


def _packed(bench: Any) -> Path:
    return Path(bench.class_folder("cup", 5, under=bench.home / "made")).parent


def _too_much(bench: Any) -> None:
    made = _packed(bench)
    (made / "cup" / "notes.txt").write_bytes(os.urandom(5_000))
    shutil.make_archive(str(bench.inbox / "drop"), "zip", made)


def _too_many(bench: Any) -> None:
    with zipfile.ZipFile(bench.inbox / "drop.zip", "w") as archive:
        for number in range(30):
            archive.writestr(f"cup/{number}.txt", b"")


def _member(name: str, *, twice: bool = False, kind: bytes = tarfile.REGTYPE) -> Callable[[Any], None]:
    """An archive of good images and one bad member."""

    def drop(bench: Any) -> None:
        made = _packed(bench)
        (bench.home / "drops").mkdir()
        with tarfile.open(bench.home / "drops" / "drop.tar", "w") as archive:
            archive.add(made / "cup", "cup")
            for _ in range(1 + twice):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, "0.png"
                archive.addfile(info, io.BytesIO(b""))
        (bench.home / "drops" / "drop.tar").rename(bench.inbox / "drop.tar")

    return drop


def _changed_zip(bench: Any, offset: int, value: int) -> None:
    """One byte of its member's entry in the table of contents is another."""
    path = bench.inbox / "drop.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cup/0.png", b"x")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + offset] = value
    path.write_bytes(content)


def _encrypted(bench: Any) -> None:
    _changed_zip(bench, 8, 1)  # flags


def _of_unknown_method(bench: Any) -> None:
    _changed_zip(bench, 10, 99)  # compression method


def _same_in_two(bench: Any) -> None:
    for name in ("cup", "mug"):
        bench.class_folder(name, 5)
        bench.paint(bench.inbox / name / "x.png", seed=1)


def _exams_only(bench: Any) -> None:
    """Images that graded an earlier batch come again, and nothing else."""
    bench.class_folder("cup", 40)
    for _ in range(3):
        bench.step(60)
    record = bench.only("queued")
    for number, image in enumerate(record.split("exam")):
        (bench.inbox / "mug").mkdir(exist_ok=True)
        shutil.copy(bench.spool.path(record.id) / image.file, bench.inbox / "mug" / f"{number}.png")


def _submitted(content: str) -> Callable[[Any], None]:
    def drop(bench: Any) -> None:
        bench.class_folder("cup", 5, under=bench.inbox / "submit-0badbad0")
        (bench.inbox / "submit-0badbad0" / ".submitted.json").write_text(content)

    return drop


def _killed_each_time(bench: Any) -> None:
    from daemon.claim import read_claim, write_claim

    bench.class_folder("cup", 5)
    bench.intake.should_stop = lambda: True
    for _ in range(3):
        bench.step(60)
    directory = bench.spool.state_dir("incoming") / bench.spool.ids("incoming")[0]
    write_claim(read_claim(directory).model_copy(update={"attempts": 3}), directory)
    bench.restart()


def _twice(bench: Any) -> None:
    for name in ("cup", "again"):
        for _ in range(3):
            bench.step(60)
        for number in range(5):
            bench.paint(bench.inbox / name / "cup" / f"{number}.png", seed=number)


def _loose(bench: Any) -> None:
    bench.class_folder("cup", 5, under=bench.inbox / "spring")
    (bench.inbox / "spring" / "x.png").write_bytes(b"x")


def _hidden(name: str) -> Callable[[Any], None]:
    return lambda bench: bench.class_folder("cup", 5, under=bench.inbox / name)


DROPS: dict[str, Callable[[Any], object]] = {
    "empty folder": lambda bench: (bench.inbox / "cup").mkdir(),
    "folder with nothing but entries that are passed over": lambda bench: _only(bench, ".hidden.png"),
    "link": lambda bench: (bench.inbox / "cup").symlink_to(bench.home),
    "pipe or device": lambda bench: os.mkfifo(bench.inbox / "cup"),
    "file outside any folder": lambda bench: (bench.inbox / "cup.jpg").write_bytes(b"x"),
    "archive of another kind": lambda bench: (bench.inbox / "cup.rar").write_bytes(b"Rar!"),
    "name that is no UTF-8": lambda bench: (bench.inbox / "c\udcffp").mkdir(),
    "hidden folder": _hidden(".cups"),
    "submission cut short": _hidden(".tmp-0badbad0"),
    "folders in folders without end": lambda b: b.inbox.joinpath("cup", *["d"] * 70).mkdir(parents=True),
    "too few images": lambda bench: bench.class_folder("cup", 2),
    "no image at all": lambda bench: _only(bench, "letter.docx"),
    "images that grade already": _exams_only,
    "name without letters": lambda bench: bench.class_folder("___", 5),
    "empty file": beside_images("x.png", Path.touch),
    "no image": beside_images("x.png", lambda path: path.write_bytes(b"a letter")),
    "image cut short": beside_images("x.png", _cut_short),
    "tiny image": lambda bench: bench.paint(bench.class_folder("cup", 5) / "x.png", size=(1, 1)),
    "image of too many pixels": lambda bench: bench.paint(
        bench.class_folder("cup", 5) / "x.png", size=(100, 30)
    ),
    "large file": beside_images("x.png", lambda path: path.write_bytes(bytes(20_000))),
    "link beside images": beside_images("x.png", lambda path: path.symlink_to("0.png")),
    "pipe beside images": beside_images("x.png", os.mkfifo),
    "hidden file": beside_images(".x.png", Path.touch),
    "leftover of a system": beside_images("Thumbs.db", Path.touch),
    "file whose name is no UTF-8": beside_images("\udcff.png", Path.touch),
    "folder in a class folder": beside_images("deep", Path.mkdir),
    "batch.toml in a class folder": beside_images("batch.toml", Path.touch),
    "file beside class folders": _loose,
    "copy of an image": beside_images("x.png", lambda path: shutil.copy(path.parent / "0.png", path)),
    "image in two classes": _same_in_two,
    "the same drop again": _twice,
    "damaged archive": lambda bench: (bench.inbox / "cup.zip").write_bytes(b"PK"),
    "encrypted archive": _encrypted,
    "archive of an unknown method": _of_unknown_method,
    "archive that unpacks to too much": _too_much,
    "archive of too many members": _too_many,
    "member that leads out": _member("../cup/x.png"),
    "member with an absolute path": _member("/cup/x.png"),
    "member that is a link": _member("cup/x.png", kind=tarfile.SYMTYPE),
    "member that is a device": _member("cup/x.png", kind=tarfile.CHRTYPE),
    "member of an earlier one's name": _member("cup/x.txt", twice=True),
    "batches in a folder": _batches,
    "batch.toml with an unknown key": with_note(b'colour = "red"'),
    "batch.toml with a bad template": with_note(b'template = "a photo"'),
    "batch.toml that is no TOML": with_note(b"id ="),
    "batch.toml about a class that is not there": with_note(b'[classes.hat]\nname = "Hat"'),
    "damaged submission": _submitted("{"),
    "drop that ends the process that reads it": _killed_each_time,
}


def _only(bench: Any, name: str) -> None:
    (bench.inbox / "cup").mkdir()
    (bench.inbox / "cup" / name).write_bytes(b"x")
