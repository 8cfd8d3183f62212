"""Which versions may give disk space back, and giving it back.

    thin     only weights.safetensors, which can be folded again from the first version
    prune    all large files; the deltas stay, so that this too can be undone (deploy.rebuild)

Never: the first version (all weights are folded from it), the live one, its parent, a pinned one, and
whatever a client has open. Changes no link and no manifest, so readers need not know.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.errors import StoreError
from deploy.lineage import base_dir, find_deltas
from deploy.manifest import WEIGHTS_NAME, Manifest, is_as_recorded, load_manifest
from deploy.prune import KEPT_WHEN_PRUNED, large_files, prune_version, thin_version
from deploy.store_reader import StoreReader


@dataclass
class Freed:
    """What was removed: the versions and how many bytes; ``kept`` says why a version was left alone."""

    versions: list[int] = field(default_factory=list)
    bytes: int = 0
    kept: dict[int, str] = field(default_factory=dict)


def state_of(store: StoreReader, version: int) -> str:
    """Return ``full``, ``thin`` (only the weights are gone), ``pruned``, or ``damaged``."""
    if store.is_full(version):
        return "full"
    files, directory = store.manifest(version).files, store.path(version)
    missing = {name for name in files if not (directory / name).is_file()}
    if WEIGHTS_NAME not in missing or missing & set(KEPT_WHEN_PRUNED):
        return "damaged"
    return "thin" if missing == {WEIGHTS_NAME} else "pruned"


def why_untouchable(store: StoreReader, version: int) -> str | None:
    """Say why a version keeps its weights whatever is asked; None where it need not.

    Raises:
        StoreError: there is no such version, or no live one.
    """
    live, pin = store.live_manifest(), store.pin()
    if store.manifest(version).kind == "initial":
        return "it is the first version, and all weights are folded from it"
    if version == live.version:
        return "it is live"
    if version == live.parent:
        return "it is the one before the live version, to roll back to"
    if pin is not None and version == pin.version:
        return f"it is pinned by {pin.who}"
    return None


def prunable(store: StoreReader, keep_full: int) -> list[int]:
    """Return the versions that the policy no longer keeps whole and that still hold large files.

    Args:
        keep_full: so many of the newest full versions stay whole.

    Raises:
        StoreError: ``keep_full`` is below 1, or the store has no live version.
    """
    if keep_full < 1:
        raise StoreError(f"keep_full must be at least 1, found {keep_full}: the live version stays whole")
    live, pin, full = store.live_manifest(), store.pin(), 0
    kept = {live.version, live.parent, pin.version if pin is not None else None}
    found = []
    for version in reversed(store.versions()):
        if full < keep_full and store.is_full(version):
            full += 1
        elif (
            version not in kept
            and large_files(store.path(version))
            and store.summary(version).kind != "initial"
        ):
            found.append(version)
    return found[::-1]


def thinnable(store: StoreReader) -> list[int]:
    """Return the versions whose weights may go: those that have them and are not needed as they are.

    Raises:
        StoreError: the store has no live version.
    """
    return [
        version
        for version in store.versions()
        if why_untouchable(store, version) is None and (store.path(version) / WEIGHTS_NAME).exists()
    ]


def thin(store: StoreReader, versions: Sequence[int]) -> Freed:
    """Remove the weights of versions that can be rebuilt; one that has none already is fine.

    Raises:
        StoreError: there is no such version, or no live one.
    """
    sound: dict[Path, bool] = {}  # base weights that were read, once each

    def why_not(manifest: Manifest) -> str | None:
        try:
            base = base_dir(store, manifest.version)
            if base not in sound:
                expected = load_manifest(base).files[WEIGHTS_NAME]
                sound[base] = is_as_recorded(base / WEIGHTS_NAME, expected)
            if not sound[base]:
                return f"it could not be rebuilt: {base / WEIGHTS_NAME} is damaged; restore it from a copy"
            find_deltas(store, manifest.lineage)
        except StoreError as error:
            return f"it could not be rebuilt: {error}"
        return None

    return _free(store, versions, lambda version: [store.path(version) / WEIGHTS_NAME], thin_version, why_not)


def prune(store: StoreReader, versions: Sequence[int]) -> Freed:
    """Remove the large files of versions; one that has none any more is fine.

    Raises:
        StoreError: there is no such version, or no live one.
    """
    return _free(
        store, versions, lambda version: large_files(store.path(version)), prune_version, lambda _: None
    )


def _free(
    store: StoreReader,
    versions: Iterable[int],
    files_of: Callable[[int], list[Path]],
    remove: Callable[[Path], bool],
    why_not: Callable[[Manifest], str | None],
) -> Freed:
    freed = Freed()
    for version in sorted(set(versions)):
        manifest = store.manifest(version)
        size = sum(path.stat().st_size for path in files_of(version) if path.exists())
        why = why_untouchable(store, version) or (why_not(manifest) if size else None)
        if why is not None:
            freed.kept[version] = why
        elif remove(store.path(version)):
            freed.versions.append(version)
            freed.bytes += size
        elif size:
            freed.kept[version] = "a client has it open"
    return freed
