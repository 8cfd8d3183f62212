"""What counts as arrived completely: a pure decision over two scans and a clock."""

from pathlib import Path

import pytest

from daemon.config import InboxConfig
from daemon.inbox import Item, Scan, archive_stem, empty_folders, ready_items, scan_inbox, tree_fingerprint

CONFIG = InboxConfig(settle_seconds=5, gather_seconds=10)


def item(
    name: str, kind: str = "folders", *, since: float = 0, mark: str | None = None, seen: str = "a"
) -> Item:
    """An item that looks like `seen` since a moment."""
    return Item(name, name, kind, mark, seen, since, arrived_ns=0)  # type: ignore[arg-type]


def ready(before: list[Item] | None, after: list[Item], now: float) -> list[list[str]]:
    """The names of the groups that are ready."""
    previous = None if before is None else Scan(tuple(before))
    return [[i.name for i in group] for group in ready_items(previous, Scan(tuple(after)), now, CONFIG)]


@pytest.mark.parametrize("kind", ["batch", "archive"])
def test_a_batch_or_archive_is_ready_when_quiet_for_settle_seconds(kind: str) -> None:
    """Each by itself, and not a moment before."""
    here = [item("a", kind), item("b", kind)]

    assert ready(here, here, 4.9) == []
    assert ready(here, here, 5.0) == [["a"], ["b"]]


def test_class_folders_are_ready_together_after_gather_seconds() -> None:
    """The youngest decides."""
    here = [item("a"), item("b", since=3)]

    assert ready(here, here, 12.9) == []
    assert ready(here, here, 13.0) == [["a", "b"]]


def test_one_scan_is_never_enough() -> None:
    """However long ago it was: what changed meanwhile is unknown."""
    here = [item("a"), item("b", "batch")]

    assert ready(None, here, 1000) == []
    assert ready([], here, 1000) == []


def test_a_change_between_two_scans_starts_the_wait_again() -> None:
    """Whatever quiet_since says."""
    assert ready([item("b", "batch", seen="x")], [item("b", "batch", seen="y")], 1000) == []


@pytest.mark.parametrize("kind", ["folders", "batch", "archive"])
def test_a_submitted_drop_is_ready_at_first_sight(kind: str) -> None:
    """It was renamed in complete, and is a batch of its own."""
    here = [item("a", kind, mark="submitted"), item("b", kind, mark="submitted")]

    assert ready(None, here, 0) == [["a"], ["b"]]


def test_a_ready_file_makes_a_folder_ready_at_first_sight() -> None:
    """Class folders that carry one are gathered; the others go on waiting."""
    here = [item("a", mark="ready"), item("b", mark="ready"), item("c"), item("d", "batch", mark="ready")]

    assert ready(None, here, 0) == [["a", "b"], ["d"]]


def test_an_empty_folder_is_waited_for_and_not_taken() -> None:
    """It may be about to become a class folder of the same batch; but not for ever."""
    young, old = [item("a"), item("e", "empty", since=8)], [item("a"), item("e", "empty")]

    assert ready(young, young, 12) == []
    assert ready(old, old, 12) == [["a"]]


def test_a_stream_of_batches_does_not_starve_class_folders() -> None:
    """Batch folders and archives are no part of the gathering."""
    here = [item("a"), item("b", "archive", since=11)]

    assert ready(here, here, 12) == [["a"]]


def test_an_empty_folder_is_mentioned_once_it_is_quiet() -> None:
    """Not while somebody may still be copying."""
    scan = Scan((item("e", "empty"), item("a")))

    assert empty_folders(scan, 9, CONFIG) == []
    assert [p.name for p in empty_folders(scan, 10, CONFIG)] == ["e"]


def test_groups_come_in_order_of_arrival(bench) -> None:
    """The first drop in is the first learnt."""
    for name in ("z", "m", "a"):
        bench.class_folder("cat", under=bench.home / name)
        (bench.home / name).rename(bench.inbox / name)
    first = scan_inbox(bench.inbox, 0)
    second = scan_inbox(bench.inbox, 60, previous=first)

    groups = ready_items(first, second, 60, CONFIG)

    assert [group[0].name for group in groups] == ["z", "m", "a"]


def test_quiet_time_is_carried_on_until_something_changes(bench) -> None:
    """A new file, a grown file, a touched file, a removed file: each starts it again."""
    folder = bench.class_folder("dress")
    scan = scan_inbox(bench.inbox, 0)
    changes = [
        lambda: bench.paint(folder / "deep" / "new.png"),
        lambda: (folder / "0.png").open("ab").write(b"x"),
        (folder / "1.png").touch,
        (folder / "2.png").unlink,
        lambda: (folder / "3.png").rename(folder / "4.png"),
    ]
    for now, change in enumerate(changes, 1):
        scan = scan_inbox(bench.inbox, now - 0.5, previous=scan)
        assert scan.items[0].quiet_since == now - 1
        change()
        scan = scan_inbox(bench.inbox, now, previous=scan)
        assert scan.items[0].quiet_since == now


def test_renaming_a_folder_leaves_its_fingerprint(bench) -> None:
    """What is in it stayed the same."""
    folder = bench.class_folder("dress")
    before = tree_fingerprint(folder)

    assert tree_fingerprint(folder.rename(bench.inbox / "robe")) == before


def test_a_drop_that_was_left_behind_is_told_of_and_not_taken(bench) -> None:
    """Until it changes: then it is something new."""
    folder = bench.class_folder("it's mine")
    left = {"it's mine": tree_fingerprint(folder)}

    scan = scan_inbox(bench.inbox, 0, left_behind=left)
    assert scan.items == ()
    assert "is not learnt again" in scan.problems[0].sentence
    assert scan.problems[0].sentence.endswith(f"""rm -r '{bench.inbox}/it'"'"'s mine'""")

    bench.paint(folder / "more.png")
    assert [i.name for i in scan_inbox(bench.inbox, 0, left_behind=left).items] == ["it's mine"]


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a.zip", "a"), ("a.b.tar.gz", "a.b"), ("A.TGZ", "A"), ("a.tar", "a"), ("a.jpg", "a.jpg")],
)
def test_an_archive_is_called_without_its_suffix(name: str, stem: str) -> None:
    """As a class or batch name."""
    assert archive_stem(name) == stem


def test_kinds_and_marks_are_read_from_the_folder(bench, tmp_path: Path) -> None:
    """One item of each kind."""
    bench.class_folder("class")
    bench.class_folder("x", under=bench.inbox / "batch")
    bench.class_folder("y", under=bench.inbox / "marked")
    (bench.inbox / "marked" / ".ready").touch()
    (bench.inbox / "empty").mkdir()
    (bench.inbox / "pack.tar.gz").write_bytes(b"")
    (bench.inbox / "wrapped").mkdir()
    (bench.inbox / "wrapped" / ".submitted.json").write_text("{}")
    (bench.inbox / "wrapped" / "spring.zip").touch()

    found = {i.name: (i.title, i.kind, i.mark) for i in scan_inbox(bench.inbox, 0).items}

    assert found == {
        "class": ("class", "folders", None),
        "batch": ("batch", "batch", None),
        "marked": ("marked", "batch", "ready"),
        "empty": ("empty", "empty", None),
        "pack.tar.gz": ("pack", "archive", None),
        "wrapped": ("spring", "archive", "submitted"),
    }
