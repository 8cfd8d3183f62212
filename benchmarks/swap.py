"""Callers in closed loops against a client whose versions are swapped under them.

    python -m benchmarks.swap [--model bundled|ViT-B-16] [--apart] [--swaps N] [--callers N] [--seconds S]
                              [--quick]

The client, its loading and the callers are one process, as in a program that serves; one more process
publishes new versions, with other weights each, into a real store. With two cores or more the publisher has
the last one and the serving process the others (with two cores: one), so loading and warming compete with
the requests for the same cores; with --apart the client's loading threads have the publisher's core instead.
ONNX Runtime has one thread per caller. Every answer's embedding is compared with that of the version it
names.

*steady*  requests while nothing is loaded; *loading*: those that overlap the loading and warming of a version
*first*   the request that began first among those that a version answered, by the clock and by its thread's
          time on a CPU; for comparison, the request that began first after any moment of steady time. Where a
          request is shorter than the turn that the kernel gives a thread, most callers are answered within
          theirs, and one that begins late in it waits for all others: by the clock both are slow then
*growth*  of resident memory between two swaps, from the second fifth to the last, reckoned for 200 swaps

The negative control is a client that keeps its old versions: it must fail the same check; to be done sooner,
it has two callers. Loading a large model beside callers that are never idle takes a minute: no swap begins
after --seconds, and the result says how many there were. A quick run swaps six times and writes no results.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, reporting
from benchmarks.swapping import LEAST_SWAPS, PICTURES, Amount, LeakingClient, Measured, measure
from deploy.client import Client

CALLERS = 8
GROWTH_BYTES = 100e6
GROWTH_SWAPS = 200
TELLING_SWAPS = 10  # of fewer, growth is mostly noise
MOMENT_SECONDS = 0.05
CONTROL_SWAPS, CONTROL_CALLERS = 10, 2
SECONDS = 360.0  # so that all of it takes less than ten minutes
CONTROL_SHARE = 0.2  # of the time, on top


def growth_bytes(resident: list[int]) -> float:
    """Growth over GROWTH_SWAPS swaps, from the medians of the second fifth and of the last.

    Raises:
        RuntimeError: there were too few swaps to say.
    """
    if len(resident) < LEAST_SWAPS:
        raise RuntimeError(
            f"{len(resident)} swaps in the time: too few to say how memory grows; see --seconds"
        )
    fifth = max(1, len(resident) // 5)
    early, late = resident[fifth : 2 * fifth], resident[-fifth:]
    distance = len(resident) - 2 * fifth
    return float(np.median(late) - np.median(early)) / max(1, distance) * GROWTH_SWAPS


def figures(measured: Measured) -> dict[str, Any]:
    """The numbers that goals speak of; times in seconds."""
    requests = np.array([row for caller in measured.callers for row in caller.requests])
    starts, seconds, cpu, versions = requests.T
    begins, ends = np.array(measured.loads[1:]).T  # the first one had nobody to disturb
    is_loading = ((starts[:, None] < ends) & (starts[:, None] + seconds[:, None] > begins)).any(axis=1)
    steady, loading = seconds[~is_loading], seconds[is_loading]
    firsts = [
        rows[starts[rows].argmin()]
        for version in np.unique(versions)[1:]
        for rows in [np.flatnonzero(versions == version)]
    ]
    others = after_moments(starts, is_loading)
    return {
        "requests": len(seconds),
        "failed": sum(len(caller.failed) for caller in measured.callers),
        "mixed": sum(caller.mixed for caller in measured.callers),
        "swaps": len(measured.switches),
        "steady_median": float(np.median(steady)),
        "steady_p99": float(np.percentile(steady, 99)),
        "loading_p99": float(np.percentile(loading, 99)),
        "loading_requests": len(loading),
        "loading_p99_ratio": float(np.percentile(loading, 99) / np.percentile(steady, 99)),
        "first_median_ratio": float(np.median(seconds[firsts]) / np.median(steady)),
        "first_cpu_ratio": float(np.median(cpu[firsts]) / np.median(cpu[~is_loading])),
        "moment_median_ratio": float(np.median(seconds[others]) / np.median(steady)),
        "moment_cpu_ratio": float(np.median(cpu[others]) / np.median(cpu[~is_loading])),
        "switch_max": max(measured.switches),
        "load_median": float(np.median(ends - begins)),
        "growth_bytes": growth_bytes(measured.resident),
        "resident_bytes": measured.resident,
    }


def after_moments(starts: np.ndarray, is_loading: np.ndarray) -> np.ndarray:
    """The rows of the requests that began first after many moments at which nothing was loading."""
    order = starts.argsort()
    moments = np.arange(starts.min(), starts.max(), MOMENT_SECONDS)
    rows = order[starts[order].searchsorted(moments)]
    return rows[~is_loading[rows]]


def describe(result: dict[str, Any]) -> str:
    """Markdown of one measurement."""
    judge = reporting.verdict
    growth, control = result["growth_bytes"] / 1e6, result["control_growth_bytes"] / 1e6
    limit = GROWTH_BYTES / 1e6
    steady = f"{result['steady_median'] * 1e3:.1f}, {result['steady_p99'] * 1e3:.1f} ms"
    loading = f"{result['loading_p99'] * 1e3:.1f} ms of {result['loading_requests']} requests"
    ratio, first = result["loading_p99_ratio"], result["first_median_ratio"]
    switch, by_cpu = result["switch_max"] * 1e3, result["first_cpu_ratio"]
    moment_cpu = result["moment_cpu_ratio"]
    rows = [
        ["requests, swaps", f"{result['requests']}, {result['swaps']}", ""],
        ["failed", result["failed"], judge(result["failed"], goal=0)],
        ["mixed", result["mixed"], judge(result["mixed"], goal=0)],
        ["steady, median and p99", steady, ""],
        ["loading, p99", loading, ""],
        ["p99 loading / steady", f"{ratio:.2f}", judge(ratio, goal=1.5)],
        ["first / median, median of all swaps", f"{first:.2f}", judge(first, goal=1.2)],
        ["the same in seconds on a CPU", f"{by_cpu:.2f}", judge(by_cpu, goal=1.2)],
        ["both of a moment without a switch", f"{result['moment_median_ratio']:.2f}, {moment_cpu:.2f}", ""],
        ["switch, longest", f"{switch:.3f} ms", judge(switch, goal=1)],
        ["loading and warming, median", f"{result['load_median']:.2f} s", ""],
        ["growth for 200 swaps", f"{growth:.0f} MB",
         judge(growth, goal=limit) if result["swaps"] >= TELLING_SWAPS else "too few swaps to tell"],
        ["the same, leaking client", f"{control:.0f} MB",
         "fails the check, as it must" if control > limit else "PASSES, so the check says nothing"],
    ]  # fmt: skip
    who = f"{result['model']}, {result['callers']} callers, {CONTROL_CALLERS} of the leaking client"
    return f"{who}; {result['sharing']}.\n\n" + reporting.table(["what", "figure", "goal"], rows)


def sharing(cores: int, *, is_apart: bool) -> str:
    """Who has which cores."""
    if cores == 1:
        return "one core for all"
    if is_apart:
        return f"publishing and loading on one core, callers on the other {cores - 1}"
    return f"publishing on one core, callers and loading on the other {cores - 1}"


def main() -> None:
    """Run, print, and write results/swap-<model>.json and .md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--callers", type=int, default=CALLERS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    where, cores = reporting.machine(), len(os.sched_getaffinity(0))
    swaps, control_swaps = (6, 5) if options.quick else (options.swaps, CONTROL_SWAPS)
    if options.apart and cores == 1:
        parser.error("--apart needs a second core")
    with tempfile.TemporaryDirectory() as scratch:
        store = models.found(Path(scratch, "home"), options.model)
        with np.load(store.path(0) / "reference.npz") as arrays:
            pixels = arrays["pixel_values"][:PICTURES]
        amount = Amount(swaps, options.callers, options.seconds, options.apart)
        result = figures(measure(Client, store, pixels, amount))
        less = Amount(control_swaps, CONTROL_CALLERS, CONTROL_SHARE * options.seconds, options.apart)
        control = measure(LeakingClient, store, pixels, less)
    result |= {
        "model": options.model,
        "callers": options.callers,
        "control_growth_bytes": growth_bytes(control.resident),
        "sharing": sharing(cores, is_apart=options.apart),
        "machine": where,
    }
    if options.quick:
        print(describe(result))
    else:
        reporting.save(f"swap-{options.model}{'-apart' if options.apart else ''}", result, describe(result))


if __name__ == "__main__":
    main()
