"""How well the "unknown" score tells pictures of the names that are asked from all other pictures.

    python -m benchmarks.unknown [--data ../shared/data] [--serving DIR] [--most 400]

Each pack in turn is what is asked about: its test split is what should be known, the test splits of the other
packs are what should not (packs that share things with it are left out). AUROC: the share of pairs, one of
each, in which the strange picture has the higher score; 0.5 is chance. Beside it two common scores that cost
nothing either: one minus the highest softmax share among the names (MSP), and minus the highest cosine.
Without --serving the bundled model answers, as it is before it learns anything.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import models, reporting
from benchmarks.packs import decoded, images_of
from deploy.runtime import LoadedVersion
from deploy.store import VersionStore

# Packs asked about, each with those it shares things with.
SHARED = {
    "aerial_scenes_rsscn7": ("tiny_imagenet_200",),
    "caltech_objects": ("tiny_imagenet_200", "cifar10", "pacs_photo", "flowers5"),
    "cifar10": ("tiny_imagenet_200", "pacs_photo", "caltech_objects"),
    "clothing": ("tiny_imagenet_200", "caltech_objects"),
    "flowers5": ("tiny_imagenet_200", "caltech_objects"),
    "groceries": ("tiny_imagenet_200",),
    "pacs_photo": ("tiny_imagenet_200", "cifar10", "caltech_objects"),
}
ONLY_STRANGE = "tiny_imagenet_200"  # never asked about: it shares things with most
_AT_ONCE = 64
_SEED = 5

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Pack:
    """Names of a pack, and the embeddings (images, dim) of its test split, or of some of it."""

    names: tuple[str, ...]
    images: Float32


def read_pack(path: Path, version: LoadedVersion, *, most: int) -> Pack:
    """Embed at most so many pictures of a pack's test split, drawn from the whole of it."""
    files = images_of(path, "test")
    names = tuple(sorted({name for name, _ in files}))
    chosen = np.random.default_rng(_SEED).permutation(len(files))[:most]
    pictures = decoded(path, [files[index][1] for index in sorted(chosen)])
    parts = [pictures[i : i + _AT_ONCE] for i in range(0, len(pictures), _AT_ONCE)]
    print(f"{path.stem}: {len(names)} names, {len(pictures)} pictures", flush=True)
    return Pack(names, np.concatenate([version.encode_images(part) for part in parts]))


def auroc(known: NDArray[Any], strange: NDArray[Any]) -> float:
    """The share of pairs in which the strange one scores higher; ties count half."""
    ordered = np.sort(known)
    below = np.searchsorted(ordered, strange, side="left")
    upto = np.searchsorted(ordered, strange, side="right")
    return float((below + upto).sum() / (2 * len(known) * len(strange)))


def scores(version: LoadedVersion, images: Float32, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """The three scores of each picture, higher for stranger ones."""
    texts = version.embed_classes(list(names), ["a photo of a {}."] * len(names))
    cosines = images @ texts.T
    logits = cosines * version.manifest.logit_scale
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return {
        "unknown": np.array(version.unknown(images, list(names))),
        "msp": 1 - shares.max(axis=1) / shares.sum(axis=1),
        "cosine": -cosines.max(axis=1),
    }


def measure(version: LoadedVersion, packs: dict[str, Pack]) -> list[dict[str, Any]]:
    """One row for each pack that is asked about."""
    rows = []
    for asked, pack in packs.items():
        if asked == ONLY_STRANGE:
            continue
        others = [name for name in packs if name != asked and name not in SHARED[asked]]
        known = scores(version, pack.images, pack.names)
        strange = scores(version, np.concatenate([packs[name].images for name in others]), pack.names)
        rows.append(
            {"asked": asked, "names": len(pack.names), "against": others}
            | {score: auroc(known[score], strange[score]) for score in known}
        )
    return rows


def describe(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    kinds = ("unknown", "msp", "cosine")
    body = [
        [row["asked"], row["names"], len(row["against"]), *(f"{row[kind]:.3f}" for kind in kinds)]
        for row in rows
    ]
    means = [f"{np.mean([row[kind] for row in rows]):.3f}" for kind in kinds]
    return "AUROC of known against strange pictures, higher is better, 0.5 is chance.\n\n" + reporting.table(
        ["asked about", "names", "other packs", "unknown", "1 − highest share", "− highest cosine"],
        [*body, ["mean", "", "", *means]],
    )


def main() -> None:
    """Run, print, and write results/unknown-bundled.json and .md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--serving", type=Path, help="a store, instead of one with the bundled model")
    parser.add_argument("--most", type=int, default=400, help="pictures of each pack")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.serving:
            store = VersionStore(options.serving)
        else:
            store = models.found(Path(scratch, "home"), "bundled")
        with LoadedVersion(store.path(store.current())) as version:
            packs = {
                name: read_pack(options.data / f"{name}.zip", version, most=options.most)
                for name in (*SHARED, ONLY_STRANGE)
            }
            rows = measure(version, packs)
    if options.serving:
        print(describe(rows))
    else:
        reporting.save("unknown-bundled", {"rows": rows, "machine": reporting.machine()}, describe(rows))


if __name__ == "__main__":
    main()
