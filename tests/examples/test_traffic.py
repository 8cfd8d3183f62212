"""The demo's figures about swaps are computed right, because the demo promises something about them."""

from traffic import Request, swaps


def answered(at_ms: int, version: int, *, published: int | None = None, took_ms: int = 5) -> Request:
    """A request that finished at a millisecond of the test's clock."""
    current = version if published is None else published
    return Request((at_ms - took_ms) / 1000, at_ms / 1000, current, version)


def steady(start_ms: int, stop_ms: int, version: int) -> list[Request]:
    """One answer every 20 ms."""
    return [answered(at, version) for at in range(start_ms, stop_ms, 20)]


def test_one_version_all_along_is_no_swap() -> None:
    """Without a second version there is nothing to report."""
    assert swaps(steady(0, 1000, 0)) == []


def test_the_longest_gap_inside_a_swap_is_found() -> None:
    """The gap around the first answer of the new version counts, in seconds."""
    [swap] = swaps([*steady(0, 1000, 0), *steady(1180, 3000, 1)])

    assert swap.version == 1
    assert abs(swap.longest_gap_seconds - 0.2) < 1e-9


def test_a_gap_while_the_new_version_is_being_loaded_counts() -> None:
    """A swap begins when `current` names the new version, before it answers."""
    loading = [answered(at, 0, published=1) for at in (1000, 1020, 1300, 1320)]

    [swap] = swaps([*steady(0, 1000, 0), *loading, *steady(1340, 3000, 1)])

    assert abs(swap.longest_gap_seconds - 0.28) < 1e-9
    assert abs(swap.pickup_seconds - 0.345) < 1e-9


def test_a_gap_long_after_the_swap_does_not_count() -> None:
    """What happens more than a second after the first answer belongs to no swap."""
    [swap] = swaps([*steady(0, 1000, 0), *steady(1000, 2500, 1), *steady(3500, 4000, 1)])

    assert abs(swap.longest_gap_seconds - 0.02) < 1e-9


def test_a_failed_request_does_not_fill_a_gap() -> None:
    """Only answers count as served."""
    failed = Request(1.05, 1.06, 0, None, "ClientError: no")

    [swap] = swaps([*steady(0, 1000, 0), failed, *steady(1180, 3000, 1)])

    assert abs(swap.longest_gap_seconds - 0.2) < 1e-9


def test_silence_at_the_end_of_a_swap_is_a_gap() -> None:
    """A client that stops answering within the swap is not reported as quick."""
    [swap] = swaps([*steady(0, 1000, 0), answered(1000, 1), *steady(1900, 3000, 1)])

    assert abs(swap.longest_gap_seconds - 0.9) < 1e-9


def test_every_later_version_has_its_own_swap() -> None:
    """Three versions make two swaps, in order."""
    found = swaps([*steady(0, 2000, 0), *steady(2000, 5000, 3), *steady(5000, 8000, 4)])

    assert [swap.version for swap in found] == [3, 4]
