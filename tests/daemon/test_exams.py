"""Exams are kept whole or not at all, within their limit."""

import shutil

import pytest

from daemon.batch import Batch, BatchClass, BatchImage
from daemon.exams import keep_exam, load_exams


@pytest.fixture
def batch(tmp_path):
    """A batch directory with five exam images of one class and one of another, and a training image."""
    images = []
    for key, count in (("cup", 5), ("plate", 1)):
        for number in range(count):
            file = tmp_path / "batch" / "images" / key / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(f"{key} {number}".encode())
            images.append((key, f"images/{key}/{number}.png", "exam"))
    images.append(("cup", "images/cup/9.png", "train"))
    template = "a photo of a {}."
    return Batch(
        id="000001-cup",
        seq=1,
        slug="cup",
        kind="folders",
        received_at="2026-01-01T00:00:00+00:00",
        content_sha256="0" * 64,
        classes=[
            BatchClass(name=k, key=k, template=template, folder=k, is_new=True) for k in ("cup", "plate")
        ],
        images=[
            BatchImage(file=f, origin=f, class_key=k, sha256=f"{n:064d}", width=2, height=2, split=s)
            for n, (k, f, s) in enumerate(images)
        ],
    )


def test_exam_images_are_copied_up_to_the_limit_of_each_class(batch, tmp_path):
    """Training images never are; what is there opens."""
    directory = keep_exam(tmp_path, batch, tmp_path / "batch", max_images_per_class=3)

    [(found, exam)] = load_exams(tmp_path, _refuse)
    assert found == directory
    assert [image.class_key for image in exam.images] == ["cup", "cup", "cup", "plate"]
    assert all((found / image.file).read_bytes() for image in exam.images)


def test_keeping_an_exam_twice_changes_nothing(batch, tmp_path):
    """After a crash the step is repeated, also when the batch's own images have gone meanwhile."""
    first = keep_exam(tmp_path, batch, tmp_path / "batch", max_images_per_class=3)
    before = sorted(path.name for path in first.rglob("*"))
    for image in (tmp_path / "batch" / "images").rglob("*.png"):
        image.unlink()

    assert keep_exam(tmp_path, batch, tmp_path / "batch", max_images_per_class=3) == first
    assert sorted(path.name for path in first.rglob("*")) == before


def test_a_copy_cut_short_is_made_again_and_never_graded_on(batch, tmp_path):
    """A missing image stops the copy; no exam is visible until the whole of it is there."""
    missing = tmp_path / "batch" / "images" / "plate" / "0.png"
    content = missing.read_bytes()
    missing.unlink()
    with pytest.raises(FileNotFoundError):
        keep_exam(tmp_path, batch, tmp_path / "batch", max_images_per_class=3)
    assert list(load_exams(tmp_path, _refuse)) == []

    missing.write_bytes(content)
    keep_exam(tmp_path, batch, tmp_path / "batch", max_images_per_class=3)
    assert len(list(load_exams(tmp_path, _refuse))) == 1


def test_a_batch_without_exam_images_keeps_no_exam(batch, tmp_path):
    """There is no empty exam to grade on."""
    trained = [image.model_copy(update={"split": "train"}) for image in batch.images]
    without = batch.model_copy(update={"images": trained})

    assert keep_exam(tmp_path, without, tmp_path / "batch", max_images_per_class=3) is None
    assert not (tmp_path / "exams").exists()


@pytest.mark.parametrize("spoil", [lambda path: path.write_text("{"), lambda path: path.unlink()])
def test_a_damaged_or_missing_exam_is_named_and_passed_over(batch, tmp_path, spoil):
    """One tidied-away file does not block every later batch; a stray file is no exam either."""
    directory = keep_exam(tmp_path, batch, tmp_path / "batch", max_images_per_class=3)
    spoil(directory / "exam.json")
    shutil.copytree(directory, directory.with_name("000002-cup"))
    (directory.with_name("000002-cup") / "exam.json").write_text('{"batch": "000002-cup", "images": []}')
    (directory.with_name("notes.txt")).write_text("tidied up")
    said = []

    assert [exam.batch for _, exam in load_exams(tmp_path, said.append)] == ["000002-cup"]
    assert len(said) == 2
    assert "000001-cup/exam.json cannot be read" in said[0]


def _refuse(sentence):
    pytest.fail(sentence)
