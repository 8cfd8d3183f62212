"""What `dynlora analyze` draws: where rank went, what each location gives and costs. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

from daemon.charts import matrix_kinds

Trials = Sequence[Mapping[str, Any]]


def draw(trials: Trials, out: Path) -> list[Path]:
    """Write the three drawings into `out`, each as SVG and PNG; returns the files."""
    mpl.rcParams["svg.hashsalt"] = "dynlora"  # the same figures give the same file
    files = []
    for name, make in (("ranks", _ranks), ("trade-off", _trade_off), ("locations", _locations)):
        figure = make(trials)
        for suffix in ("svg", "png"):
            path = out / f"{name}.{suffix}"
            figure.savefig(path, metadata={"Date": None} if suffix == "svg" else None)
            files.append(path)
        plt.close(figure)
    return files


def allocation(
    kept_ranks: Mapping[str, int], tower: str
) -> tuple[list[str], "np.ndarray[Any, np.dtype[np.float64]]"]:
    """A tower's kinds of matrices, and their kept ranks (kinds, blocks); NaN where a block has none such."""
    found = [name.split(".") for name in kept_ranks if name.startswith(f"{tower}.")]
    kinds = matrix_kinds(kind for _, _, kind in found)
    grid = np.full((len(kinds), 1 + max(int(block) for _, block, _ in found)), np.nan)
    for _, block, kind in found:
        grid[kinds.index(kind), int(block)] = kept_ranks[f"{tower}.{block}.{kind}"]
    return kinds, grid


def _ranks(trials: Trials) -> Any:
    """Kept rank, module × layer, where the whole model could be updated at the largest rank."""
    whole = max((t for t in trials if t["location"] == "all"), key=lambda t: t["rank"])
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, tower in zip(axes, ("vision", "text"), strict=True):
        kinds, grid = allocation(whole["kept_ranks"], tower)
        image = axis.imshow(grid, vmin=0, vmax=whole["rank"], aspect="auto")
        axis.set(title=tower, xlabel="block", yticks=range(len(kinds)), yticklabels=kinds)
    figure.colorbar(image, ax=axes, label="kept rank")
    return figure


def _trade_off(trials: Trials) -> Any:
    """Plasticity against stability, one point per location and rank."""
    figure, axis = plt.subplots(figsize=(6, 5), layout="constrained")
    for t in trials:
        axis.scatter(t["retention"], t["new_accuracy"], s=20 + 4 * t["rank"], color="C0", alpha=0.6)
        label = f"{t['location']} {t['rank']}"
        axis.annotate(label, (t["retention"], t["new_accuracy"]), fontsize=7)
    axis.set(xlabel=f"kept ({_measure(trials)})", ylabel="accuracy on the batch's held-out images")
    return figure


def _locations(trials: Trials) -> Any:
    """What each location gains on the batch and loses elsewhere, at each rank."""
    before, *rest = trials
    names = list(dict.fromkeys(t["location"] for t in rest))
    ranks = sorted({t["rank"] for t in rest})
    figure, axes = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    for axis, key, title in (
        (axes[0], "new_accuracy", "gain on the batch"),
        (axes[1], "retention", f"change of what is kept ({_measure(trials)})"),
    ):
        for number, rank in enumerate(ranks):
            values = [t[key] - before[key] for t in rest if t["rank"] == rank]
            places = np.arange(len(names)) + 0.8 * number / len(ranks)
            axis.bar(places, values, width=0.8 / len(ranks), label=f"rank {rank}", align="edge")
        axis.set(title=title)
        axis.axhline(0, color="black", linewidth=0.5)
    axes[0].legend()
    axes[1].set_xticks(np.arange(len(names)) + 0.4, names)
    return figure


def _measure(trials: Trials) -> str:
    return "cosines with before" if trials[0]["probe_accuracy"] is None else "accuracy on the probe"
