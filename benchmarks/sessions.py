"""Opening both towers in ONNX Runtime: time, memory and speed, with and without what it offers.

    python -m benchmarks.sessions [--model bundled|ViT-B-16] [--quick]

*default*        what deploy.opening does: all optimisations, pre-packed weights, an arena
*no arena*       memory for intermediate results comes from the C library
*no pre-packing* weights are used as they lie in the mapped file
*basic*          only the optimisations that are independent of the CPU
*none*           the graph as it was exported
*pre-optimised*  a graph that was optimised before and saved with its weights, opened without optimising: the
                 most that a cache of optimised graphs could bring

Each is opened in a process of its own; seconds are of that process on a CPU, so that other work on the
machine does not count; the best of several. *private* is memory that no other process can share: what is
mapped from the weights file is not in it. One thread, one picture a run. A quick run opens each once and
writes nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, reporting
from deploy.ort import onnxruntime as ort

VARIANTS = ("default", "no arena", "no pre-packing", "basic", "none", "pre-optimised")
TOWERS = {"vision_model.onnx": "pixel_values", "text_model.onnx": "input_ids"}
RUNS = 5


def options_of(variant: str) -> ort.SessionOptions:
    """Session options of one variant; apart from it as in deploy.opening."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    levels = ort.GraphOptimizationLevel
    if variant in {"none", "pre-optimised"}:
        options.graph_optimization_level = levels.ORT_DISABLE_ALL
    elif variant == "basic":
        options.graph_optimization_level = levels.ORT_ENABLE_BASIC
    elif variant == "no pre-packing":
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = variant != "no arena"
    return options


def private_bytes() -> int:
    """Anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def measure_here(directory: Path, variant: str) -> dict[str, float]:
    """Open both towers in this process and run them."""
    with np.load(directory / "reference.npz") as arrays:
        inputs = {name: arrays[name][:1] for name in TOWERS.values()}
    before, started = private_bytes(), time.process_time()
    sessions = {
        name: ort.InferenceSession(str(directory / name), options_of(variant), ["CPUExecutionProvider"])
        for name in TOWERS
    }
    figures = {"open_seconds": time.process_time() - started, "opened_bytes": private_bytes() - before}
    for name, session in sessions.items():
        seconds = []
        for _ in range(RUNS + 1):
            started = time.process_time()
            session.run(None, {TOWERS[name]: inputs[TOWERS[name]]})
            seconds.append(time.process_time() - started)
        figures[f"{name.partition('_')[0]}_run_seconds"] = min(seconds[1:])
    return figures | {"run_bytes": private_bytes() - before}


def optimise(directory: Path, target: Path) -> None:
    """Save both graphs as ONNX Runtime has optimised them for this CPU, weights outside."""
    (target / "reference.npz").write_bytes((directory / "reference.npz").read_bytes())
    for name in TOWERS:
        options = options_of("default")
        options.optimized_model_filepath = str(target / name)
        entries = {
            "session.optimized_model_external_initializers_file_name": f"{name}.data",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        }
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        ort.InferenceSession(str(directory / name), options, ["CPUExecutionProvider"])


def measure(directory: Path, variant: str, *, repeats: int) -> dict[str, float]:
    """Best of several processes."""
    command = [sys.executable, "-m", "benchmarks.sessions", "--here", str(directory), variant]
    found = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats)
    ]
    return {name: min(figures[name] for figures in found) for name in found[0]}


def describe(model: str, result: dict[str, dict[str, float]], extra_bytes: int) -> str:
    """Markdown of all variants."""
    rows = [
        [
            variant,
            f"{figures['open_seconds']:.3f} s",
            f"{figures['opened_bytes'] / 1e6:.0f} MB",
            f"{figures['run_bytes'] / 1e6:.0f} MB",
            f"{figures['vision_run_seconds'] * 1e3:.1f} ms",
            f"{figures['text_run_seconds'] * 1e3:.1f} ms",
        ]
        for variant, figures in result.items()
    ]
    header = ["variant", "open", "private, opened", "private, after runs", "one picture", "one text"]
    return (
        f"{model}. A pre-optimised graph holds its version's weights a second time, in another order: "
        f"{extra_bytes / 1e6:.0f} MB on disk for each version.\n\n" + reporting.table(header, rows)
    )


def main() -> None:
    """Run, print, and write results/sessions-<model>.json and .md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--here", nargs=2, metavar=("DIR", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure_here(Path(options.here[0]), options.here[1])))
        return
    where, result = reporting.machine(), {}
    with tempfile.TemporaryDirectory() as scratch:
        directory = models.found(Path(scratch, "home"), options.model).path(0)
        optimised = Path(scratch, "optimised")
        optimised.mkdir()
        optimise(directory, optimised)
        for variant in VARIANTS:
            place = optimised if variant == "pre-optimised" else directory
            result[variant] = measure(place, variant, repeats=1 if options.quick else 5)
        extra_bytes = sum(path.stat().st_size for path in optimised.glob("*_model.onnx*"))
    text = describe(options.model, result, extra_bytes)
    content: dict[str, Any] = {"model": options.model, "variants": result, "machine": where}
    if options.quick:
        print(text)
    else:
        reporting.save(f"sessions-{options.model}", content, text)


if __name__ == "__main__":
    main()
