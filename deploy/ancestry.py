"""Which deltas make a version's weights, and which versions brought them. Pure; touches no disk.

Every delta of a lineage was brought by the version itself or by one of its ancestors: an update and a
promotion add their own to their parent's, a revert leaves some out.
"""

from collections.abc import Mapping

from deploy.errors import ShareError
from deploy.manifest import DELTA_NAME, LineageEntry, Manifest


def brings(manifest: Manifest) -> LineageEntry | None:
    """Return the delta that a version brought itself; None where it brought none."""
    delta = manifest.files.get(DELTA_NAME)
    if delta is None or manifest.batch is None or manifest.kind not in {"update", "promote"}:
        return None
    return LineageEntry(batch=manifest.batch.id, delta_sha256=delta.sha256)


def delta_versions(lineage: tuple[LineageEntry, ...], known: Mapping[int, Manifest]) -> list[int]:
    """Return the numbers of the versions that brought a lineage's deltas, in the order of the fold.

    Raises:
        ShareError: one of them is not known.
    """
    sources = {entry: number for number, manifest in known.items() if (entry := brings(manifest))}
    missing = [entry.batch for entry in lineage if entry not in sources]
    if missing:
        raise ShareError(
            f"no version there brought the update of batch {missing[0]}; the history is not whole"
        )
    return [sources[entry] for entry in lineage]


def nearest_base(target: Manifest, candidates: Mapping[int, Manifest]) -> int | None:
    """Return the candidate that needs the fewest deltas to become the target; None where none can.

    The fold goes delta by delta, so weights that hold the first ones are as good a start as version 0.
    """
    fitting = [
        (len(manifest.lineage), number)
        for number, manifest in candidates.items()
        if target.lineage[: len(manifest.lineage)] == manifest.lineage
    ]
    return max(fitting)[1] if fitting else None
