"""What grades and trains: old exams that cannot be read are left out, images of the batch's own are named."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from daemon import examine
from daemon.batch import Batch, BatchClass, BatchImage
from daemon.errors import BatchError, WorkerError
from daemon.examine import Examiner
from daemon.exams import keep_exam
from daemon.tasks import load_task
from deploy.manifest import ClassEntry, load_classes
from deploy.preprocess import Preprocessing
from deploy.runtime import LoadedVersion

TEMPLATE = "a photo of a {}."


def make_batch(number, directory):
    """A batch of cats: two images to train on, one to tune, two for the exam."""
    images = []
    for index, split in enumerate(["train", "train", "tune", "exam", "exam"]):
        path = directory / f"images/cat/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng([number, index]).integers(0, 255, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        images.append(
            BatchImage(
                file=f"images/cat/{index}.png",
                origin=f"cat/{index}.png",
                width=30,
                height=40,
                class_key="cat",
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                split=split,
            )
        )
    return Batch(
        id=f"{number:06d}-cat",
        seq=number,
        slug="cat",
        kind="folders",
        received_at="2026-01-01T00:00:00+00:00",
        content_sha256="0" * 64,
        classes=[BatchClass(name="cat", key="cat", template=TEMPLATE, folder="cat", is_new=False)],
        images=images,
    )


@pytest.fixture
def examiner(version_dir, tmp_path):
    """A batch with two older exams of two images each."""

    def make():
        batch = make_batch(3, tmp_path / "work")
        return Examiner(tmp_path, batch, tmp_path / "work", load_classes(version_dir).classes, threads=1)

    for number in (1, 2):
        old = make_batch(number, tmp_path / f"old-{number}")
        keep_exam(tmp_path, old, tmp_path / f"old-{number}", max_images_per_class=9)
    return make


def test_unreadable_images_and_records_of_old_exams_are_left_out_and_told(examiner, version_dir, tmp_path):
    """One tidied-away picture, one damaged exam.json: the rest is graded, before and after alike."""
    gone = tmp_path / "exams" / "000001-cat" / "images/cat/3.png"
    gone.unlink()
    (tmp_path / "exams" / "000002-cat" / "exam.json").write_text("{")
    own = examiner()
    before, after = own.grade(version_dir), own.grade(version_dir)

    assert [(exam.batch, exam.images) for exam in own.compare(before, after)] == [
        ("000003-cat", 2),
        ("000001-cat", 1),
    ]
    assert before.cosines_with(after)["mean_image_cosine"] == pytest.approx(1)
    assert len(own.warnings) == 2
    assert "000002-cat/exam.json cannot be read" in own.warnings[0]
    assert f"{gone} cannot be used: the file does not exist" in own.warnings[1]


def test_an_old_exam_without_a_readable_image_is_no_exam(examiner, version_dir, tmp_path):
    """Nothing is graded on nothing."""
    for path in (tmp_path / "exams" / "000001-cat").rglob("*.png"):
        path.write_bytes(b"")
    own = examiner()
    grades = own.grade(version_dir)

    assert [exam.batch for exam in own.compare(grades, grades)] == ["000003-cat", "000002-cat"]


def test_an_image_is_decoded_once_for_both_versions(examiner, version_dir, tmp_path):
    """Both are asked about the same pixels, whatever became of the file."""
    own = examiner()
    before = own.grade(version_dir)
    for path in [*(tmp_path / "exams").rglob("*.png"), *(tmp_path / "work").rglob("*.png")]:
        path.unlink()
    after = own.grade(version_dir)

    assert before.embeddings.keys() == after.embeddings.keys() == {"000001-cat", "000002-cat", "000003-cat"}
    for batch, embeddings in before.embeddings.items():
        np.testing.assert_array_equal(after.embeddings[batch], embeddings)


def test_a_version_with_the_same_vision_tower_is_graded_without_looking_at_images_again(
    examiner, version_dir, monkeypatch
):
    """The embeddings are the same arrays; names are asked anew."""
    own = examiner()
    before = own.grade(version_dir)
    monkeypatch.setattr(LoadedVersion, "encode_pixels", None)
    after = own.grade(version_dir)

    assert all((before.embeddings[batch] == rows).all() for batch, rows in after.embeddings.items())
    assert after.names is not before.names


def test_an_image_that_goes_between_the_two_grades_ends_the_attempt(
    examiner, version_dir, tmp_path, monkeypatch
):
    """Where there are too many to keep, each is decoded twice; the next attempt leaves it out of both."""
    towers = iter(["before", "after"])
    monkeypatch.setattr(examine, "_KEPT_BYTES", 0)
    monkeypatch.setattr(examine, "vision_digest", lambda _: next(towers))
    monkeypatch.setattr(examine, "is_same_tower", lambda *_: False)
    own = examiner()
    own.grade(version_dir)
    (tmp_path / "exams" / "000001-cat" / "images/cat/3.png").unlink()

    with pytest.raises(WorkerError, match=r"3\.png cannot be used"):
        own.grade(version_dir)


def test_an_unreadable_image_of_the_batch_itself_is_named(examiner, version_dir, tmp_path):
    """In its exam and in what it is trained on."""
    own = examiner()
    (tmp_path / "work" / "images/cat/4.png").write_bytes(b"no picture")
    (tmp_path / "work" / "images/cat/1.png").unlink()
    preprocessing = Preprocessing.load(version_dir / "preprocessor_config.json")

    with pytest.raises(BatchError, match=r"images/cat/4\.png cannot be used: this is not an image"):
        own.grade(version_dir)
    with pytest.raises(BatchError, match=r"images/cat/1\.png cannot be used: the file does not exist"):
        load_task(own.batch, tmp_path / "work", preprocessing, own.classes)


def test_a_task_holds_the_pixels_of_its_images_in_order(examiner, version_dir, tmp_path):
    """Two to train on, one to tune; the exam's stay closed."""
    own = examiner()
    for index in (3, 4):
        (tmp_path / "work" / f"images/cat/{index}.png").unlink()
    preprocessing = Preprocessing.load(version_dir / "preprocessor_config.json")
    task = load_task(own.batch, tmp_path / "work", preprocessing, own.classes)

    images = [Image.open(tmp_path / "work" / f"images/cat/{index}.png") for index in range(3)]
    assert np.array_equal(task.pixels.numpy(), preprocessing(images[:2]))
    assert np.array_equal(task.tune_pixels.numpy(), preprocessing(images[2:]))


def test_exams_of_batches_that_were_taken_out_count_for_nothing(examiner, version_dir, tmp_path):
    """Of what is left each version is asked among the names it is given; a right name left out is wrong."""
    examiner()
    cats = [entry for entry in load_classes(version_dir).classes if entry.key == "cat"]
    without = frozenset({"000002-cat"})
    own = Examiner(tmp_path, None, tmp_path, cats, threads=1, without=without)
    others = [entry for entry in load_classes(version_dir).classes if entry.key != "cat"]

    before, after = own.grade(version_dir, others), own.grade(version_dir)

    [exam] = own.compare(before, after)
    assert (exam.batch, exam.images) == ("000001-cat", 2)
    assert (exam.correct_before, exam.correct_after, exam.gained) == (0, 2, 2)
    assert before.cosines_with(after)["mean_text_cosine"] is None


def test_known_names_are_graded_by_the_embeddings_that_clients_use_and_new_ones_are_asked(
    version_dir, tmp_path
):
    """In the order of the exam; a known name in another template is a new one."""
    known = load_classes(version_dir).classes
    kettle = ClassEntry(name="kettle", key="kettle", template="a drawing of a {}.")
    other = known[0].model_copy(update={"template": "a drawing of a {}."})
    asked = [kettle, *reversed(known), other]
    with LoadedVersion(version_dir, threads=1) as version:
        names = Examiner(tmp_path, None, tmp_path, asked, threads=1).ask(version).names
        rows = np.array(version.class_embeddings)
        expected = version.embed_classes([entry.name for entry in asked], [entry.template for entry in asked])

    assert np.array_equal(names[1:-1], rows[::-1])
    assert np.allclose(names, expected, atol=1e-5)
