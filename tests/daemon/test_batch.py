"""The record of a batch: names, identity, and what a damaged one is answered with."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.batch import (
    Batch,
    BatchClass,
    BatchImage,
    SetAside,
    batch_id,
    content_sha256,
    read_batch,
    sequence,
    slug,
)
from daemon.errors import BatchError


def record() -> Batch:
    """A batch of one class and two images."""
    images = [
        BatchImage(
            file=f"images/cat/{number}.png",
            origin=f"source/cat/{number}.png",
            class_key="cat",
            sha256=str(number) * 64,
            width=12,
            height=9,
            split=split,  # type: ignore[arg-type]
        )
        for number, split in enumerate(["train", "exam"])
    ]
    return Batch(
        id="000007-cat",
        seq=7,
        slug="cat",
        kind="folders",
        received_at="2026-01-01T00:00:00+00:00",
        content_sha256="0" * 64,
        classes=[BatchClass(name="Cat", key="cat", template="a {}.", folder="cat", is_new=True)],
        images=images,
    )


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    """batch.json loses nothing."""
    batch = record().with_attempt("2026-01-02T00:00:00+00:00").with_outcome("killed")
    (tmp_path / "batch.json").write_text(batch.to_json(), encoding="utf-8")

    assert read_batch(tmp_path) == batch
    assert batch.attempts[0].n == 1
    assert (batch.count("train"), batch.count("tune"), len(batch.split("exam"))) == (1, 0, 1)


def test_a_missing_or_damaged_record_is_named(tmp_path: Path) -> None:
    """The message gives the file and what to do."""
    with pytest.raises(BatchError, match=r"batch\.json is missing"):
        read_batch(tmp_path)
    (tmp_path / "batch.json").write_text(record().to_json()[:100])
    with pytest.raises(BatchError, match=r"batch\.json is damaged: .*; drop the images again"):
        read_batch(tmp_path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["Polar Bear"], "polar-bear"),
        (["dress", "hat", "pants"], "dress-and-2-more"),
        (["Käse & Brot!"], "kase-brot"),
        (["🐈"], "batch"),
        (["🐈", "dog"], "dog-and-1-more"),
        (["x" * 300], "x" * 40),
        (["../../etc/passwd"], "etc-passwd"),
    ],
)
def test_a_slug_says_what_it_is_in_safe_letters(names: list[str], expected: str) -> None:
    """Whatever a folder is called, the batch's directory has a plain name."""
    assert slug(names) == expected


def test_ids_sort_in_working_order() -> None:
    """Also as plain text, as in a directory listing."""
    ids = [batch_id(seq, "cat") for seq in (1, 2, 10, 100, 999_999)]

    assert sorted(ids) == ids
    assert [sequence(name) for name in ids] == [1, 2, 10, 100, 999_999]
    assert sequence(".tmp-1-x") is None


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("0123"))))
def test_the_identity_of_content_knows_no_order(pairs: list[tuple[str, str]]) -> None:
    """The same images in the same classes are the same content."""
    assert content_sha256(pairs) == content_sha256(sorted(set(pairs), reverse=True))
    assert content_sha256([*pairs, ("c", "9")]) != content_sha256(pairs)


def test_what_was_set_aside_is_told_under_the_senders_name() -> None:
    """Our own directories mean nothing to the person who sent the file."""
    sentences = {
        SetAside(file=f"{prefix}/cat/a.jpg", reason="why").sentence
        for prefix in ("source", "unpacked-3", "source/submit-0a1b2c3d")
    }

    assert sentences == {"cat/a.jpg was set aside: why"}
