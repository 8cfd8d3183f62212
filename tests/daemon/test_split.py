"""The split keeps grading and learning apart, for ever."""

import hashlib
import random

from hypothesis import given
from hypothesis import strategies as st

from daemon.split import History, split_images

FRACTIONS = {"exam_fraction": 0.2, "tune_fraction": 0.1, "max_exam_images": 50}
HASHES = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(60)]


@st.composite
def drops(draw: st.DrawFn) -> tuple[dict[str, list[str]], History]:
    """Classes with images, some of which earlier batches graded or learnt from."""
    images = draw(st.lists(st.sampled_from(HASHES), unique=True, max_size=40))
    classes: dict[str, list[str]] = {}
    for image in images:
        classes.setdefault(draw(st.sampled_from("abc")), []).append(image)
    marks = {image: draw(st.sampled_from(["exam", "trained", "new", "new"])) for image in HASHES}
    history = History(
        frozenset(i for i in HASHES if marks[i] == "exam"),
        frozenset(i for i in HASHES if marks[i] == "trained"),
    )
    return classes, history


@given(drops(), st.floats(0, 0.6), st.floats(0, 0.35), st.integers(1, 9))
def test_no_image_both_grades_and_teaches(
    drop: tuple[dict[str, list[str]], History], exam: float, tune: float, most: int
) -> None:
    """An image of an earlier exam is only graded on, one that was learnt from never; each has one split."""
    classes, history = drop

    splits = split_images(classes, history, exam_fraction=exam, tune_fraction=tune, max_exam_images=most)

    assert set(splits) == {image for members in classes.values() for image in members}
    for image, split in splits.items():
        assert split == "exam" or image not in history.exam
        assert split != "exam" or image not in history.trained


@given(drops(), st.randoms(use_true_random=False))
def test_the_order_of_arrival_changes_nothing(
    drop: tuple[dict[str, list[str]], History], rng: random.Random
) -> None:
    """The same files give the same split, in whatever order they are listed."""
    classes, history = drop
    shuffled = list(classes.items())
    rng.shuffle(shuffled)

    again = {key: rng.sample(members, len(members)) for key, members in shuffled}

    assert split_images(again, history, **FRACTIONS) == split_images(classes, history, **FRACTIONS)


@given(drops())
def test_a_class_with_an_image_that_may_be_learnt_from_learns_from_one(
    drop: tuple[dict[str, list[str]], History],
) -> None:
    """Grading never takes the last image."""
    classes, history = drop

    splits = split_images(classes, history, exam_fraction=0.9, tune_fraction=0.09, max_exam_images=1000)

    for members in classes.values():
        if set(members) - history.exam:
            assert any(splits[image] == "train" for image in members)


def test_the_usual_class_is_split_in_seven_one_two() -> None:
    """20 new images: 14 to learn from, 2 to tune, 4 to grade."""
    splits = list(split_images({"cat": HASHES[:20]}, History(), **FRACTIONS).values())

    assert [splits.count(split) for split in ("train", "tune", "exam")] == [14, 2, 4]


def test_the_exam_is_capped() -> None:
    """A class of many images is graded on max_exam_images."""
    many = [hashlib.sha256(bytes([n // 256, n % 256])).hexdigest() for n in range(1000)]

    splits = list(split_images({"cat": many}, History(), **FRACTIONS).values())

    assert splits.count("exam") == 50


def test_a_small_class_still_has_an_exam_image() -> None:
    """Four images: one grades, three teach."""
    splits = list(split_images({"cat": HASHES[:4]}, History(), **FRACTIONS).values())

    assert [splits.count(split) for split in ("train", "tune", "exam")] == [3, 0, 1]


def test_no_exam_where_exams_are_switched_off() -> None:
    """A fraction of 0 means none, not at least one."""
    splits = split_images(
        {"cat": HASHES[:20]}, History(), exam_fraction=0, tune_fraction=0, max_exam_images=50
    )

    assert set(splits.values()) == {"train"}


def test_earlier_exam_images_count_towards_the_exam() -> None:
    """A class dropped again with more images keeps a fifth for grading, the known ones first."""
    known = frozenset(HASHES[:3])

    splits = split_images({"cat": HASHES[:20]}, History(exam=known), **FRACTIONS)

    exam = {image for image, split in splits.items() if split == "exam"}
    assert known < exam
    assert len(exam) == 4
