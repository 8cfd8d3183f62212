"""May this version come next? A pure decision over manifests; touches no disk."""

from deploy.errors import StoreError, VerifyError
from deploy.manifest import DELTA_NAME, REQUIRED_NAMES, WEIGHTS_NAME, LineageEntry, Manifest
from deploy.store_reader import Pin


def check_succession(
    manifest: Manifest, *, live: Manifest | None, next_version: int, pin: Pin | None
) -> None:
    """Check number, parent and lineage of a version that is about to be published.

    Args:
        live: the live version's manifest; None in an empty store.

    Raises:
        StoreError: a pin, a wrong number, another parent than the live version, a wrong lineage.
        VerifyError: the manifest does not list a file that every version holds.
    """
    missing = [name for name in REQUIRED_NAMES if name not in manifest.files]
    if missing:
        raise VerifyError(f"the manifest of version {manifest.version} does not list {missing}")
    if pin is not None:
        raise StoreError(
            f"version {pin.version} is pinned by {pin.who} ({pin.why}): "
            "nothing is published until `dynlora unpin`"
        )
    if manifest.version != next_version:
        raise StoreError(f"the next version is {next_version}, the manifest says {manifest.version}")
    parent = live.version if live is not None else None
    if manifest.parent != parent:
        raise StoreError(
            f"the new version was built on version {manifest.parent}, but version {parent} is live: "
            "build it again on the live one"
        )
    if live is not None and manifest.kind in ("update", "promote"):
        _check_appended(manifest, live)
    elif live is not None and manifest.kind == "revert":
        _check_taken_out(manifest, live)
    elif live is not None and manifest.kind == "regraph":
        _check_same_weights(manifest, live)


def _check_same_weights(manifest: Manifest, live: Manifest) -> None:
    """A regraph changes graphs and nothing that was learnt."""
    if manifest.lineage != live.lineage or manifest.files[WEIGHTS_NAME] != live.files[WEIGHTS_NAME]:
        raise StoreError(
            f"a version of kind 'regraph' has the weights and the lineage of version {live.version}"
        )
    if DELTA_NAME in manifest.files:
        raise StoreError(f"a version of kind 'regraph' adds no delta, but lists {DELTA_NAME}")


def _check_taken_out(manifest: Manifest, live: Manifest) -> None:
    """A revert's lineage is the live version's without the batch it names."""
    batch = manifest.batch.id if manifest.batch else None
    if batch not in {entry.batch for entry in live.lineage}:
        raise StoreError(f"{batch} is not in the lineage of version {live.version}; it cannot be reverted")
    expected = tuple(entry for entry in live.lineage if entry.batch != batch)
    if manifest.lineage != expected:
        raise StoreError(
            f"the lineage must be version {live.version}'s without {batch}; "
            f"expected {[entry.batch for entry in expected]}, "
            f"found {[entry.batch for entry in manifest.lineage]}"
        )
    if DELTA_NAME in manifest.files:
        raise StoreError(f"a version of kind 'revert' adds no delta, but lists {DELTA_NAME}")


def _check_appended(manifest: Manifest, live: Manifest) -> None:
    """An update's lineage is the live version's and its own delta."""
    delta, batch = manifest.files.get(DELTA_NAME), manifest.batch
    if delta is None or batch is None:
        raise StoreError(f"a version of kind {manifest.kind!r} holds its {DELTA_NAME}; it is not listed")
    expected = (*live.lineage, LineageEntry(batch=batch.id, delta_sha256=delta.sha256))
    if manifest.lineage != expected:
        raise StoreError(
            f"the lineage must be version {live.version}'s and then batch {batch.id} with its delta; "
            f"expected {[entry.batch for entry in expected]}, "
            f"found {[entry.batch for entry in manifest.lineage]}"
        )
