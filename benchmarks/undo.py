"""One batch of three taken out, and a version whose weights were removed made again: are the bytes the same?

    python -m benchmarks.undo [--model bundled|ViT-B-16]

A store with three random updates of every matrix, rank 16. `dynlora revert` takes out the second: its weights
must be the fold of version 0 with the first and the third, bit for bit. `dynlora thin` removes the weights of
version 2 and `dynlora rebuild`, in a process with one thread and other BLAS kernels, makes them again: the
sha256 must be that of the manifest. Seconds are those of the whole commands, Python's start and the import
of torch where it is needed included.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import models, reporting
from benchmarks.program import dynlora
from daemon.home import create_home
from deploy.delta import load_delta, write_folded
from deploy.manifest import DELTA_NAME, WEIGHTS_NAME, file_record
from deploy.store import VersionStore
from deploy.weights import read_weights

OTHER_SETTINGS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Sandybridge"}
TAKEN_OUT = 2


def publish_random(store: VersionStore, version: int) -> str:
    """Publish one more version; returns its batch's id."""
    batch = f"{version:06d}-random"
    staging, manifest = models.stage_update(store, models.random_delta(store, version), batch)
    store.publish(staging, manifest)
    return batch


def fold_without(store: VersionStore, left_out: int, target: Path) -> str:
    """The sha256 of version 0 with all deltas folded in but one."""
    deltas = [load_delta(store.path(n) / DELTA_NAME) for n in (1, 2, 3) if n != left_out]
    write_folded(target, read_weights(store.path(0) / WEIGHTS_NAME), deltas)
    return file_record(target).sha256


def measure(home: Path, model: str) -> dict[str, Any]:
    """Figures of one model."""
    create_home(home)
    store = models.found(home, model)
    batches = [publish_random(store, version) for version in (1, 2, 3)]
    print("three versions are published", flush=True)
    revert = dynlora(home, "revert", batches[TAKEN_OUT - 1], "--insist")
    reverted = store.live_manifest()
    expected = fold_without(store, TAKEN_OUT, home / "expected.safetensors")
    print("the second is taken out", flush=True)
    recorded = store.manifest(TAKEN_OUT).files[WEIGHTS_NAME].sha256
    thin = dynlora(home, "thin", str(TAKEN_OUT))
    was_removed = not (store.path(TAKEN_OUT) / WEIGHTS_NAME).exists()
    rebuild = dynlora(home, "rebuild", str(TAKEN_OUT), **OTHER_SETTINGS)
    rebuilt = file_record(store.path(TAKEN_OUT) / WEIGHTS_NAME).sha256
    return {
        "model": model,
        "weights_bytes": reverted.files[WEIGHTS_NAME].bytes,
        "revert_seconds": revert,
        "revert_is_exact": reverted.kind == "revert" and reverted.files[WEIGHTS_NAME].sha256 == expected,
        "thin_seconds": thin,
        "rebuild_seconds": rebuild,
        "rebuild_is_exact": was_removed and rebuilt == recorded,
    }


def describe(result: dict[str, Any]) -> str:
    """Markdown."""
    exact = {True: "bit for bit", False: "DIFFERENT BYTES"}
    rows = [
        ["revert of batch 2 of 3", f"{result['revert_seconds']:.2f} s", exact[result["revert_is_exact"]]],
        ["thin", f"{result['thin_seconds']:.2f} s", ""],
        ["rebuild", f"{result['rebuild_seconds']:.2f} s", exact[result["rebuild_is_exact"]]],
    ]
    size = f"weights of {result['weights_bytes'] / 1e6:.0f} MB"
    return f"{result['model']}, {size}.\n\n" + reporting.table(["command", "seconds", "weights"], rows)


def main() -> None:
    """Run, print, and write results/undo-<model>.json and .md; exit 1 if any byte differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled")
    options = parser.parse_args()
    where = reporting.machine()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(Path(scratch, "home"), options.model) | {"machine": where}
    reporting.save(f"undo-{options.model}", result, describe(result))
    if not (result["revert_is_exact"] and result["rebuild_is_exact"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
