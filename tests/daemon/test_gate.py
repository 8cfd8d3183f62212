"""The gate holds on evidence and only on evidence."""

from fractions import Fraction
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.config import ExamConfig
from daemon.gate import MIN_EXAM_IMAGES, decide, loss_p_value
from daemon.report import ExamResult

CONFIG = ExamConfig(min_gain=0.0, alpha=0.01)


def exam(batch="b", *, images, before, gained=0, lost=0):
    """An exam result that adds up."""
    return ExamResult(
        batch=batch,
        images=images,
        correct_before=before,
        correct_after=before + gained - lost,
        gained=gained,
        lost=lost,
    )


def passed(decision):
    """Rule name to whether it passed."""
    return {rule.rule: rule.passed for rule in decision.rules}


@st.composite
def exams(draw, batch="b", max_images=120):
    """Any exam result that can happen."""
    images = draw(st.integers(0, max_images))
    before = draw(st.integers(0, images))
    lost = draw(st.integers(0, before))
    gained = draw(st.integers(0, images - before))
    return exam(batch, images=images, before=before, gained=gained, lost=lost)


def test_a_clear_gain_without_loss_is_published():
    """A batch that improved itself and cost nothing goes live, with every rule in words."""
    decision = decide([exam(images=40, before=5, gained=30), exam("a", images=100, before=70)], CONFIG)

    assert decision.outcome == "publish"
    assert list(passed(decision)) == ["gain", "own_exam", "old_exams"]
    assert "12.5% → 87.5% right on 40 exam images" in decision.rules[0].detail


def test_significant_losses_on_older_exams_hold_the_batch():
    """Twenty images lost and none gained on what was known before is evidence, however large the own gain."""
    decision = decide(
        [exam(images=40, before=0, gained=40), exam("a", images=100, before=70, lost=20)], CONFIG
    )

    assert decision.outcome == "hold"
    assert passed(decision) == {"gain": True, "own_exam": True, "old_exams": False}
    assert "0 images gained, 20 lost of 100" in decision.rules[2].detail


def test_losses_are_pooled_over_the_older_exams():
    """Losses too few in each of ten exams are evidence in all of them together."""
    single = [exam(f"a{i}", images=30, before=30, lost=2) for i in range(10)]
    own = exam(images=40, before=0, gained=40)

    assert decide([own, single[0]], CONFIG).outcome == "publish"
    assert decide([own, *single], CONFIG).outcome == "hold"


def test_a_gain_below_the_minimum_holds_where_there_was_room():
    """One image in forty is less than the ten percent asked for."""
    decision = decide([exam(images=40, before=10, gained=1)], ExamConfig(min_gain=0.1, alpha=0.01))

    assert decision.outcome == "hold"
    assert "expected at least +10.0%, found +2.5%" in decision.rules[0].detail


def test_no_gain_is_asked_of_a_batch_that_was_known_already():
    """Nothing is left to gain at 38 of 40 when ten percent is the minimum."""
    decision = decide([exam(images=40, before=38)], ExamConfig(min_gain=0.1, alpha=0.01))

    assert decision.outcome == "publish"
    assert "no room to gain" in decision.rules[0].detail


def test_losing_what_was_known_holds_even_without_room_to_gain():
    """A known batch that comes out much worse is held by its own exam's flips."""
    decision = decide([exam(images=40, before=40, lost=12)], CONFIG)

    assert passed(decision) == {"gain": True, "own_exam": False, "old_exams": True}


def test_a_small_exam_warns_and_leaves_the_decision_to_the_older_ones():
    """Under 20 images the own gain decides nothing; the pooled exams still can hold."""
    small = exam(images=MIN_EXAM_IMAGES - 1, before=10, lost=1)

    published = decide([small, exam("a", images=100, before=50)], ExamConfig(min_gain=0.2, alpha=0.01))
    held = decide([small, exam("a", images=100, before=50, lost=30)], ExamConfig(min_gain=0.2, alpha=0.01))

    assert published.outcome == "publish"
    assert published.rules[0].detail.startswith("warning: only 19 exam images")
    assert held.outcome == "hold"


def test_without_exams_everything_is_published():
    """Exams can be switched off; then there is nothing to hold on."""
    assert decide([], CONFIG).outcome == "publish"


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_p_value_is_the_exact_binomial_tail(gained, lost):
    """Equal to the textbook sum in exact fractions."""
    flips = gained + lost
    tail = sum(Fraction(comb(flips, k), 2**flips) for k in range(lost, flips + 1))

    assert loss_p_value(gained, lost) == pytest.approx(float(tail), rel=1e-12)


@given(st.integers(0, 2000), st.integers(0, 2000))
def test_the_p_value_is_a_probability_and_falls_with_every_loss(gained, lost):
    """More losses are never less evidence, also for thousands of flips."""
    assert 0.0 <= loss_p_value(gained, lost + 1) <= loss_p_value(gained, lost) <= 1.0


@given(exams(), st.lists(exams("a"), max_size=4), st.floats(0, 0.5), st.floats(0.001, 0.2))
def test_a_batch_without_any_lost_image_is_held_only_for_too_small_a_gain(own, older, min_gain, alpha):
    """Rules two and three never fire without a loss."""
    lossless = [
        exam(e.batch, images=e.images, before=e.correct_before, gained=e.gained) for e in [own, *older]
    ]
    result = passed(decide(lossless, ExamConfig(min_gain=min_gain, alpha=alpha)))

    assert result["own_exam"]
    assert result["old_exams"]


@given(exams(), st.lists(exams("a"), min_size=1, max_size=4), st.data())
def test_one_more_loss_on_an_old_exam_never_turns_hold_into_publish(own, older, data):
    """The gate is monotone: making a candidate worse never helps it."""
    index = data.draw(st.integers(0, len(older) - 1))
    old = older[index]
    worse = list(older)
    if old.lost < old.correct_before:
        worse[index] = exam(
            "a", images=old.images, before=old.correct_before, gained=old.gained, lost=old.lost + 1
        )

    if decide([own, *older], CONFIG).outcome == "hold":
        assert decide([own, *worse], CONFIG).outcome == "hold"


@given(exams(), st.lists(exams("a"), max_size=4))
def test_the_outcome_is_publish_exactly_when_all_rules_pass(own, older):
    """No rule is decoration, and no hidden rule decides."""
    decision = decide([own, *older], CONFIG)

    assert (decision.outcome == "publish") == all(rule.passed for rule in decision.rules)
