"""Figures of continual learning: worked examples, and what holds for every matrix."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from dynlora import evaluate

# Task 1 is learnt first, then task 2, then task 3; task 1 is partly forgotten.
R = np.array([[0.9, 0.2, 0.1], [0.8, 0.7, 0.3], [0.6, 0.7, 0.5]])

matrices = st.integers(1, 6).flatmap(lambda n: hnp.arrays(np.float64, (n, n), elements=st.floats(0, 1)))
answers = st.integers(1, 30).flatmap(
    lambda n: st.tuples(*[hnp.arrays(np.int64, n, elements=st.integers(0, 3)) for _ in range(3)])
)


def test_a_worked_stream_of_three_tasks():
    """Transfer looks above the diagonal, last at the bottom row, forgetting from the best to the last."""
    assert np.isnan(evaluate.transfer(R)[0])
    assert evaluate.transfer(R)[1:] == pytest.approx([0.2, 0.2])
    assert evaluate.average(R) == pytest.approx([2.3 / 3, 1.6 / 3, 0.3])
    assert evaluate.last(R) == pytest.approx([0.6, 0.7, 0.5])
    assert evaluate.forgetting(R) == pytest.approx([0.3, 0.0, 0.0])
    assert evaluate.backward_transfer(R) == pytest.approx(-0.1)


@given(matrices)
def test_forgetting_is_never_negative_and_nothing_changes_the_matrix(r):
    """The figures only read."""
    before = r.copy()

    assert (evaluate.forgetting(r) >= 0).all()
    assert evaluate.backward_transfer(r) <= 1
    evaluate.last(r)[:] = 7
    assert np.array_equal(r, before)


@given(answers)
def test_flips_account_for_the_whole_change_in_accuracy(triple):
    """Gained minus lost, over all samples, is the difference of the two accuracies."""
    before, after, truth = triple
    gained, lost = evaluate.flips(before, after, truth)
    change = evaluate.accuracy(after, truth) - evaluate.accuracy(before, truth)

    assert (gained - lost) / len(truth) == pytest.approx(change)
    assert evaluate.negative_flip_rate(before, after, truth) == lost / len(truth)


@given(
    st.integers(2, 8).flatmap(
        lambda n: st.tuples(*[hnp.arrays(np.float64, n, elements=st.floats(0, 100))] * 2)
    )
)
def test_a_paired_difference_changes_sign_with_its_sides(pair):
    """Ours minus theirs is the opposite of theirs minus ours, with the same error."""
    mean, error = evaluate.paired_difference(*pair)
    opposite, same_error = evaluate.paired_difference(*reversed(pair))

    assert mean == pytest.approx(-opposite)
    assert error == pytest.approx(same_error)
    assert error >= 0


def test_a_gain_that_every_seed_shows_alike_has_no_error_and_one_seed_has_no_spread():
    """The standard error is of the differences, not of the seeds."""
    ours, theirs = np.array([5.0, 9.0, 2.0]), np.array([4.0, 8.0, 1.0])

    assert evaluate.paired_difference(ours, theirs) == (1.0, 0.0)
    assert np.isnan(evaluate.paired_difference(ours[:1], theirs[:1])[1])
