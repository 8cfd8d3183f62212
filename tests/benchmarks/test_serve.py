"""The verdicts about servers: what is compared with what."""

import pytest

from benchmarks.serve import judged


def sweep(*points):
    """Points of (a second, p99)."""
    return [{"per_second": rate, "p99": p99, "p50": p99 / 2, "requests": 40} for rate, p99 in points]


def test_throughput_is_compared_within_the_better_rivals_p99():
    """What answers more, but later than the rival at its best, does not count."""
    found = judged({
        "bare_before": {1: 90.0, 8: 100.0}, "bare_after": {1: 95.0, 8: 98.0},
        "sweeps": {
            "dynlora": sweep((50.0, 0.010), (70.0, 0.040), (90.0, 0.200)),
            "mlserver": sweep((40.0, 0.010), (60.0, 0.050)),
            "litserve": sweep((45.0, 0.010), (55.0, 0.090)),
        },
    })  # fmt: skip
    assert (found["better_rival"], found["p99_bound"]) == ("mlserver", 0.050)
    assert found["ratio_rival"] == pytest.approx(70 / 60)
    assert found["ratio_bare"] == pytest.approx(0.9)


def test_a_rival_that_is_as_fast_with_few_callers_sets_no_bound_by_chance():
    """Where throughput does not grow with the callers, any of the points may be the best one."""
    found = judged({
        "bare_before": {1: 3.8}, "bare_after": {1: 3.8},
        "sweeps": {
            "dynlora": sweep((3.6, 0.283), (3.6, 0.553)),
            "mlserver": sweep((3.5, 0.290), (3.5, 0.560)),
            "litserve": sweep((3.70, 0.282), (3.69, 0.791)),
        },
    })  # fmt: skip
    assert found["p99_bound"] == 0.791
    assert found["ratio_rival"] == pytest.approx(3.6 / 3.7)
