"""All operations on a store in random order, each of them cut short anywhere or not: what always holds.

A power cut is an exception at the n-th change of the file system and at every later one, so no handler can
tidy up; then the store is opened anew and recovered, as after a restart.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from deploy import space
from deploy.delta import Delta, load_delta
from deploy.errors import DeployError
from deploy.lineage import fold_lineage, reverted_batches
from deploy.manifest import DELTA_NAME, WEIGHTS_NAME
from deploy.opening import hold_shared_lock
from deploy.rebuild import adopt_rebuild, stage_rebuild
from deploy.store import VersionStore
from deploy.verify import check_files
from tests.deploy.tiny import found_tiny, stage_revert, stage_update

CALLS = ("fsync", "rename", "replace", "symlink", "unlink", "mkdir", "rmdir", "chmod", "fchmod")
# After how many changes the power goes; in two of three cases it stays.
FAULTS = st.integers(-120, 60).map(lambda changes: changes if changes > 0 else None)
FIRST_VERSIONS = 4
PICK = st.integers(0, 1000)


class PowerCutError(BaseException):
    """Nothing after this happens."""


@contextlib.contextmanager
def power_cut_after(changes: int | None) -> Iterator[None]:
    """Let so many changes of the file system happen and no more; None for all."""
    if changes is None:
        yield
        return
    left = changes

    def armed(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **keywords: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise PowerCutError
            return real(*arguments, **keywords)

        return call

    with contextlib.ExitStack() as stack:
        for name in CALLS:
            stack.enter_context(patch.object(os, name, armed(getattr(os, name))))
        yield


class StoreMachine(RuleBasedStateMachine):
    """A store, and beside it what must be true of it."""

    def __init__(self) -> None:
        super().__init__()
        shared_memory = Path("/dev/shm")
        self.root = Path(tempfile.mkdtemp(dir=shared_memory if shared_memory.is_dir() else None))
        self.store = found_tiny(self.root / "serving")
        self.batches = 0
        for _ in range(1, FIRST_VERSIONS):
            self.store.publish(*stage_update(self.store, *self.new_batch()))
        self.held: list[tuple[str, Delta]] = []
        self.published: dict[int, str] = {}  # version → its manifest as first seen
        self.open: dict[int, int] = {}  # version → a client's lock
        self.remember()

    def teardown(self) -> None:
        """At the end the lineage of every version folds to what was recorded when it was published."""
        for lock in self.open.values():
            os.close(lock)
        for version in self.store.versions():
            manifest = self.store.manifest(version)
            found = fold_lineage(self.store, version, manifest.lineage, self.root / "fold")
            assert found == manifest.files[WEIGHTS_NAME], version
        shutil.rmtree(self.root)

    def remember(self) -> None:
        """Note what is published; what was noted before must be the same for ever."""
        for version in self.store.versions():
            text = (self.store.path(version) / "manifest.json").read_text()
            assert self.published.setdefault(version, text) == text
        assert self.store.next_version() == max(self.published) + 1
        assert self.published.keys() == set(self.store.versions())

    def lineage(self) -> list[str]:
        """The batches in the live version."""
        return [entry.batch for entry in self.store.live_manifest().lineage]

    def attempt(self, fault: int | None, act: Callable[[], object]) -> bool:
        """Do it, cut short or not; recover; says whether it was done to its end."""
        whole = {version for version in self.needed() if self.store.is_full(version)}
        try:
            with power_cut_after(fault):
                act()
            done = True
        except PowerCutError:
            done = False
        self.store = VersionStore(self.store.serving_dir)  # the next process knows only what is on disk
        self.store.recover()
        assert self.store.recover() == []
        self.remember()
        for version in whole & self.needed():
            assert self.store.is_full(version), f"{version} lost its weights"
        return done

    def needed(self) -> set[int]:
        """The versions that must not lose anything: first, live, the one before, pinned, open."""
        live, pin = self.store.live_manifest(), self.store.pin()
        named = {0, live.version, live.parent, pin.version if pin else None, *self.open}
        return {version for version in named if version is not None}

    def new_batch(self) -> tuple[str, list[str]]:
        self.batches += 1
        return f"{self.batches:06d}-batch", [f"class {self.batches}", f"shared {self.batches % 2}"]

    @precondition(lambda self: self.store.pin() is None)
    @rule(fault=FAULTS)
    def publish(self, fault: int | None) -> None:
        """An update is live as a whole or not at all."""
        batch, names = self.new_batch()
        before = self.lineage()
        done = self.attempt(fault, lambda: self.store.publish(*stage_update(self.store, batch, names)))
        assert self.lineage() == [*before, batch] or (not done and self.lineage() == before)

    @precondition(lambda self: self.store.pin() is not None)
    @rule()
    def publish_while_pinned(self) -> None:
        """Nothing is published over a pin."""
        batch, names = self.new_batch()
        with pytest.raises(DeployError, match="is pinned"):
            self.store.publish(*stage_update(self.store, batch, names))

    @rule()
    def hold(self) -> None:
        """A held batch keeps its delta, learnt on the version that is live now."""
        batch, names = self.new_batch()
        staging, _ = stage_update(self.store, batch, names)
        self.held.append((batch, load_delta(staging / DELTA_NAME)))

    @precondition(lambda self: self.held and self.store.pin() is None)
    @rule(fault=FAULTS, pick=PICK)
    def promote(self, fault: int | None, pick: int) -> None:
        """A held delta is appended to whatever is live by now."""
        batch, delta = self.held[pick % len(self.held)]
        before = self.lineage()

        def act() -> None:
            store = self.store
            store.publish(*stage_update(store, batch, [f"class {batch}"], kind="promote", delta=delta))

        done = self.attempt(fault, act)
        assert self.lineage() == [*before, batch] or (not done and self.lineage() == before)
        if batch in self.lineage():
            self.held.remove((batch, delta))

    @precondition(lambda self: self.lineage() and self.store.pin() is None)
    @rule(fault=FAULTS, pick=PICK)
    def revert(self, fault: int | None, pick: int) -> None:
        """The batch is gone from the lineage, the others stay in their order."""
        before = self.lineage()
        batch = before[pick % len(before)]
        done = self.attempt(fault, lambda: self.store.publish(*stage_revert(self.store, batch)))
        without = [other for other in before if other != batch]
        assert self.lineage() == without or (not done and self.lineage() == before)
        assert (batch in reverted_batches(self.store)) == (batch not in self.lineage())

    @rule(fault=FAULTS, pick=PICK)
    def roll_back(self, fault: int | None, pick: int) -> None:
        """Pinned and live are one version, or nothing happened."""
        full = self.store.full_versions()
        to, before = full[pick % len(full)], self.store.current()
        done = self.attempt(fault, lambda: self.store.roll_back(to, who="ann", why=""))
        pin = self.store.pin()
        assert self.store.current() == (to if done or (pin and pin.version == to) else before)

    @precondition(lambda self: self.store.pin() is not None)
    @rule(fault=FAULTS)
    def unpin(self, fault: int | None) -> None:
        """The live version stays."""
        before = self.store.current()
        done = self.attempt(fault, lambda: self.store.unpin("ann"))
        assert self.store.current() == before
        assert not (done and self.store.pin())

    @rule(fault=FAULTS)
    def thin(self, fault: int | None) -> None:
        """Whatever may go does, and nothing else."""
        self.attempt(fault, lambda: space.thin(self.store, self.store.versions()))

    @rule(fault=FAULTS, keep=st.integers(1, 3))
    def prune(self, fault: int | None, keep: int) -> None:
        """The policy's way."""
        self.attempt(fault, lambda: self.store.prune(keep))

    @rule(fault=FAULTS, pick=PICK)
    def rebuild(self, fault: int | None, pick: int) -> None:
        """Whole again to the byte, or as before."""
        versions = self.store.versions()
        version = versions[pick % len(versions)]

        def act() -> None:
            stage_rebuild(self.store, version)
            adopt_rebuild(self.store, version)

        if self.attempt(fault, act):
            check_files(self.store.path(version), self.store.manifest(version).files)

    @precondition(lambda self: len(self.open) < 2)
    @rule(pick=PICK)
    def open_version(self, pick: int) -> None:
        """A client loads a version."""
        full = [version for version in self.store.full_versions() if version not in self.open]
        if full:
            version = full[pick % len(full)]
            lock = hold_shared_lock(self.store.path(version) / "manifest.json")
            assert lock is not None
            self.open[version] = lock

    @precondition(lambda self: self.open)
    @rule()
    def close_version(self) -> None:
        """It lets go of it."""
        os.close(self.open.pop(next(iter(self.open))))

    @invariant()
    def current_resolves_and_verifies(self) -> None:
        """A reader that opens `current` finds a whole version."""
        live = self.store.current()
        check_files(self.store.path(live), self.store.manifest(live).files)


@pytest.mark.parametrize(
    ("examples", "steps"),
    [pytest.param(20, 20, id="short"), pytest.param(400, 40, id="long", marks=pytest.mark.nightly)],
)
@pytest.mark.timeout(3600)
def test_whatever_is_done_in_whatever_order_and_cut_short_anywhere_the_store_is_sound(
    examples: int, steps: int
) -> None:
    """The live version is whole, lineages fold to their hashes, numbers are used once, nothing is lost."""
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
