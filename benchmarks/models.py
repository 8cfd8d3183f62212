"""Models to measure on, stores that hold one of them, and updates of the size that learning makes.

`bundled` is the model in this repository. Any open_clip name, such as ViT-B-16, is built from its
configuration with random weights: nothing is downloaded, and time and memory do not depend on values.
"""

import contextlib
import io
import logging
from pathlib import Path

import numpy as np

from deploy.delta import Delta, Factor, load_delta, save_delta, write_folded
from deploy.manifest import (
    CLASS_EMBEDDINGS_NAME,
    CLASSES_NAME,
    DELTA_NAME,
    REFERENCE_NAME,
    WEIGHTS_NAME,
    BatchInfo,
    ImageCounts,
    LineageEntry,
    Manifest,
    load_classes,
    record_files,
)
from deploy.opening import open_session
from deploy.store import VersionStore
from deploy.weights import read_weights

CLASSES = ("apple", "boot", "lemon", "bus", "oak tree", "violin", "kettle", "map")
_SEED = 7


class Quiet:
    """Takes the founding's word of what is being done, and says nothing."""

    def phase(self, name: str) -> None:
        """Say what is being done now."""

    def step(self, **fields: int) -> None:
        """The same."""


def random_weights(architecture: str, directory: Path) -> Path:
    """Write a checkpoint of an open_clip architecture with seeded random weights."""
    import open_clip
    import safetensors.torch
    import torch

    torch.manual_seed(_SEED)
    logging.disable(logging.WARNING)  # open_clip warns that the weights are random, which is meant
    model = open_clip.create_model(architecture, pretrained=None, precision="fp32")
    logging.disable(logging.NOTSET)
    path = directory / f"{architecture}.safetensors"
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path
    )
    return path


def found(home: Path, model: str) -> VersionStore:
    """Make a home whose store has version 0 of the model, knowing CLASSES."""
    from daemon.founding import found_store

    home.mkdir(parents=True, exist_ok=True)
    names = home / "names.txt"
    names.write_text("\n".join(CLASSES) + "\n")
    weights = None if model == "bundled" else random_weights(model, home)
    with contextlib.redirect_stdout(io.StringIO()):
        found_store(home, model, str(weights) if weights else None, names, outlet=Quiet())
    if weights:
        weights.unlink()
    return VersionStore(home / "serving")


def random_delta(store: VersionStore, seed: int, *, rank: int = 16, scale: float = 0.02) -> Delta:
    """A small random update of every matrix that learning updates, q, k and v apart, before any pruning."""
    weights = read_weights(store.path(store.current()) / WEIGHTS_NAME)
    rng = np.random.default_rng(seed)

    def factor(key: str, start: int, stop: int) -> Factor:
        shapes = ((stop - start, rank), (rank, weights[key].shape[1]), (rank,))
        parts = (scale**0.5 * rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
        return Factor(key, start, stop, *parts)

    factors = []
    for key in _updated_keys(weights):
        rows, columns = weights[key].shape
        step = columns if ".attn." in key and rows in {2 * columns, 3 * columns} else rows
        factors += [factor(key, start, start + step) for start in range(0, rows, step)]
    return Delta(factors)


def _updated_keys(weights: dict[str, np.ndarray]) -> list[str]:
    """The attention and MLP matrices of both towers' blocks."""
    return [
        key
        for key, value in weights.items()
        if value.ndim == 2 and (".attn." in key or ".mlp." in key) and key.endswith("weight")
    ]


def stage_update(store: VersionStore, delta: Delta, batch: str) -> tuple[Path, Manifest]:
    """Stage the live version with one more delta; ready for store.publish.

    Embeddings and reference outputs come from ONNX Runtime here, torch's part being of no interest.
    """
    live = store.live_manifest()
    staging = store.stage(batch, like=live.version)
    record = save_delta(staging / DELTA_NAME, delta)
    parent = store.path(live.version)
    write_folded(
        staging / WEIGHTS_NAME, read_weights(parent / WEIGHTS_NAME), [load_delta(staging / DELTA_NAME)]
    )
    _write_outputs(staging, parent)
    manifest = Manifest(
        version=store.next_version(),
        parent=live.version,
        kind="update",
        batch=BatchInfo(
            id=batch,
            classes=CLASSES[:1],
            images=ImageCounts(train=8, tune=1, exam=2),
            content_sha256=record.sha256,
        ),
        lineage=(*live.lineage, LineageEntry(batch=batch, delta_sha256=record.sha256)),
        architecture=live.architecture,
        embed_dim=live.embed_dim,
        context_length=live.context_length,
        logit_scale=live.logit_scale,
        files=record_files(staging),
    )
    return staging, manifest


def _write_outputs(staging: Path, parent: Path) -> None:
    """The class list with embeddings, and reference.npz, of the staged weights."""
    from deploy.tokenize import Tokenizer

    (staging / CLASSES_NAME).write_bytes((parent / CLASSES_NAME).read_bytes())
    entries = load_classes(staging).classes
    tokens = Tokenizer.load(staging / "tokenizer.json")([e.template.replace("{}", e.name) for e in entries])
    with np.load(parent / REFERENCE_NAME) as arrays:
        reference = dict(arrays)
    text = open_session(staging / "text_model.onnx", 1)
    vision = open_session(staging / "vision_model.onnx", 1)
    np.save(staging / CLASS_EMBEDDINGS_NAME, text.run(None, {"input_ids": tokens})[0])
    reference["text_embeds"] = text.run(None, {"input_ids": reference["input_ids"]})[0]
    reference["image_embeds"] = vision.run(None, {"pixel_values": reference["pixel_values"]})[0]
    np.savez(staging / REFERENCE_NAME, **reference)
