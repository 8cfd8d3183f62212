"""Random-weight models of real configurations, taken the whole way: found, adapt, fold, publish, ask."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file

from daemon.adaptation import to_delta
from daemon.founding import found_store
from daemon.staging import inherited, write_beside_weights
from deploy.delta import load_delta, save_delta, write_folded
from deploy.manifest import (
    DELTA_NAME,
    OPEN_CLIP_CONFIG_NAME,
    WEIGHTS_NAME,
    ClassEntry,
    Manifest,
    class_key,
    load_classes,
    record_files,
)
from deploy.store import VersionStore
from deploy.weights import read_weights
from dynlora.clip import Clip, build_model, load_version
from dynlora.learner import adapt
from dynlora.settings import Settings
from dynlora.task import Name, Task

WORDS = ("a", "photo", "of", "cat", "dog", "red", "shoe", "lemon", "the", "Σίσυφος", "ß")


class Phases:
    """Nobody wants to know."""

    def phase(self, name: str) -> None:
        """Say nothing."""

    def step(self, **fields: int) -> None:
        """The same."""


def write_model(directory: Path, config: dict[str, Any], *, vocabulary: int = 64) -> Path:
    """open_clip's folder of one model with random weights; with a tokenizer where its config names one."""
    torch.manual_seed(3)
    model = build_model(config)
    if model.logit_bias is not None:
        model.logit_scale.data.fill_(2.0)
    directory.mkdir()
    size = model.visual.image_size
    preprocess = {"size": size, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (directory / "open_clip_config.json").write_text(json.dumps(content))
    save_file(model.state_dict(), directory / "open_clip_model.safetensors")
    if "hf_tokenizer_name" in config["text_cfg"]:
        write_tokenizer(directory, min(vocabulary, config["text_cfg"]["vocab_size"]))
    return directory


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """A sentencepiece-like tokenizer, as T5's: words and letters, `</s>` at the end, which also fills up."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -3.0)]
    pieces += [(f"▁{word.lower()}", -1.0) for word in WORDS] + [(letter, -4.0) for letter in letters]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces[:vocabulary], unk_id=2))
    tokenizer.normalizer = tokenizers.normalizers.NFKC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "</s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(described | {"unk_token": "<unk>"}))


def publish_founded(home: Path, model_dir: Path) -> VersionStore:
    """Version 0 of a model in a folder."""
    names = home.parent / "names.txt"
    names.write_text("dog\nred shoe\n")
    found_store(home, f"local-dir:{model_dir}", None, names, outlet=Phases())
    return VersionStore(home / "serving")


def load(store: VersionStore, version: int) -> Clip:
    """A published version, as the worker loads it."""
    directory = store.path(version)
    return load_version(
        directory / OPEN_CLIP_CONFIG_NAME, directory / WEIGHTS_NAME, store.manifest(version).architecture
    )


def task_for(clip: Clip, images: int = 6) -> Task:
    """Two classes of coloured noise."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, *clip.image_size, generator=generator)
    labels = torch.arange(images) % 2
    pixels[labels == 1, 0] += 2
    return Task([Name("cat"), Name("lemon")], pixels, labels, known=[Name("dog"), Name("red shoe")])


def learn_and_publish(store: VersionStore, settings: Settings) -> tuple[int, torch.Tensor, Task]:
    """Adapt, fold and publish; the version, what torch says with the factors merged naively, the task."""
    clip = load(store, 0)
    task = task_for(clip)
    adaptation = adapt(clip, task, settings, seed=1)
    expected = _embeddings_with(clip, adaptation, task)
    parent = store.live_manifest()
    staging = store.stage("000001-cat", like=0)
    save_delta(staging / DELTA_NAME, to_delta(adaptation))
    base = read_weights(store.path(0) / WEIGHTS_NAME)
    write_folded(staging / WEIGHTS_NAME, base, [load_delta(staging / DELTA_NAME)])
    new = [
        ClassEntry(name=c.name, key=class_key(c.name), template=c.template, batch="000001-cat")
        for c in task.classes
    ]
    drift = write_beside_weights(staging, store, parent, (*load_classes(store.path(0)).classes, *new))
    assert drift > 0
    info = {"id": "000001-cat", "classes": ["cat", "lemon"], "content_sha256": "0" * 64}
    info |= {"images": {"train": 6, "tune": 0, "exam": 0}}
    files = record_files(staging)
    lineage = [{"batch": "000001-cat", "delta_sha256": files[DELTA_NAME].sha256}]
    draft = {"version": 1, "kind": "update", "batch": info, "lineage": lineage, **inherited(parent, files)}
    return store.publish(staging, Manifest(**draft)), expected, task


def _embeddings_with(clip: Clip, adaptation: Any, task: Task) -> torch.Tensor:
    """What a plain model says whose weights have every rank-one term added, one by one, in float64."""
    state = {
        key: value.double() for key, value in clip.model.state_dict().items() if value.is_floating_point()
    }
    for factor in adaptation.factors:
        for i in range(len(factor.importance)):
            term = torch.outer(factor.lora_B[:, i].double(), factor.lora_A[i].double())
            state[factor.key][factor.row_start : factor.row_stop] += factor.importance[i].double() * term
    model = build_model(clip.model_cfg).eval()
    model.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)
    with torch.no_grad():
        embeddings: torch.Tensor = model.encode_image(task.pixels, normalize=True)
    return embeddings


def differing(one: Any, other: Any) -> float:
    """Largest absolute difference."""
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())
