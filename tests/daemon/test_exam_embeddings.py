"""What a vision tower answered to exam images is remembered, and believed only while all is what it was."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from daemon import exam_embeddings
from daemon.errors import WorkerError
from daemon.exam_embeddings import EMBEDDINGS_NAME, Memory
from daemon.examine import Examiner
from daemon.exams import keep_exam
from daemon.retention import remove_leftovers
from deploy.manifest import load_classes
from deploy.runtime import LoadedVersion
from deploy.weights import write_weights
from tests.daemon.test_examine import make_batch


class Life:
    """A home with a store and kept exams of two images each; each grade has its own examiner."""

    def __init__(self, home, version):
        self.home, self.version = home, version
        self.embedded = []  # numbers of images, as they were looked at

    def keep(self, number, limit=9):
        """A batch that was never graded leaves an exam."""
        keep_exam(
            self.home, make_batch(number, self.work(number)), self.work(number), max_images_per_class=limit
        )

    def work(self, number):
        """Where a batch's own images lie."""
        return self.home / f"work-{number}"

    def exam(self, number):
        """Where its exam is kept."""
        return self.home / "exams" / f"{number:06d}-cat"

    def examiner(self, number=None):
        """For the batch of that number, or for none."""
        batch = make_batch(number, self.work(number)) if number else None
        classes = load_classes(self.version.directory).classes
        return Examiner(self.home, batch, self.work(number), classes, threads=1)

    def grade(self, number=None, version_dir=None):
        """A new examiner's grades, its warnings, and how many images were embedded for them."""
        self.embedded.clear()
        examiner = self.examiner(number)
        grades = examiner.grade(version_dir) if version_dir else examiner.ask(self.version)
        return grades, examiner.warnings, sum(self.embedded)


@pytest.fixture(scope="module")
def version(version_dir):
    """Loaded once for all."""
    with LoadedVersion(version_dir, threads=1) as version:
        yield version


@pytest.fixture
def life(version, tmp_path, monkeypatch):
    """Two exams are kept; what real sessions are asked is counted."""
    life = Life(tmp_path, version)
    encode = LoadedVersion.encode_pixels

    def counted(self, pixels):
        life.embedded.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(LoadedVersion, "encode_pixels", counted)
    life.keep(1)
    life.keep(2)
    return life


def same(one, two):
    """Whether two grades have the same embeddings, to the bit."""
    return one.embeddings.keys() == two.embeddings.keys() and all(
        np.array_equal(one.embeddings[batch], rows) for batch, rows in two.embeddings.items()
    )


def test_each_batch_embeds_its_own_exam_alone(life):
    """A later attempt of the same batch does not even that, nor the next batch where that was published."""
    counts = [life.grade(3)[2], life.grade(3)[2]]
    life.keep(3)
    grades, warnings, embedded = life.grade(4)

    assert [*counts, embedded] == [6, 0, 2]
    assert warnings == []
    shutil.rmtree(life.home / "work-4")
    for path in life.home.rglob(EMBEDDINGS_NAME):
        path.unlink()
    anew, _, embedded = life.grade(4)
    assert embedded == 8
    assert all(
        np.allclose(anew.embeddings[batch], rows, atol=1e-5) for batch, rows in grades.embeddings.items()
    )


def test_an_exam_cut_to_its_limit_is_remembered_too(life):
    """Rows belong to images by name and content, not by their place."""
    grades, _, _ = life.grade(3)
    life.keep(3, limit=1)
    later, warnings, embedded = life.grade()

    assert (warnings, embedded) == ([], 0)
    [row] = later.embeddings["000003-cat"]
    assert any(np.array_equal(row, other) for other in grades.embeddings["000003-cat"])


def test_an_exchanged_image_is_looked_at_again_and_a_bad_one_left_out_as_ever(life):
    """By what the file holds now; the images beside them are still remembered."""
    before, _, _ = life.grade()
    exchanged = life.exam(1) / "images/cat/3.png"
    Image.new("RGB", (30, 40), "red").save(exchanged)
    (life.exam(2) / "images/cat/3.png").write_bytes(b"no picture")
    after, warnings, embedded = life.grade()

    assert embedded == 1
    assert len(after.embeddings["000002-cat"]) == 1
    [warning] = warnings
    assert "000002-cat/images/cat/3.png cannot be used: this is not an image" in warning
    rows = [grades.embeddings["000001-cat"] for grades in (before, after)]
    assert sorted(np.equal(*rows).all(axis=1)) == [False, True]
    (life.exam(2) / "images/cat/3.png").unlink()
    again, warnings, embedded = life.grade()
    assert embedded == 0
    assert same(again, after)
    assert "3.png cannot be used: the file does not exist" in warnings[0]


def test_another_tower_is_asked_anew_and_remembered_instead(life, serving_dir, publish_random_version):
    """Of two towers in turn each is asked; the last one is known."""
    other = serving_dir / "versions" / str(publish_random_version(serving_dir, 1))
    first, _, embedded = life.grade()
    second, _, changed = life.grade(version_dir=other)
    again, warnings, known = life.grade(version_dir=other)
    back, _, anew = life.grade()

    assert (embedded, changed, known, anew) == (4, 4, 0, 4)
    assert same(second, again)
    assert same(first, back)
    assert not same(first, second)
    assert warnings == []


def test_an_image_exchanged_between_two_towers_ends_the_attempt(life, serving_dir, publish_random_version):
    """One was asked from memory, so its pixels were never seen: the other may not get different ones."""
    other = serving_dir / "versions" / str(publish_random_version(serving_dir, 1))
    life.grade()
    examiner = life.examiner()
    examiner.ask(life.version)
    Image.new("RGB", (30, 40), "red").save(life.exam(1) / "images/cat/3.png")

    with pytest.raises(WorkerError, match=r"3\.png cannot be used: it was changed between the grades"):
        examiner.grade(other)


def test_another_release_of_what_computes_is_asked_anew(life, monkeypatch):
    """It may decode or round otherwise."""
    life.grade()
    monkeypatch.setattr(exam_embeddings, "_software", lambda: "onnxruntime 99")

    assert life.grade()[1:] == ([], 4)
    assert life.grade()[1:] == ([], 0)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def _another_kind(path):
    write_weights(path, {"a": np.zeros(3, np.float32)})


def _link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _other_rows(path):
    """Whole, with a right checksum, and of the wrong width."""
    tower = exam_embeddings.read_metadata(path)["tower"]
    exam_embeddings._write(path, tower, {"images/cat/3.png": ("0" * 64, np.zeros(7, np.float32))})


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _flip,
        _another_kind,
        _link,
        _other_rows,
        lambda p: p.write_bytes(b""),
        lambda p: p.write_text("{}"),
    ],
    ids=["cut", "flipped", "another kind", "link", "other width", "empty", "text"],
)
def test_a_damaged_or_foreign_file_is_told_once_and_replaced(life, damage):
    """Its images are looked at again, those of the other exam are not."""
    before, _, _ = life.grade()
    damage(life.exam(1) / EMBEDDINGS_NAME)
    after, warnings, embedded = life.grade()

    assert embedded == 2
    assert same(before, after)
    [warning] = warnings
    assert f"000001-cat/{EMBEDDINGS_NAME} cannot be used: " in warning
    assert life.grade()[1:] == ([], 0)
    assert (life.exam(1) / EMBEDDINGS_NAME).is_file()
    assert not (life.exam(1) / EMBEDDINGS_NAME).is_symlink()


def test_where_nothing_can_be_written_it_is_said_once_and_all_is_graded(life):
    """Here folders are in the way; nothing is left lying."""
    for number in (1, 2):
        (life.exam(number) / EMBEDDINGS_NAME).mkdir()
    grades, warnings, embedded = life.grade()

    assert (embedded, len(grades.embeddings)) == (4, 2)
    assert sum("cannot be written" in warning for warning in warnings) == 1
    assert not list(life.home.rglob(".tmp-*"))


@pytest.mark.parametrize("fault", ["read-only", "full"])
def test_a_read_only_or_full_disk_fails_no_exam(life, mount_tmpfs, fault):
    """A file system of its own."""
    disk = mount_tmpfs("disk", 1 << 20)
    shutil.move(life.home / "exams", disk / "exams")
    (life.home / "exams").symlink_to(disk / "exams")
    if fault == "full":
        subprocess.run(["dd", "if=/dev/zero", f"of={disk / 'filler'}", "bs=4k"], check=False, stderr=-3)
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    grades, warnings, embedded = life.grade()
    told = {"full": "No space left on device", "read-only": "Read-only file system"}[fault]

    assert (embedded, len(grades.embeddings)) == (4, 2)
    [warning] = warnings
    assert f"{EMBEDDINGS_NAME} cannot be written: {told}; the next exams take longer" in warning


def test_a_copy_that_fails_costs_the_exam_nothing(life):
    """Here a folder lies where the worker's file would; the images are kept, and looked at again."""
    batch = make_batch(3, life.work(3))
    (life.work(3) / EMBEDDINGS_NAME).mkdir()
    keep_exam(life.home, batch, life.work(3), max_images_per_class=9)

    assert not (life.exam(3) / EMBEDDINGS_NAME).exists()
    assert life.grade()[1:] == ([], 6)


def test_what_a_killed_worker_had_begun_to_write_goes_at_the_next_start(life):
    """From exams and from held batches; images stay, whatever their names."""
    held = life.home / "spool" / "held" / "000009-cat"
    (held / "images").mkdir(parents=True)
    for directory in (life.exam(1), held):
        (directory / f".tmp-{EMBEDDINGS_NAME}-12-ab").touch()
    (held / "images" / ".tmp-a.png").touch()
    remove_leftovers(life.home)

    assert [path.name for path in life.home.rglob(".tmp-*")] == [".tmp-a.png"]


def test_a_file_says_what_it_is_of_and_holds_nothing_but_numbers_and_names(life):
    """Tower and releases in the header; per row the file's name and the hash of what was looked at."""
    life.grade()
    said = exam_embeddings.read_metadata(life.exam(1) / EMBEDDINGS_NAME)
    tensors = exam_embeddings.read_weights(life.exam(1) / EMBEDDINGS_NAME)
    images = json.loads(bytes(tensors["images"]))
    exam = json.loads((life.exam(1) / "exam.json").read_text())

    assert len(said["tower"]) == 64
    assert f"numpy {np.__version__}" in said["software"]
    assert sorted(images) == sorted([image["file"], image["sha256"]] for image in exam["images"])
    assert np.allclose(np.linalg.norm(tensors["image_embeds"], axis=1), 1, atol=1e-5)
    assert Memory(pytest.fail).load(life.exam(1), "0" * 64, 128) == {}
    assert (life.exam(1) / EMBEDDINGS_NAME).stat().st_mode & 0o777 == 0o644
