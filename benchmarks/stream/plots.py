"""Accuracy over the stream, and what was learnt against what was kept, as one picture."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from benchmarks.stream.methods import CHANGING

mpl.use("Agg")
from matplotlib import pyplot as plt


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    """Left: mean union accuracy after each task. Right: Last against the Tiny-ImageNet probe."""
    mpl.rcParams["svg.hashsalt"] = "dynlora"  # the same figures give the same file
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name in dict.fromkeys(cell["method"] for cell in cells):
        own = [cell for cell in cells if cell["method"] == name]
        curves = [[np.mean(c["zero_shot"]["union"]), *np.mean(c["union"], axis=1)] for c in own]
        mean = np.mean(curves, axis=0)
        places = np.arange(len(mean)) if len(mean) > 2 else np.array([0, len(cells[0]["zero_shot"]["union"])])
        line = "--" if name in CHANGING else "-"
        left.plot(places, mean, line, marker="o", markersize=3, label=name)
        kept = np.mean([next(iter(c["probes"].values())) for c in own])
        right.scatter(kept, mean[-1], label=name)
        right.annotate(name, (kept, mean[-1]), fontsize=8, xytext=(4, 2), textcoords="offset points")
    left.set(xlabel="tasks learnt (dashed: changes the architecture)", ylabel="accuracy among all names, %")
    left.legend(fontsize=8)
    right.set(xlabel="Tiny-ImageNet, never learnt, %", ylabel="accuracy among all names at the end, %")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
