"""A thinned, pruned or damaged version becomes whole again, with the very bytes it was published with.

The weights are folded from the first version through the lineage; what all versions of one architecture
share is copied from another one. Nothing gets into the version unless its sha256 is what the manifest
records, so a rebuilt version is the published one or there is none.

    stage_rebuild    makes what is missing, in a staging directory: minutes of work for large weights
    adopt_rebuild    reads it again and moves it in, the weights last: without them a version is not full
"""

from pathlib import Path

from deploy import atomic, disk
from deploy.errors import StoreError, VerifyError
from deploy.lineage import Told, fold_lineage
from deploy.manifest import WEIGHTS_NAME, is_as_recorded
from deploy.store import VersionStore


def staging_name(version: int) -> str:
    """Return the name that a rebuild of a version is staged under."""
    return f"rebuild-{version}"


def lacking_files(store: VersionStore, version: int) -> list[str]:
    """Return the files of a version that are missing or not what its manifest records; reads them all.

    Raises:
        StoreError: there is no such version.
    """
    files, directory = store.manifest(version).files, store.path(version)
    return [name for name, record in files.items() if not is_as_recorded(directory / name, record)]


def stage_rebuild(store: VersionStore, version: int, *, told: Told | None = None) -> list[str]:
    """Make the files that a version lacks; returns their names. Changes nothing that anyone reads.

    Args:
        told: called with the number of tensors folded so far and of all there are.

    Raises:
        StoreError: there is no such version, or what is missing can be had from nowhere.
        VerifyError: the fold gives other weights than were published.
        OSError: for instance a full disk.
    """
    manifest, lacking = store.manifest(version), lacking_files(store, version)
    if WEIGHTS_NAME in lacking and manifest.kind == "initial":
        raise StoreError(
            f"version {version} is the first one: its weights are folded from nothing. Restore "
            f"{store.path(version) / WEIGHTS_NAME} from a copy."
        )
    staging = store.stage(staging_name(version))
    for name in lacking:
        if name != WEIGHTS_NAME:
            disk.copy(_find_copy(store, version, name), staging / name)
    if WEIGHTS_NAME in lacking:
        found = fold_lineage(store, version, manifest.lineage, staging / WEIGHTS_NAME, told=told)
        if found != manifest.files[WEIGHTS_NAME]:
            atomic.remove_tree(staging)
            raise VerifyError(
                f"version {version} cannot be rebuilt: folding {len(manifest.lineage)} deltas into the first "
                f"version gives sha256 {found.sha256}, expected "
                f"{manifest.files[WEIGHTS_NAME].sha256}. Nothing was changed: restore them from a copy."
            )
    return lacking


def adopt_rebuild(store: VersionStore, version: int) -> list[str]:
    """Move what was staged into the version; returns the names of the files.

    Raises:
        VerifyError: a staged file does not read back as what the manifest records; nothing was moved.
        OSError: the disk; begun again, it is finished.
    """
    files, directory = store.manifest(version).files, store.path(version)
    staging = store.staging_dir(staging_name(version))
    names = sorted((path.name for path in staging.iterdir()), key=lambda name: name == WEIGHTS_NAME)
    for name in names:
        (staging / name).chmod(0o444)
    atomic.fsync_tree(staging)
    for name in names:
        if name not in files or not is_as_recorded(staging / name, files[name]):
            raise VerifyError(f"{staging / name} is not what version {version}'s manifest records")
    for name in names:
        atomic.rename(staging / name, directory / name)
    atomic.remove_tree(staging)
    return names


def _find_copy(store: VersionStore, version: int, name: str) -> Path:
    """Return a file with the content that the manifest records, in another version.

    Raises:
        StoreError: there is none.
    """
    record = store.manifest(version).files[name]
    for other in store.versions():
        if store.manifest(other).files.get(name) == record and is_as_recorded(
            store.path(other) / name, record
        ):
            return store.path(other) / name
    raise StoreError(
        f"version {version} cannot be rebuilt: {name} with sha256 {record.sha256} is in no other version. "
        "Restore it from a copy."
    )
