"""Pictures and texts a second of the graphs as torch exports them, and as deploy.rewriting makes them.

    python -m benchmarks.graphs [--model bundled|ViT-B-16] [--quick]

*exported*   as torch's exporter wrote it, opened by ONNX Runtime's defaults
*rewritten*  after deploy.rewriting, opened in the same way
*opened*     the same, opened by deploy.opening, which leaves out one of ONNX Runtime's fusions

The same weights, one thread, all three in turn in one process; medians. *differs* is the largest difference
from the exported graph's answer. A quick run measures shortly and writes nothing.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx

from benchmarks import models, reporting
from deploy.manifest import GRAPH_NAMES, OPEN_CLIP_CONFIG_NAME, REFERENCE_NAME, WEIGHTS_NAME
from deploy.opening import open_session
from deploy.ort import onnxruntime as ort

BATCHES = {"bundled": (1, 8, 16), "ViT-B-16": (1, 4)}
SECONDS = {"bundled": 10.0, "ViT-B-16": 60.0}
INPUTS = dict(zip(GRAPH_NAMES, ("pixel_values", "input_ids"), strict=True))


def export_plainly(version_dir: Path, architecture: str, directory: Path) -> None:
    """Export a version's model again, without the rewriting, beside the same weights."""
    from deploy.export import export_graphs
    from dynlora.clip import load_version

    clip = load_version(version_dir / OPEN_CLIP_CONFIG_NAME, version_dir / WEIGHTS_NAME, architecture)
    with mock.patch("deploy.rewriting.rewrite"):
        export_graphs(clip.model, directory, context_length=clip.context_length, image_size=clip.image_size)
    (directory / WEIGHTS_NAME).write_bytes((version_dir / WEIGHTS_NAME).read_bytes())


def open_plainly(path: Path, _: int) -> Any:
    """As a program without dynlora would, with one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measure(
    ways: dict[str, tuple[Path, Callable[[Path, int], Any]]], inputs: np.ndarray, seconds: float
) -> tuple[dict[str, float], float]:
    """Median milliseconds a row, and the largest difference from the first way's answer."""
    (name,) = {path.name for path, _ in ways.values()}
    feed = {INPUTS[name]: inputs}
    sessions = {way: opened(path, 1) for way, (path, opened) in ways.items()}
    answers = {way: session.run(None, feed)[0] for way, session in sessions.items()}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(taken["opened"]) < 5:
        for way, session in sessions.items():
            started = time.perf_counter()
            session.run(None, feed)
            taken[way].append(time.perf_counter() - started)
    differs = max(float(np.abs(answer - answers["exported"]).max()) for answer in answers.values())
    return {way: float(np.median(found)) * 1e3 / len(inputs) for way, found in taken.items()}, differs


def nodes(path: Path) -> int:
    """How many operators a graph has."""
    return len(onnx.load(str(path), load_external_data=False).graph.node)


def main() -> None:
    """Run, print, and write results/graphs-<model>.json and .md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled", choices=tuple(BATCHES))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    where, rows, content = reporting.machine(), [], []
    with tempfile.TemporaryDirectory() as scratch:
        store = models.found(Path(scratch, "home"), options.model)
        version_dir, plain_dir = store.path(0), Path(scratch, "plain")
        plain_dir.mkdir()
        export_plainly(version_dir, store.manifest(0).architecture, plain_dir)
        with np.load(version_dir / REFERENCE_NAME) as arrays:
            references = {name: arrays[INPUTS[name]] for name in GRAPH_NAMES}
        for name in GRAPH_NAMES:
            ways = {
                "exported": (plain_dir / name, open_plainly),
                "rewritten": (version_dir / name, open_plainly),
                "opened": (version_dir / name, open_session),
            }
            counts = f"{nodes(plain_dir / name)}, {nodes(version_dir / name)}"
            for batch in BATCHES[options.model]:
                inputs = np.resize(references[name], (batch, *references[name].shape[1:]))
                found, differs = measure(ways, inputs, SECONDS[options.model] / (20 if options.quick else 1))
                content.append({"graph": name, "batch": batch, "milliseconds": found, "differs": differs})
                speed = found["exported"] / found["opened"]
                figures = [f"{found[way]:.3f}" for way in ways]
                rows.append([name, counts, str(batch), *figures, f"{speed:.2f}", f"{differs:.1e}"])
    header = ["graph", "nodes", "batch", "exported, ms a row", "rewritten", "opened", "faster", "differs"]
    text = f"{options.model}, one thread.\n\n" + reporting.table(header, rows)
    if options.quick:
        print(text)
    else:
        reporting.save(f"graphs-{options.model}", {"figures": content, "machine": where}, text)


if __name__ == "__main__":
    main()
