"""Many drops at once: all are taken in, and each costs the same work, however many there are and were."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from daemon import inbox, intake, ledger
from daemon.errors import NoSpaceError


def count_calls(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    """What a function of a module is called with from now on."""
    calls: list[Any] = []
    original = getattr(module, name)

    def counted(argument: Any, *rest: Any) -> Any:
        calls.append(argument)
        return original(argument, *rest)

    monkeypatch.setattr(module, name, counted)
    return calls


def drop_marked(bench: Any, count: int) -> None:
    """So many batch folders of one class each, all of them complete."""
    for number in range(count):
        folder = bench.class_folder("cup", 4, under=bench.inbox / f"drop-{number:04d}")
        (folder.parent / ".ready").touch()


MANY = pytest.param(1000, marks=[pytest.mark.nightly, pytest.mark.timeout(1800)])


@pytest.mark.parametrize("count", [30, MANY])
def test_drops_at_once_are_all_queued_with_the_same_work_for_each(bench, monkeypatch, count: int) -> None:
    """No record is read twice, and no drop is walked through more than three times."""
    records = count_calls(monkeypatch, ledger, "read_batch")
    walks = count_calls(monkeypatch, inbox, "surveying"), count_calls(monkeypatch, intake, "survey")
    drop_marked(bench, count)
    begun = time.perf_counter()
    bench.step()

    assert len(bench.spool.ids("queued")) == count
    assert [bench.spool.load(name).producer_id for name in bench.spool.ids("failed")] == []
    assert len(records) <= count
    assert sum(map(len, walks)) <= 3 * count
    print(f"{count} drops: {1000 * (time.perf_counter() - begun) / count:.1f} ms each")


def test_a_round_does_a_part_of_the_work_and_the_next_goes_on(bench) -> None:
    """With no time at all a round takes one step of the scan, or one drop; all are in in the end."""
    drop_marked(bench, 5)
    bench.intake.round_seconds = 0.0
    rounds = 1
    bench.step()
    while bench.intake.is_busy:
        assert len(bench.spool.ids("queued")) <= rounds
        bench.step()
        rounds += 1

    assert rounds > 5
    assert [name.partition("-")[2] for name in bench.spool.ids("queued")] == [
        f"drop-000{n}" for n in range(5)
    ]


def test_a_drop_that_changes_after_the_scan_is_waited_for(bench) -> None:
    """It was ready when the inbox was looked at; another one was taken in meanwhile."""
    drop_marked(bench, 2)
    bench.intake.round_seconds = 0.0
    while not bench.spool.ids("queued"):
        bench.step()
    bench.paint(bench.inbox / "drop-0001" / "cup" / "late.png")
    while bench.intake.is_busy or len(bench.spool.ids("queued")) < 2:
        bench.step()

    assert [len(bench.spool.load(name).images) for name in bench.spool.ids("queued")] == [4, 5]


def test_folders_renamed_between_the_steps_of_a_scan_lose_no_image(bench) -> None:
    """The scan takes many rounds, and another thread renames what it has seen or is about to see."""
    for number in range(4):
        bench.class_folder(f"class-{number}", 4)
    bench.intake.round_seconds = 0.0
    with bench.renaming("class-*"):
        for _ in range(200):
            bench.step(1)
    for _ in range(100):
        bench.step(60)

    hashes = [image.sha256 for name in bench.spool.ids("queued") for image in bench.spool.load(name).images]
    assert len(hashes) == len(set(hashes)) == 16


def test_a_new_class_folder_joins_those_that_wait(bench) -> None:
    """Class folders are gathered by a look that comes right before, not by one before the other drops."""
    hat = bench.class_folder("hat", 4)
    bench.step()
    drop_marked(bench, 3)
    hat.rename(bench.home / "aside").rename(hat)  # its turn comes after the others now
    bench.intake.round_seconds = 0.0
    bench.step(60)
    while not bench.spool.ids("queued"):
        bench.step()
    bench.class_folder("mug", 4)
    for _ in range(200):
        bench.step(0.1)

    gathered = [record for record in bench.spool.batches("queued") if record.kind == "folders"]
    assert [[entry.name for entry in record.classes] for record in gathered] == [["hat", "mug"]]


def test_a_drop_that_could_not_be_claimed_keeps_its_turn(bench, monkeypatch) -> None:
    """The disk is full for a moment: the first drop is still the first."""
    drop_marked(bench, 2)
    stake, calls = intake.stake, [1]

    def full_at_first(*arguments: Any, **keywords: Any) -> Any:
        if calls:
            calls.clear()
            raise NoSpaceError("the disk is full")
        return stake(*arguments, **keywords)

    for name in ("drop-0000", "drop-0001"):
        (bench.inbox / name / ".ready").unlink()
    monkeypatch.setattr(intake, "stake", full_at_first)
    for _ in range(4):
        bench.step(60)

    assert bench.spool.ids("queued") == ["000001-drop-0000", "000002-drop-0001"]


def test_hard_links_of_one_picture_are_copies_of_it(bench) -> None:
    """However many there are: one is learnt from, each of the others is named."""
    folder = bench.class_folder("cup", 4)
    for number in range(20):
        (folder / f"again-{number}.png").hardlink_to(folder / "0.png")
    bench.settle()

    batch = bench.only("queued")
    assert bench.names_and_counts(batch) == {"cup": 4}
    assert len(bench.aside(batch)) == 20


def test_a_record_that_was_removed_by_hand_is_forgotten(bench) -> None:
    """Files are the truth: what is remembered of a batch goes with its folder."""
    bench.class_folder("cup", 8)
    bench.settle()
    exam = {image.sha256 for image in bench.only("queued").split("exam")}
    assert exam <= bench.intake.ledger.history().exam
    shutil.rmtree(bench.spool.path("000001-cup"))

    assert not exam & bench.intake.ledger.history().exam
    assert Path(bench.home).exists()
