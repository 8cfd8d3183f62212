"""The version store: numbered, immutable directories and one link, ``current``, to the live one.

    serving/
      current -> versions/12
      pin.json                   while an operator holds the store at one version
      .next -> versions/13       while version 13 is being published
      versions/12/, versions/.staging-<name>/

What is on the disk is the truth, and every change of state is one rename, so recover() is a function
of the listing. A new version's link is made first, as ``.next``; then the staged directory gets its
number; then ``.next`` becomes ``current``. Killed in between, ``.next`` says what was meant: if its
target is there the publication is finished, else it is dropped. An operator's word is newer than ``.next``:
a pin drops it, and the version it names stays what any version is that was rolled back.

One process at a time changes a store (the daemon, or a command holding its lock); readers need no lock.
Which files make a version, and whether they fit together, is deploy.manifest's and deploy.verify's.
"""

import contextlib
import logging
from collections.abc import Callable, Collection
from pathlib import Path

from deploy import atomic, disk
from deploy.errors import StoreError, VerifyError
from deploy.manifest import (
    GRAPH_NAMES,
    MANIFEST_NAME,
    OPEN_CLIP_CONFIG_NAME,
    PREPROCESSOR_NAME,
    TOKENIZER_NAME,
    Manifest,
    load_manifest,
    save_manifest,
)
from deploy.prune import prune_version
from deploy.space import prunable
from deploy.store_reader import CURRENT_NAME, PIN_NAME, VERSIONS_NAME, Pin, StoreReader
from deploy.succession import check_succession
from deploy.verify import check_files, check_graphs, graph_hashes

NEXT_NAME = ".next"
STAGING_PREFIX = ".staging-"
# The same in every version of one architecture, so a new version starts with copies of its parent's.
CARRIED_NAMES = (*GRAPH_NAMES, PREPROCESSOR_NAME, TOKENIZER_NAME, OPEN_CLIP_CONFIG_NAME)

_log = logging.getLogger(__name__)


class VersionStore(StoreReader):
    """A version store that is written to.

    Args:
        serving_dir: the directory that holds ``current`` and ``versions/``.
        sign: called with a version's directory once its manifest is written, before it is visible.
    """

    def __init__(self, serving_dir: Path, *, sign: Callable[[Path], None] | None = None) -> None:
        super().__init__(serving_dir)
        self._sign = sign

    def create(self) -> None:
        """Make the directories of an empty store; fine if they are there."""
        atomic.make_dir(self.versions_dir)

    def stage(self, name: str, *, like: int | None = None) -> Path:
        """Return a directory to put a new version's files in; what an earlier try left there is removed.

        Args:
            name: any file name; the batch id.
            like: a version whose graphs, tokenizer and preprocessing the new one shares; they are
                copied in (links are refused by ONNX Runtime and onnx).
        """
        staging = self.staging_dir(name)
        atomic.remove_tree(staging)
        atomic.make_dir(staging)
        for carried in CARRIED_NAMES if like is not None else ():
            disk.copy(self.path(like or 0) / carried, staging / carried)
        return staging

    def staging_dir(self, name: str) -> Path:
        """Return where stage() puts what has this name, whether it is there or not."""
        return self.versions_dir / f"{STAGING_PREFIX}{name}"

    def publish(self, staging: Path, manifest: Manifest) -> int:
        """Make a staged directory the live version.

        Flushes and re-reads every file against ``manifest.files``, makes them read-only, writes
        manifest.json last, gives the directory its number and replaces ``current``. Publishing the live
        version's batch once more changes nothing. On any error ``current`` is what it was.

        Raises:
            StoreError: a pin, another parent than the live version, a wrong number or lineage, or the
                operating system's refusal, such as a full disk.
            VerifyError: a file is not what the manifest says.
        """
        if self._is_live_already(manifest):
            atomic.remove_tree(staging)
            return self.current()
        live = self.live_manifest() if self.versions() else None
        check_succession(manifest, live=live, next_version=self.next_version(), pin=self.pin())
        if live is not None and manifest.kind != "regraph":
            check_graphs(staging, manifest.files, graph_hashes(live.files))
        try:
            self._seal(staging, manifest)
            self._make_live(staging, manifest.version)
        except OSError as error:
            raise self._refused(manifest.version, error) from error
        _log.info("published version %d", manifest.version)
        return manifest.version

    def roll_back(self, to: int | None = None, *, who: str, why: str) -> int:
        """Make an earlier version live and pin it, so that nothing newer is published over it.

        A publication that broke off before its version was live is not finished any more, also after the
        pin is released.

        Args:
            to: the version; by default the live one's parent.

        Raises:
            StoreError: there is no such version, it was pruned, the live one has no parent, or the
                operating system refused, for instance because the disk is full.
        """
        if to is None:
            live = self.live_manifest()
            if live.parent is None:
                raise StoreError(f"version {live.version} is live and has no parent to roll back to")
            to = live.parent
        self._check_can_serve(to)
        self._point_pinned(Pin(version=to, who=who, why=why))
        _log.info("%s rolled back to version %d: %s", who, to, why)
        return to

    def unpin(self, who: str) -> Pin:
        """Release the pin and return it; the live version stays, and is the next version's parent.

        Raises:
            StoreError: nothing is pinned.
        """
        pin = self.pin()
        if pin is None:
            raise StoreError("no version is pinned; there is nothing to release")
        atomic.remove_file(self.serving_dir / NEXT_NAME)  # left where a roll-back was cut short
        atomic.remove_file(self.serving_dir / PIN_NAME)
        _log.info("%s released the pin on version %d", who, pin.version)
        return pin

    def recover(self, keep: Collection[str] = ()) -> list[str]:
        """Finish or undo what a killed process left, and return a sentence for each thing done.

        Args:
            keep: names given to stage() whose directories are whole and stay, to be published; the others go.

        Raises:
            StoreError: pin.json cannot be read, or pins a version that cannot be served.
        """
        self.create()
        done = [*self._remove_leftovers(keep), *self._finish_next()]
        pin = self.pin()
        link = self.serving_dir / CURRENT_NAME
        if pin is not None and not (
            link.is_symlink() and str(link.readlink()) == f"{VERSIONS_NAME}/{pin.version}"
        ):
            self._check_can_serve(pin.version)
            atomic.replace_symlink(link, f"{VERSIONS_NAME}/{pin.version}")
            done.append(f"finished the roll-back to version {pin.version}, pinned by {pin.who}")
        for sentence in done:
            _log.info("%s", sentence)
        return done

    def complete(self) -> None:
        """Point ``current`` at a version that got its number before its publication broke off."""
        for sentence in self._finish_next():
            _log.info("%s", sentence)

    def prune(self, keep_full: int) -> list[int]:
        """Free the disk of old versions' large files, and return the versions that were pruned.

        Which ones is decided by deploy.space, what a pruned version keeps by deploy.prune.

        Raises:
            StoreError: ``keep_full`` is below 1, or the store has no live version.
        """
        pruned = [version for version in prunable(self, keep_full) if prune_version(self.path(version))]
        for version in pruned:
            _log.info("pruned version %d", version)
        return pruned

    # How it is done

    def _is_live_already(self, manifest: Manifest) -> bool:
        if manifest.batch is None or not self.versions():
            return False
        live = self.live_manifest()
        same = (live.kind, live.parent) == (manifest.kind, manifest.parent)
        return same and live.batch is not None and live.batch.id == manifest.batch.id

    def _seal(self, staging: Path, manifest: Manifest) -> None:
        """Flush the files, read them again, make them read-only, and add the manifest last."""
        disk.unlink(staging / MANIFEST_NAME, missing_ok=True)  # an earlier try of this publication
        for name in manifest.files:
            if (staging / name).is_file() and not (staging / name).is_symlink():
                (staging / name).chmod(0o444)
        atomic.fsync_tree(staging)
        check_files(staging, manifest.files)
        save_manifest(staging, manifest)
        (staging / MANIFEST_NAME).chmod(0o444)
        if self._sign is not None:
            self._sign(staging)
        if load_manifest(staging) != manifest:
            raise VerifyError(f"{staging / MANIFEST_NAME} does not read back as it was written")

    def _make_live(self, staging: Path, version: int) -> None:
        """Give the sealed directory its number and point ``current`` at it (see the module's docstring)."""
        upcoming = self.serving_dir / NEXT_NAME
        disk.unlink(upcoming, missing_ok=True)
        disk.symlink(upcoming, f"{VERSIONS_NAME}/{version}")
        atomic.fsync_dir(self.serving_dir)
        atomic.rename(staging, self.path(version))
        atomic.rename(upcoming, self.serving_dir / CURRENT_NAME)

    def _point_pinned(self, pin: Pin) -> None:
        """Write the pin, then point ``current``; cut short in between, recover() follows the pin."""
        before = self.pin()
        try:
            self._write_pin(pin)
            atomic.replace_symlink(self.serving_dir / CURRENT_NAME, f"{VERSIONS_NAME}/{pin.version}")
        except OSError as error:
            with contextlib.suppress(OSError):
                self._write_pin(before)
            raise StoreError(
                f"rolling back to version {pin.version} failed: {error}. The live version is what it was; "
                "free space or mend the disk, then try again."
            ) from error
        with contextlib.suppress(OSError):  # the pin is durable, and drops it at the latest when released
            atomic.remove_file(self.serving_dir / NEXT_NAME)

    def _write_pin(self, pin: Pin | None) -> None:
        path = self.serving_dir / PIN_NAME
        if pin is None:
            atomic.remove_file(path)
        else:
            atomic.write_text(path, pin.model_dump_json(indent=2) + "\n")

    def _finish_next(self) -> list[str]:
        upcoming = self.serving_dir / NEXT_NAME
        if not upcoming.is_symlink():
            return []
        target = upcoming.readlink()
        if not upcoming.is_dir() or self.pin() is not None:
            atomic.remove_file(upcoming)
            return [f"dropped the unfinished publication of {target}"]
        atomic.rename(upcoming, self.serving_dir / CURRENT_NAME)
        return [f"finished the publication of {target}"]

    def _remove_leftovers(self, keep: Collection[str]) -> list[str]:
        kept = {f"{STAGING_PREFIX}{name}" for name in keep}
        prefixes = (atomic.TEMPORARY_PREFIX, STAGING_PREFIX)
        leftovers = [
            path
            for directory in (self.serving_dir, self.versions_dir)
            for path in sorted(directory.iterdir())
            if path.name.startswith(prefixes) and path.name not in kept
        ]
        for path in leftovers:
            atomic.remove_tree(path)
        return [f"removed the leftover {path.name}" for path in leftovers]

    def _check_can_serve(self, version: int) -> None:
        self.manifest(version)
        if not self.is_full(version):
            raise StoreError(
                f"version {version} cannot be served: some of its files were pruned or are damaged; "
                f"`dynlora rebuild {version}` makes it whole where that can be done. "
                f"Versions that can: {self._full_list()}"
            )

    def _refused(self, version: int, error: OSError) -> StoreError:
        """Take back what announced the version, and say where that leaves the store."""
        if self.path(version).is_dir():
            return StoreError(
                f"version {version} is complete, but `current` could not be pointed at it: {error}. "
                "Nothing is lost: mend the disk and start again, which finishes it."
            )
        with contextlib.suppress(OSError):
            disk.unlink(self.serving_dir / NEXT_NAME, missing_ok=True)
        live = f"version {self.current()} is still live" if self.versions() else "no version is live"
        return StoreError(
            f"version {version} could not be published: {error}. Nothing of it is visible; {live}. "
            "Free space or mend the disk, then try again."
        )
