"""Version 0: a CLIP from anywhere becomes the first version of a store. Runs in the worker only."""

import io
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from daemon import general
from daemon.errors import ConfigError
from deploy import atomic
from deploy.export import REFERENCE_TEXTS, export_graphs, reference_outputs, state_arrays
from deploy.manifest import (
    CLASS_EMBEDDINGS_NAME,
    OPEN_CLIP_CONFIG_NAME,
    PREPROCESSOR_NAME,
    TOKENIZER_NAME,
    WEIGHTS_NAME,
    ClassEntry,
    ClassesFile,
    Manifest,
    class_key,
    save_classes,
)
from deploy.preprocess import Preprocessing
from deploy.store import VersionStore
from deploy.tokenize import adopt_tokenizer_json, build_tokenizer_json
from deploy.verify import verify_staged
from deploy.weights import write_weights
from dynlora.clip import Clip, load_clip
from dynlora.prompts import DEFAULT_TEMPLATE, encode_text, tokenize
from dynlora.tokenizer import FileTokenizer

SOFTWARE = ("torch", "open_clip_torch", "onnx", "onnxruntime", "numpy", "dynlora")


class Phases(Protocol):
    """Whoever wants to know what is being done."""

    def phase(self, name: str) -> None:
        """Say what is being done now."""

    def step(self, **fields: int) -> None:
        """Say how far it has come: `step` of `steps`."""


def found_store(
    home: Path,
    model: str,
    pretrained: str | None,
    classes_file: Path | None,
    *,
    images: Path | None = None,
    outlet: Phases,
) -> int:
    """Export the graphs, write weights and class names, verify, publish as version 0; returns 0.

    Args:
        images: a folder of any images, which say what the model answers in general (`daemon.general`).

    Raises:
        ConfigError: the classes file is missing, empty, or names a class twice; or `images` holds too few.
        ModelError: the model cannot be loaded or adapted.
        DeployError: the export or its verification failed; nothing was published.
    """
    entries = read_class_names(classes_file) if classes_file else ()
    clip = load_clip(model, pretrained)
    embed_dim = int(clip.model_cfg["embed_dim"])
    moments = None
    if images:
        outlet.phase("look")
        moments = general.moments_of_folder(
            clip, images, told=lambda done, count: outlet.step(step=done, steps=count)
        )
    elif model == "bundled" and pretrained is None:
        moments = general.bundled_moments(embed_dim)
    store = VersionStore(home / "serving")
    store.create()
    staging = store.stage("initial")
    outlet.phase("export")
    weights = write_weights(staging / WEIGHTS_NAME, state_arrays(clip.model))
    general.keep(home, moments, of=weights.sha256)
    export_graphs(clip.model, staging, context_length=clip.context_length, image_size=clip.image_size)
    _write_companions(staging, clip)
    write_class_list(staging, clip, entries)
    write_reference(staging, clip)
    outlet.phase("verify")
    checked = verify_staged(staging, embed_dim=embed_dim)
    manifest = Manifest(
        version=0,
        kind="initial",
        architecture=clip.architecture,
        embed_dim=embed_dim,
        context_length=clip.context_length,
        logit_scale=float(clip.model.logit_scale.exp()),  # type: ignore[operator]
        logit_bias=clip.logit_bias,
        files=checked.files,
        metrics={"parity": checked.parity},
        software=software_versions(),
    )
    return store.publish(staging, manifest)


def read_class_names(path: Path) -> tuple[ClassEntry, ...]:
    """One class name per line; blank lines and lines that start with `#` are skipped.

    Raises:
        ConfigError: the file cannot be read, holds no name, or names a class twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read class names from {path}: {error}; expected one name per line"
        ) from error
    names = [name for line in lines if (name := line.strip()) and not name.startswith("#")]
    seen: dict[str, str] = {}
    for name in names:
        key = class_key(name)
        if not key:
            raise ConfigError(f"{path}: {name!r} is no class name; expected letters or digits")
        if key in seen:
            raise ConfigError(f"{path} names one class twice, as {seen[key]!r} and {name!r}; remove one")
        seen[key] = name
    if not names:
        raise ConfigError(f"{path} holds no class name; expected one per line")
    return tuple(ClassEntry(name=name, key=class_key(name), template=DEFAULT_TEMPLATE) for name in names)


def write_class_list(staging: Path, clip: Clip, entries: Sequence[ClassEntry]) -> None:
    """classes.json, and class_embeddings.npy: (classes, dim) float32, L2-normalised, in the same order."""
    save_classes(staging, ClassesFile(classes=tuple(entries)))
    embeddings = np.zeros((0, int(clip.model_cfg["embed_dim"])), np.float32)
    if entries:
        prompts = tokenize(clip, [e.name for e in entries], [e.template for e in entries])
        with torch.no_grad():
            embeddings = encode_text(clip.model, prompts).numpy()
    atomic.write_file(staging / CLASS_EMBEDDINGS_NAME, _npy(embeddings), is_flushed=False)


def write_reference(staging: Path, clip: Clip, *, image_embeds: NDArray[np.float32] | None = None) -> None:
    """reference.npz: fixed inputs and this model's outputs, by torch; `image_embeds` perhaps earlier."""
    reference_outputs(
        clip.model,
        staging,
        input_ids=clip.tokenizer(list(REFERENCE_TEXTS)).numpy(),
        image_size=clip.image_size,
        image_embeds=image_embeds,
    )


def software_versions() -> dict[str, str]:
    """The releases that took part."""
    return {name: version(name) for name in SOFTWARE}


def _write_companions(staging: Path, clip: Clip) -> None:
    """The files that stay the same for all versions of one architecture."""
    atomic.write_text(staging / TOKENIZER_NAME, _tokenizer_json(clip))
    Preprocessing.from_open_clip_cfg(clip.preprocess_cfg).save(staging / PREPROCESSOR_NAME)
    config: dict[str, Any] = {"model_cfg": clip.model_cfg, "preprocess_cfg": clip.preprocess_cfg}
    atomic.write_text(staging / OPEN_CLIP_CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def _tokenizer_json(clip: Clip) -> str:
    tokenizer, length = clip.tokenizer, clip.context_length
    if isinstance(tokenizer, FileTokenizer):
        return adopt_tokenizer_json(
            tokenizer.content, context_length=length, clean=tokenizer.clean, pad_id=tokenizer.pad_id
        )
    return plain_tokenizer_json(tokenizer)


def plain_tokenizer_json(tokenizer: Any) -> str:
    """tokenizer.json of CLIP's own tokenizer."""
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    return build_tokenizer_json(tokenizer.encoder, merges, tokenizer.context_length)


def _npy(array: NDArray[np.float32]) -> bytes:
    """The array as the content of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
