"""The soft threshold, its schedule and pruning, against the equations written out naively."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given

from dynlora.rank import Schedule, prune, soft_threshold

numbers = st.floats(-10, 10, width=32)
kappas = st.floats(0, 2, width=32)


@given(st.lists(numbers, min_size=1, max_size=20), kappas)
def test_the_papers_operator_is_the_equation_entry_by_entry(values, kappa):
    """T(x) = 1(|x| > κ) (x − sign(x) κ)."""
    naive = [0.0 if abs(x) <= kappa else x - (kappa if x > 0 else -kappa) for x in values]

    assert torch.allclose(soft_threshold(torch.tensor(values), kappa), torch.tensor(naive), atol=1e-6)


def test_the_reference_operator_has_a_dead_zone_twice_as_wide():
    """Between κ and 2κ the paper shrinks and the authors' code zeroes."""
    x = torch.tensor([0.5, 1.5, 2.5, -1.5, -2.5])

    assert torch.equal(soft_threshold(x, 1.0), torch.tensor([0.0, 0.5, 1.5, -0.5, -1.5]))
    assert torch.equal(soft_threshold(x, 1.0, operator="reference"), torch.tensor([0.0, 0.0, 1.5, 0.0, -1.5]))


def test_the_published_ramp_adds_up_to_the_shrinkage_the_method_predicts():
    """500 steps, half of them dense, 50 stairs to 0.005: 0 first, 0.005 last, 0.625 in all."""
    schedule = Schedule(500, dense_fraction=0.5, kappa_max=0.005)
    ramp = [schedule.kappa(step) for step in range(500)]

    assert ramp[:250] == [0.0] * 250
    assert ramp == sorted(ramp)
    assert ramp[-1] == pytest.approx(0.005)
    assert len(set(ramp)) == 50
    assert sum(ramp) == pytest.approx(0.625)
    assert not any(schedule.is_settling(step) for step in range(500))


@given(st.integers(1, 300), st.floats(0, 0.5), st.floats(0, 0.5), st.integers(1, 60))
def test_the_ramp_never_falls_never_passes_its_maximum_and_ends_before_settling(steps, dense, settle, levels):
    """Whatever the length: 0 while dense, rising within [0, κ_max], 0 while settling."""
    schedule = Schedule(steps, dense, 0.1, levels, settle)
    ramp = [schedule.kappa(step) for step in schedule.ramp]

    assert ramp == sorted(ramp)
    assert all(0 <= kappa <= 0.1 + 1e-12 for kappa in ramp)
    for step in range(steps):
        assert step in schedule.ramp or schedule.kappa(step) == 0
        assert schedule.is_settling(step) == (step >= schedule.ramp.stop)


@given(st.integers(1, 600), st.floats(0.01, 2), st.sampled_from([(0.4, 0.3), (0.8, 0.1), (0.5, 0.0)]))
def test_the_thresholds_add_up_to_the_total_for_any_number_of_steps(steps, total, shares):
    """So that a batch of any size prunes alike: where the ramp is a single step, it does so there."""
    dense, settle = shares
    schedule = Schedule(steps, dense_fraction=dense, kappa_max=9.9, settle_fraction=settle).with_total(total)
    assume(len(schedule.ramp))

    assert sum(schedule.kappa(step) for step in range(steps)) == pytest.approx(total)


@given(st.lists(st.sampled_from([0.0, -1.5, 0.25]), min_size=1, max_size=8))
def test_pruning_drops_zero_ranks_and_keeps_the_product(importance):
    """B diag(w) A is unchanged, and no zero importance is left."""
    torch.manual_seed(0)
    w = torch.tensor(importance)
    b, a = torch.randn(5, len(w)), torch.randn(len(w), 3)

    pruned_b, pruned_a, pruned_w = prune(b, a, w)

    assert len(pruned_w) == int((w != 0).sum())
    assert torch.allclose((pruned_b * pruned_w) @ pruned_a, (b * w) @ a, atol=1e-6)
