"""Classes and images that came before: merged, graded or learnt once, and told."""

import shutil
from pathlib import Path

import pytest

from daemon.compose import Known, KnownClass


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
