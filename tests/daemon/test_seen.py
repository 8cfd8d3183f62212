"""What a home learns about images from batch to batch: sums, never images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.seen import OWN_NAME, SEEN_NAME, Seen, add_own, load_seen
from deploy.weights import write_weights

WIDTH = 5


def of(embeddings, batch):
    """Each row a class of its own."""
    covariance = np.cov(embeddings.T, bias=True)
    return Seen(
        embeddings.mean(0).astype(np.float32), covariance.astype(np.float32), len(embeddings), (batch,)
    )


def drawn(count, seed):
    """(count, WIDTH) numbers."""
    return np.random.default_rng(seed).normal(size=(count, WIDTH))


def refuse(sentence):
    """For what must not be told."""
    raise AssertionError(sentence)


@given(st.lists(st.integers(2, 30), min_size=1, max_size=6))
def test_adding_batches_one_by_one_gives_the_moments_of_all_of_them_at_once(sizes):
    """In whatever parts they come."""
    parts = [drawn(size, seed) for seed, size in enumerate(sizes)]
    seen = of(parts[0], "0")
    for number, part in enumerate(parts[1:], 1):
        seen = seen.with_more(of(part, str(number)))
    whole = of(np.concatenate(parts), "all")

    assert np.allclose(seen.mean, whole.mean, atol=1e-5)
    assert np.allclose(seen.covariance, whole.covariance, atol=1e-5)
    assert (seen.classes, len(seen.batches)) == (sum(sizes), len(sizes))


def test_a_batch_is_added_once_however_often_it_is_finished(tmp_path):
    """Where the daemon died after it was added and before its own file was removed."""
    for batch in ("a", "b", "b"):
        (tmp_path / batch).mkdir(exist_ok=True)
        of(drawn(4, ord(batch)), batch).save(tmp_path / batch / OWN_NAME)
        add_own(tmp_path, batch, tmp_path / batch, refuse)
        add_own(tmp_path, batch, tmp_path / batch, refuse)  # nothing is left to add
    seen = load_seen(tmp_path, WIDTH, refuse)

    assert seen.batches == ("a", "b")
    assert seen.classes == 8
    assert not list(tmp_path.glob(f"*/{OWN_NAME}"))


def test_damage_is_told_and_blocks_nothing(tmp_path):
    """A damaged memory is begun anew; a damaged part of a batch is left out; another model's is not used."""
    told = []
    (tmp_path / SEEN_NAME).write_bytes(b"no safetensors")
    of(drawn(4, 0), "a").save(tmp_path / OWN_NAME)
    add_own(tmp_path, "a", tmp_path, told.append)
    (tmp_path / OWN_NAME).write_bytes(b"cut")
    add_own(tmp_path, "b", tmp_path, told.append)

    assert load_seen(tmp_path, WIDTH, refuse).batches == ("a",)
    assert load_seen(tmp_path, WIDTH + 1, refuse) is None
    assert not (tmp_path / OWN_NAME).exists()
    assert len(told) == 2
    assert SEEN_NAME in told[0]
    assert OWN_NAME in told[1]


def test_a_header_that_lacks_something_is_damage_too(tmp_path):
    """It ends no daemon."""
    told, said = [], {"kind": "dynlora seen moments", "schema": "1", "classes": "many"}
    tensors = {"mean": np.zeros(WIDTH, np.float32), "covariance": np.eye(WIDTH, dtype=np.float32)}
    for header in (said, said | {"classes": "2"}, said | {"batches": "[", "classes": "2"}):
        write_weights(tmp_path / SEEN_NAME, tensors, metadata=header)
        assert load_seen(tmp_path, WIDTH, told.append) is None

    assert len(told) == 3
    assert all("header does not say what it is made of" in sentence for sentence in told)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_damage(tmp_path, value):
    """They would spread into every later batch."""
    told = []
    Seen(np.full(WIDTH, value, np.float32), np.eye(WIDTH, dtype=np.float32), 1, ("a",)).save(
        tmp_path / SEEN_NAME
    )

    assert load_seen(tmp_path, WIDTH, told.append) is None
    assert "no numbers" in told[0]
