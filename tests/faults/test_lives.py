"""Two batches, and a fault at the Nth change of the disk, for every N: the end is the same, nothing is lost.

Each fault is tried at a stride of the calls every day, at each of them at night.
"""

import errno
import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deploy.store import VersionStore
from tests.deploy.tiny import found_tiny, stage_update
from tests.faults import life
from tests.faults.disk import Disk, inodes, lose_power

# A drop that cannot be read once it was taken fails at the door, because its own blocks may be what is
# broken: it is overtaken, and learnt once an operator retries it.
OVERTAKEN = ["000002-batch-1", "000001-batch-0"]
# A drop that cannot be claimed waits in the inbox: the other is the first then. The harness's update
# depends on the number alone, so that the weights are those of the undisturbed life.
WAITED = ["000001-batch-1", "000002-batch-0"]
FAULTS = ("kill", "power", errno.EIO, errno.ENOSPC, errno.EMFILE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, Any]]:
    """The calls that a life makes, and what it ends with."""
    base = tmp_path_factory.mktemp("undisturbed")
    assert live_once(base) == 0, (base / "log").read_text()
    life.check_visible(base / "home")
    return (base / "journal").read_text().splitlines(), life.outcome(base / "home")


@pytest.fixture(scope="module")
def overtaken(tmp_path_factory: pytest.TempPathFactory, undisturbed: Any) -> dict[str, Any]:
    """What a life ends with when the second batch is learnt first: published by hand in that order."""
    store = found_tiny(tmp_path_factory.mktemp("overtaken") / "serving")
    for batch, names in zip(OVERTAKEN, reversed(life.NAMES), strict=True):
        store.publish(*stage_update(store, batch, [names]))
    weights = store.live_manifest().files["weights.safetensors"].sha256
    assert weights != undisturbed[1]["weights"]
    return undisturbed[1] | {"lineage": OVERTAKEN, "weights": weights}


def waited(undisturbed: dict[str, Any]) -> dict[str, Any]:
    """What a life ends with when the first batch could not be claimed at once."""
    states = undisturbed["states"] | {"done": WAITED}
    return undisturbed | {"lineage": WAITED, "exams": WAITED, "seen": WAITED, "states": states}


def live_once(base: Path, *, at: int = 0, fault: Any = "kill", skips: Any = None, build: Any = None) -> int:
    """A new home and one life on a disk with a fault; the life's exit status."""
    home = base / "home"
    life.new_home(home)
    before = inodes(home)
    how = "kill" if fault == "power" else fault

    def work() -> None:
        if build is not None:
            build()
        Disk(home, base / "journal", at=at, how=how, skips=skips).install()
        life.live(home)

    code = life.in_child(work, base / "log")
    if fault == "power" and code == -signal.SIGKILL:
        lose_power(home, base / "journal", before, at=at)
    return code


def violation(
    base: Path, expected: list[dict[str, Any]], *, at: int, fault: Any, **broken: Any
) -> str | None:
    """What is wrong after a life with that fault and one without; None where all is well.

    Args:
        expected: the ends that are right.
    """
    base.mkdir()
    home, said = base / "home", f"call {at}, {errno.errorcode.get(fault, fault)}"
    code = live_once(base, at=at, fault=fault, **broken)
    if code not in (0, -signal.SIGKILL):
        # A daemon may end over a fault, as a service manager then starts it again; it says why.
        said += f" (ended with {code}: {(base / 'log').read_text()[-300:]})"
    try:
        life.check_visible(home)
        life.retry_failed(home)
        life.live_in_child(home)
        life.check_visible(home)
        found = life.outcome(home)
        assert found in expected, found
    except Exception as error:  # noqa: BLE001 - a store that cannot be read is what is looked for
        return f"{said}: {type(error).__name__}: {error}"
    shutil.rmtree(base)
    return None


def violations(
    base: Path, expected: list[dict[str, Any]], numbers: Any, *, fault: Any, **broken: Any
) -> list[str]:
    """Live once per number, side by side."""
    run = partial(violation, expected=expected, fault=fault, **broken)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda at: run(base / str(at), at=at), numbers)
    return [what for what in found if what is not None]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "stride", [pytest.param(53, id="some"), pytest.param(1, id="all", marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: errno.errorcode.get(fault, fault))
def test_a_fault_at_any_call_ends_in_the_same_two_versions(
    room: Path, undisturbed: Any, overtaken: dict[str, Any], fault: Any, stride: int
) -> None:
    """Every batch in one state, learnt once, the same weights, `current` whole, no image lost."""
    calls, expected = undisturbed
    ends = [expected] if fault in ("kill", "power") else [expected, overtaken, waited(expected)]
    numbers = range(1 + 19 * FAULTS.index(fault) % stride, len(calls) + 1, stride)
    found = violations(room, ends, numbers, fault=fault)
    print(f"{len(numbers)} of {len(calls)} injection points, {len(found)} violations")
    assert found == []


def test_images_are_in_one_of_two_places_whenever_the_power_goes_while_they_are_moved(
    room: Path, undisturbed: Any
) -> None:
    """Where they came from may forget them only after where they went remembers them."""
    calls, expected = undisturbed
    targets = [json.loads(line).get("to", "") for line in calls]
    moved = [n for n, to in enumerate(targets, 1) if "/incoming/" in to and "/images/" in to]
    last = next(n for n in moved if n + 1 not in moved)  # of the first batch
    assert violations(room, [expected], range(last + 1, last + 9), fault="power") == []


def test_a_worker_killed_while_it_writes_its_result_leaves_nothing_lying(
    room: Path, undisturbed: Any
) -> None:
    """What it had begun to write would stay with the batch for ever."""
    calls, expected = undisturbed
    paths = [json.loads(line)["path"] for line in calls]
    numbers = [number for number, path in enumerate(paths, 1) if "/result/.tmp-" in path]
    assert len(numbers) > 6
    assert violations(room, [expected], numbers[1:3], fault="kill") == []


def around_the_first_publication(calls: list[str]) -> range:
    """The calls from just before version 1 has its number to just after it is live."""
    [number] = [i for i, line in enumerate(calls, 1) if json.loads(line).get("to", "").endswith("versions/1")]
    return range(number - 2, number + 6, 2)


def test_a_build_without_one_directory_fsync_is_caught(room: Path, undisturbed: Any) -> None:
    """`current` is on the disk, and the version it names is not."""
    calls, expected = undisturbed

    def skips(call: str, path: str) -> bool:
        return call == "fsync" and path.endswith("/serving/versions")

    found = violations(room, [expected], around_the_first_publication(calls), fault="power", skips=skips)
    assert found


def test_a_build_that_publishes_before_it_verifies_is_caught(room: Path, undisturbed: Any) -> None:
    """A version has its number, and its manifest is not there yet."""
    calls, expected = undisturbed

    def build() -> None:
        seal, make_live = VersionStore._seal, VersionStore._make_live
        manifests: list[Any] = []
        VersionStore._seal = lambda self, staging, manifest: manifests.append(manifest)  # type: ignore[method-assign]

        def make_live_first(self: Any, staging: Path, version: int) -> None:
            make_live(self, staging, version)
            seal(self, self.path(version), manifests.pop())

        VersionStore._make_live = make_live_first  # type: ignore[method-assign]

    found = violations(room, [expected], around_the_first_publication(calls), fault="kill", build=build)
    assert found
