"""Every message that docs/operations.md lists is what the code says when that is dropped."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
ROW = re.compile(r"^\| (.+?) \| (.+?) \|$", re.MULTILINE)


def listed() -> dict[str, str]:
    """What was dropped → the message, of the page's table."""
    section = PAGE.read_text().split("## What is refused, and in which words")[1].split("\n## ")[0]
    rows = dict(ROW.findall(section))
    del rows["dropped"]
    return rows


def beside_images(name: str, make: Callable[[Path], object]) -> Callable[[Any], None]:
    """A drop of a class whose one file is bad."""

    def drop(bench: Any) -> None:
        make(bench.class_folder("cup", 5) / name)

    return drop


def _cut_short(path: Path) -> None:
    path.write_bytes((path.parent / "0.png").read_bytes()[:-100])


def _batches(bench: Any) -> None:
    for name in ("one", "two"):
        bench.class_folder("cup", 4, under=bench.inbox / "all" / name)


def _too_much(bench: Any) -> None:
    import shutil

    folder = bench.class_folder("cup", 5, under=bench.home / "made")
    shutil.make_archive(str(bench.inbox / "drop"), "zip", folder.parent)


DROPS: dict[str, Callable[[Any], object]] = {
    "empty folder": lambda bench: (bench.inbox / "cup").mkdir(),
    "link": lambda bench: (bench.inbox / "cup").symlink_to(bench.home),
    "archive of another kind": lambda bench: (bench.inbox / "cup.rar").write_bytes(b"Rar!"),
    "too few images": lambda bench: bench.class_folder("cup", 2),
    "empty file": beside_images("x.png", Path.touch),
    "no image": beside_images("x.png", lambda path: path.write_bytes(b"a letter")),
    "image cut short": beside_images("x.png", _cut_short),
    "tiny image": lambda bench: bench.paint(bench.class_folder("cup", 5) / "x.png", size=(1, 1)),
    "link beside images": beside_images("x.png", lambda path: path.symlink_to("0.png")),
    "large file": beside_images("x.png", lambda path: path.write_bytes(bytes(20_000))),
    "damaged archive": lambda bench: (bench.inbox / "cup.zip").write_bytes(b"PK"),
    "archive that unpacks to too much": _too_much,
    "batches in a folder": _batches,
}


def test_every_listed_drop_is_tried() -> None:
    """And none is tried that is not listed."""
    assert listed().keys() == DROPS.keys()


@pytest.mark.parametrize("what", DROPS)
def test_a_bad_drop_is_answered_in_the_listed_words(make_bench, tmp_path: Path, what: str) -> None:
    """By the event, or among the details of reason.json or the files set aside."""
    bench = make_bench(tmp_path, max_image_bytes=10_000, max_archive_bytes=1_000)
    DROPS[what](bench)
    said = [event.message for _ in range(3) for event in bench.step(60)]
    for batch in bench.spool.ids("failed"):
        reason = bench.spool.reason(batch)
        said += [reason.reason, *reason.details]
    said += [aside.sentence for batch in bench.spool.batches() for aside in batch.set_aside]

    words = ".*".join(re.escape(part) for part in listed()[what].split("…"))
    assert any(re.fullmatch(words, sentence, re.DOTALL) for sentence in said), said
