"""Swaps under callers: what the figures say, and when they say nothing."""

import pytest

from benchmarks.swap import describe, growth_bytes, sharing

RESULT = {
    "model": "bundled", "callers": 8, "requests": 100, "failed": 0, "mixed": 0, "steady_median": 0.03,
    "steady_p99": 0.06, "loading_p99": 0.06, "loading_requests": 50, "loading_p99_ratio": 1.0,
    "first_median_ratio": 1.0, "first_cpu_ratio": 1.0, "moment_median_ratio": 1.0, "moment_cpu_ratio": 1.0,
    "switch_max": 1e-5, "load_median": 2.5, "growth_bytes": -2e9, "control_growth_bytes": 7e9,
    "sharing": "one core for all",
}  # fmt: skip


def test_growth_is_reckoned_from_the_medians_of_two_fifths():
    """A megabyte more after each of ten swaps, and what only the first ones took does not count."""
    assert growth_bytes([500, 900, *(1000 + 10 * step for step in range(8))]) == pytest.approx(
        200 * (1065 - 1005) / 6
    )


def test_too_few_swaps_have_no_growth():
    """It refuses instead of judging."""
    with pytest.raises(RuntimeError, match="2 swaps in the time"):
        growth_bytes([1000, 1001])


@pytest.mark.parametrize(("swaps", "verdict"), [(6, "too few swaps to tell"), (10, "goal ≤ 100, met")])
def test_growth_over_a_few_swaps_is_not_judged(swaps, verdict):
    """Six swaps of a large model differ by more than they grow."""
    assert f"| growth for 200 swaps | -2000 MB | {verdict} |" in describe(RESULT | {"swaps": swaps})


def test_who_shares_which_core_is_told():
    """Loading apart from the callers is another measurement than loading beside them."""
    assert sharing(1, is_apart=False) == "one core for all"
    assert sharing(2, is_apart=False) == "publishing on one core, callers and loading on the other 1"
    assert sharing(2, is_apart=True) == "publishing and loading on one core, callers on the other 1"
