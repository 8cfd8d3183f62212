"""What publishing costs: writing a version against exporting the model again, and against a raw copy.

    python -m benchmarks.publish [--model bundled|ViT-B-16] [--quick]

*re-export*  both towers with torch.onnx.export, weights outside: what a store without one weights file does
*copy*       the bytes of weights.safetensors from memory to a new file, with fsync
*write*      the delta in memory → fold → one aligned file, hashed meanwhile → fsync → rename
*verify*     everything re-read: checksums, structure, ONNX Runtime against the reference outputs

Each is repeated in turn, so that a busy moment of the machine meets all alike; the best of each counts.
Verify runs in a process of its own, whose peak memory is read from the kernel; what an empty such process
has, with its libraries loaded, is told apart. A quick run repeats once and writes no results.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import models, reporting
from deploy import atomic
from deploy.delta import Delta, write_folded
from deploy.manifest import WEIGHTS_NAME
from deploy.store import VersionStore
from deploy.weights import read_weights

VERIFY = """
import sys, time
from pathlib import Path
import onnx
from deploy.ort import onnxruntime
from deploy.verify import verify_staged

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

empty, started = peak(), time.perf_counter()
verify_staged(Path(sys.argv[1]), embed_dim=int(sys.argv[2]))
print(time.perf_counter() - started, peak(), empty)
"""


def reexport(directory: Path, version_dir: Path) -> float:
    """Seconds of writing both graphs with their weights by torch.onnx.export, the model being in memory."""
    import torch

    from deploy import export
    from deploy.manifest import load_manifest
    from dynlora.clip import load_version

    architecture = load_manifest(version_dir).architecture
    clip = load_version(version_dir / "open_clip_config.json", version_dir / WEIGHTS_NAME, architecture)
    pixels = torch.zeros(2, 3, *clip.image_size)
    tokens = torch.zeros(2, clip.context_length, dtype=torch.int64)
    started = time.perf_counter()
    image, text = export._ImageEncoder(clip.model), export._TextEncoder(clip.model)  # noqa: SLF001 - the same
    for encoder, name, example in ((image, "pixel_values", pixels), (text, "input_ids", tokens)):
        with export._as_exported(clip.model):  # noqa: SLF001
            program = torch.onnx.export(
                encoder.eval(),
                (example,),
                dynamo=True,
                optimize=False,
                opset_version=export.OPSET,
                verbose=False,
                input_names=[name],
                dynamic_shapes={name: {0: torch.export.Dim("batch")}},
            )
        program.save(directory / f"{name}.onnx", external_data=True)
    for path in directory.iterdir():
        atomic.fsync_file(path)
    return time.perf_counter() - started


def copy(directory: Path, weights: Path) -> float:
    """Seconds of writing the same bytes from memory, fsync included."""
    content = weights.read_bytes()
    started = time.perf_counter()
    with (directory / "copy").open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    return time.perf_counter() - started


def write(directory: Path, weights: Path, delta: Delta) -> float:
    """Seconds from a delta in memory to a weights file that is whole, hashed and durable."""
    started = time.perf_counter()
    write_folded(directory / WEIGHTS_NAME, read_weights(weights), [delta])
    return time.perf_counter() - started


def verify(staging: Path, embed_dim: int) -> tuple[float, int, int]:
    """Seconds, peak bytes, and the bytes of an empty process."""
    command = [sys.executable, "-c", VERIFY, str(staging), str(embed_dim)]
    seconds, peak, empty = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(seconds), int(peak), int(empty)


def measure(store: VersionStore, *, repeats: int) -> dict[str, Any]:
    """Best of each, in seconds and bytes."""
    version_dir = store.path(0)
    weights = version_dir / WEIGHTS_NAME
    delta = models.random_delta(store, 1)
    staging, manifest = models.stage_update(store, delta, "000001-random")
    seconds: dict[str, list[float]] = {"re-export": [], "copy": [], "write": [], "verify": []}
    peaks = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(dir=store.serving_dir) as scratch:
            seconds["copy"].append(copy(Path(scratch), weights))
        with tempfile.TemporaryDirectory(dir=store.serving_dir) as scratch:
            seconds["write"].append(write(Path(scratch), weights, delta))
        took, *memory = verify(staging, manifest.embed_dim)
        seconds["verify"].append(took)
        peaks.append(memory)
        with tempfile.TemporaryDirectory(dir=store.serving_dir) as scratch:
            seconds["re-export"].append(reexport(Path(scratch), version_dir))
    return {
        "seconds": {name: min(values) for name, values in seconds.items()},
        "all_seconds": seconds,
        "weights_bytes": weights.stat().st_size,
        "delta_rank": 16,
        "verify_peak_bytes": max(peak for peak, _ in peaks),
        "verify_empty_bytes": max(empty for _, empty in peaks),
    }


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """The figures that goals speak of."""
    seconds, weights = result["seconds"], result["weights_bytes"]
    export_and_verify = seconds["re-export"] + seconds["verify"]
    peak, empty = result["verify_peak_bytes"], result["verify_empty_bytes"]
    return {
        "re-export / write": seconds["re-export"] / seconds["write"],
        "write / copy": seconds["write"] / seconds["copy"],
        "(re-export + verify) / (write + verify)": export_and_verify / (seconds["write"] + seconds["verify"]),
        "verify peak / weights": peak / weights,
        "verify peak beyond an empty process / weights": (peak - empty) / weights,
    }


GOALS = {
    "re-export / write": (10, True),
    "write / copy": (3, False),
    "(re-export + verify) / (write + verify)": (3, True),
    "verify peak / weights": (3, False),
    "verify peak beyond an empty process / weights": (3, False),
}


def main() -> None:
    """Run, print, and write results/publish-<model>.json and .md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    where = reporting.machine()
    with tempfile.TemporaryDirectory() as scratch:
        store = models.found(Path(scratch, "home"), options.model)
        result = measure(store, repeats=1 if options.quick else 5)
    result |= {"model": options.model, "ratios": ratios(result), "machine": where}
    rows = [[name, f"{seconds:.3f} s", ""] for name, seconds in result["seconds"].items()]
    rows += [
        [name, f"{value:.2f}", reporting.verdict(value, goal=GOALS[name][0], at_least=GOALS[name][1])]
        for name, value in result["ratios"].items()
    ]
    text = (
        f"{options.model}, weights of {result['weights_bytes'] / 1e6:.0f} MB, "
        "a rank-16 update of every matrix, "
        f"peak memory of verify {result['verify_peak_bytes'] / 1e6:.0f} MB "
        f"({result['verify_empty_bytes'] / 1e6:.0f} MB with nothing done).\n\n"
        + reporting.table(["what", "figure", "goal"], rows)
    )
    if options.quick:
        print(text)
    else:
        reporting.save(f"publish-{options.model}", result, text)


if __name__ == "__main__":
    main()
