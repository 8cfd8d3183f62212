"""One loaded version: answers as torch would, refuses damaged files, holds and frees what it uses."""

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2

from deploy.errors import ClientError, ImageError, ManifestError, VerifyError
from deploy.manifest import file_record
from deploy.preprocess import decode_image
from deploy.runtime import LoadedVersion
from tests.deploy.swaps import open_below

IMAGES = sorted((Path(__file__).parents[2] / "examples/demo/images/never_dropped").rglob("*.jpg"))[::20][:9]
USED = [
    "classes.json",
    "class_embeddings.npy",
    "preprocessor_config.json",
    "tokenizer.json",
    "reference.npz",
    "vision_model.onnx",
    "text_model.onnx",
    "weights.safetensors",
]


@pytest.fixture(scope="module")
def loaded(version_dir: Path) -> LoadedVersion:
    """Version 0, loaded."""
    return LoadedVersion(version_dir)


@pytest.fixture
def own_version(version_dir: Path, tmp_path: Path) -> Path:
    """A copy of version 0 that a test may damage."""
    own = tmp_path / "versions" / "0"
    shutil.copytree(version_dir, own)
    for path in own.iterdir():
        path.chmod(0o644)
    return own


@pytest.fixture(scope="module")
def torch_model(version_dir: Path) -> Any:
    """Plain open_clip with the version's own config and weights."""
    config = json.loads((version_dir / "open_clip_config.json").read_text())
    model = open_clip.CLIP(**config["model_cfg"]).eval()
    open_clip.load_checkpoint(model, str(version_dir / "weights.safetensors"), strict=True)
    transform = image_transform_v2(PreprocessCfg(**config["preprocess_cfg"]), is_train=False)
    return model, transform, open_clip.SimpleTokenizer()


def rewrite(directory: Path, name: str, change: Callable[[Path], object]) -> None:
    """Change a file and record its new hash, as a publisher that does not check would."""
    change(directory / name)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][name] = file_record(directory / name).model_dump()
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_images_are_embedded_as_by_open_clip(loaded: LoadedVersion, torch_model: Any) -> None:
    """From the file to the embedding, ONNX Runtime and torch agree within 1e-5."""
    model, transform, _ = torch_model
    with torch.no_grad():
        pixels = torch.stack([transform(decode_image(path)) for path in IMAGES])
        expected = model.encode_image(pixels, normalize=True).numpy()
    difference = np.abs(expected - loaded.encode_images(IMAGES)).max()

    print(f"images: max |difference| to torch {difference:.2g}")
    assert difference <= 1e-5


def test_texts_are_embedded_as_by_open_clip(loaded: LoadedVersion, torch_model: Any) -> None:
    """Also texts that are empty, hostile or too long."""
    model, _, tokenizer = torch_model
    texts = ["a cat", "", "&amp;lt; <end_of_text> Ã©", "very long " * 300, "你好"]
    with torch.no_grad():
        expected = model.encode_text(tokenizer(texts), normalize=True).numpy()
    difference = np.abs(expected - loaded.encode_texts(texts)).max()

    print(f"texts: max |difference| to torch {difference:.2g}")
    assert difference <= 1e-5


def test_classify_gives_the_models_probabilities(loaded: LoadedVersion, torch_model: Any) -> None:
    """Scores are the softmax over all known classes, best first, and add up to 1."""
    model, transform, tokenizer = torch_model
    with torch.no_grad():
        pixels = torch.stack([transform(decode_image(path)) for path in IMAGES])
        prompts = tokenizer([f"a photo of a {name}." for name in loaded.class_names])
        logits, _ = model.get_logits(pixels, prompts)
        expected = logits.softmax(dim=-1).numpy()
    answers = loaded.classify(IMAGES, top=len(loaded.class_names))

    for row, predictions in zip(expected, answers, strict=True):
        scores = {prediction.label: prediction.score for prediction in predictions}
        order = [prediction.score for prediction in predictions]

        assert scores == pytest.approx(dict(zip(loaded.class_names, row, strict=True)), abs=1e-4)
        assert order == sorted(order, reverse=True)
        assert sum(order) == pytest.approx(1, abs=1e-5)


def test_top_limits_the_answer(loaded: LoadedVersion) -> None:
    """As many labels as asked for, or as there are."""
    assert [len(loaded.classify(IMAGES[:1], top=top)[0]) for top in (1, 3, 100)] == [1, 3, 6]
    assert len(loaded.classify(IMAGES[:1], ["dog", "cat"])[0]) == 2


def test_known_labels_keep_their_own_embedding_in_any_spelling(loaded: LoadedVersion) -> None:
    """A known class is asked about as it was learnt; the caller's spelling is what comes back."""
    ours, theirs = ["red t-shirt", "pine tree"], ["Red_T-Shirt", "PINE  tree"]
    before = loaded.remembered_labels()
    (first,), (second,) = loaded.classify(IMAGES[:1], ours), loaded.classify(IMAGES[:1], theirs)

    assert [theirs[ours.index(prediction.label)] for prediction in first] == [p.label for p in second]
    assert [prediction.score for prediction in first] == [prediction.score for prediction in second]
    assert loaded.remembered_labels() == before


def test_unknown_labels_use_the_default_template_and_are_computed_once(version_dir: Path) -> None:
    """Any name can be asked about; its embedding is remembered for the next request."""
    with LoadedVersion(version_dir) as own:
        first = own.classify(IMAGES[:2], ["zebra", "cat", "zebra"])
        embedded: list[object] = []
        own.encode_texts = embedded.append  # type: ignore[method-assign, assignment]
        own.embed_classes = lambda names, _: np.empty((len(names), 128))  # type: ignore[method-assign]
        second = own.classify(IMAGES[:2], ["zebra", "cat", "zebra"])

        assert own.remembered_labels() == ["zebra"]
        assert first == second


def test_embed_classes_restores_the_published_embeddings(loaded: LoadedVersion) -> None:
    """Names in their template give the rows of class_embeddings.npy."""
    found = loaded.embed_classes(loaded.class_names, "a photo of a {}.")

    assert np.abs(found - loaded.class_embeddings).max() <= 1e-5


@pytest.mark.parametrize("count", [0, 1, 2, 31, 32, 33, 65])
def test_any_number_of_rows(count: int, loaded: LoadedVersion) -> None:
    """Requests larger than one run of the graph are put together in order."""
    images = [IMAGES[index % len(IMAGES)] for index in range(count)]
    single = np.concatenate([loaded.encode_images([path]) for path in IMAGES])
    texts = [f"number {index}" for index in range(count)]

    assert loaded.encode_images(images).shape == (count, 128)
    for row, embedding in enumerate(loaded.encode_images(images)):
        assert np.abs(embedding - single[row % len(IMAGES)]).max() <= 1e-5
    assert loaded.encode_texts(texts).shape == (count, 128)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda loaded: loaded.encode_images("cat.jpg"), "list of pictures, found a single str"),
        (lambda loaded: loaded.encode_images(b"..."), "list of pictures, found a single bytes"),
        (lambda loaded: loaded.classify(IMAGES[0]), "list of pictures"),
        (lambda loaded: loaded.encode_texts("a cat"), "list of texts"),
        (lambda loaded: loaded.classify(IMAGES[:1], "cat"), "list of labels"),
        (lambda loaded: loaded.classify(IMAGES[:1], []), "nothing to choose from"),
        (lambda loaded: loaded.embed_classes(["cat"], "no place"), "a template has one {}"),
        (lambda loaded: loaded.embed_classes(["cat"], ["{} and {}"]), "a template has one {}"),
    ],
)
def test_misuse_is_explained(call: Callable[[Any], object], message: str, loaded: LoadedVersion) -> None:
    """The caller's mistakes are ClientErrors that say what was expected."""
    with pytest.raises(ClientError) as caught:
        call(loaded)

    assert message in str(caught.value)


def test_a_bad_picture_among_good_ones_is_named(loaded: LoadedVersion, tmp_path: Path) -> None:
    """The error says which of several pictures it is, and why."""
    bad = tmp_path / "bad.jpg"
    bad.write_text("text")

    with pytest.raises(ImageError, match="image 2 of 3: this is not an image"):
        loaded.classify([IMAGES[0], bad, IMAGES[1]])


def test_a_version_without_classes_asks_for_labels(own_version: Path) -> None:
    """Nothing to choose from is an error with a way out; labels still work."""
    rewrite(own_version, "classes.json", lambda path: path.write_text('{"schema": 1, "classes": []}'))
    rewrite(own_version, "class_embeddings.npy", lambda path: np.save(path, np.empty((0, 128), np.float32)))
    with LoadedVersion(own_version) as empty:
        assert empty.classify(IMAGES[:1], ["cat"])[0][0].label == "cat"
        with pytest.raises(ClientError, match="knows no classes yet: pass labels"):
            empty.classify(IMAGES[:1])


@pytest.mark.parametrize("name", USED)
@pytest.mark.parametrize("damage", ["missing", "cut short", "one byte changed", "unlisted"])
def test_a_damaged_file_is_refused_by_name(name: str, damage: str, own_version: Path) -> None:
    """Every file is compared with the manifest; the error says which differs, and nothing stays open."""
    path = own_version / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(content[:-1])
    elif damage == "one byte changed":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        manifest = json.loads((own_version / "manifest.json").read_text())
        del manifest["files"][name]
        (own_version / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(VerifyError) as caught:
        LoadedVersion(own_version)

    expected = {
        "missing": "is missing",
        "cut short": f"has {len(content) - 1} bytes, expected {len(content)}",
        "one byte changed": "has other content than was published: expected sha256",
        "unlisted": "does not list",
    }
    assert name in str(caught.value)
    assert expected[damage] in str(caught.value)
    assert open_below(own_version) == []


def test_a_missing_or_broken_manifest_is_named(own_version: Path) -> None:
    """A directory that is no version is told apart from a damaged one."""
    (own_version / "manifest.json").write_text("{}")
    with pytest.raises(ManifestError, match=r"manifest\.json cannot be used"):
        LoadedVersion(own_version)
    (own_version / "manifest.json").unlink()
    with pytest.raises(ManifestError, match=r"manifest\.json does not exist"):
        LoadedVersion(own_version)


def test_class_embeddings_must_fit_the_classes(own_version: Path) -> None:
    """Correctly recorded files that contradict each other are refused too."""
    rewrite(own_version, "class_embeddings.npy", lambda path: np.save(path, np.eye(5, 128, dtype=np.float32)))

    with pytest.raises(VerifyError, match=r"expected \(6, 128\) float32.*found \(5, 128\)"):
        LoadedVersion(own_version)


def test_parity_with_torch_is_measured(loaded: LoadedVersion) -> None:
    """Both towers reproduce the outputs that torch left in reference.npz."""
    difference = loaded.check_parity()

    print(f"parity: max |difference| {difference:.2g}")
    assert 0 < difference <= 1e-5
    with pytest.raises(VerifyError, match="other embeddings here than torch did: they differ by"):
        loaded.check_parity(tolerance=0)


@pytest.mark.parametrize("key", ["image_embeds", "text_embeds"])
@pytest.mark.parametrize("value", [0.25, np.nan])
def test_parity_fails_for_either_tower_and_for_nan(key: str, value: float, own_version: Path) -> None:
    """One wrong element in one tower's reference is enough."""

    def change(path: Path) -> None:
        arrays = dict(np.load(path))
        arrays[key][0, 0] = value
        np.savez(path, **arrays)

    rewrite(own_version, "reference.npz", change)
    with LoadedVersion(own_version) as own, pytest.raises(VerifyError, match="version 0 computes other"):
        own.check_parity()


def test_a_reference_that_is_no_archive_fails_parity(own_version: Path) -> None:
    """A correctly recorded but useless reference is an error that names the file."""
    rewrite(own_version, "reference.npz", lambda path: path.write_bytes(b"PK nothing"))
    with (
        LoadedVersion(own_version) as own,
        pytest.raises(VerifyError, match=r"reference\.npz cannot be used"),
    ):
        own.check_parity()


def test_a_graph_that_onnx_runtime_refuses_is_named(own_version: Path) -> None:
    """The error names graph and ONNX Runtime's release."""
    rewrite(own_version, "text_model.onnx", lambda path: path.write_bytes(b"not a graph"))

    with pytest.raises(VerifyError, match=r"ONNX Runtime .* cannot load .*text_model\.onnx"):
        LoadedVersion(own_version)


def test_threads_are_set_outright_and_do_not_spin(version_dir: Path) -> None:
    """Neither tower leaves a thread count to ONNX Runtime, which would pin threads to CPUs."""
    with LoadedVersion(version_dir, threads=3) as own:
        for session in (own._vision, own._text):
            options = session.get_session_options()

            assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
            assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_threads_follow_the_cpus_of_the_process(version_dir: Path) -> None:
    """A process confined to one CPU uses one thread, however many the machine has."""
    script = f"""
import os
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
from pathlib import Path
from deploy.runtime import LoadedVersion
print(LoadedVersion(Path({str(version_dir)!r}))._vision.get_session_options().intra_op_num_threads)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "1"


def test_the_lock_on_the_manifest_is_held_until_close(own_version: Path) -> None:
    """While loaded, a pruner cannot get the exclusive lock; afterwards it can, and no file stays open."""
    with (own_version / "manifest.json").open() as manifest:
        with LoadedVersion(own_version):
            assert open_below(own_version) != []
            with pytest.raises(BlockingIOError):
                fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)

    assert open_below(own_version) == []


def test_a_version_that_is_being_pruned_is_not_loaded(own_version: Path) -> None:
    """The pruner's lock is respected instead of waited for."""
    with (own_version / "manifest.json").open() as manifest:
        fcntl.flock(manifest, fcntl.LOCK_EX)
        with pytest.raises(VerifyError, match="is being pruned: load another version"):
            LoadedVersion(own_version)


def test_many_threads_get_the_same_answers_as_one(loaded: LoadedVersion) -> None:
    """Requests at the same time do not disturb each other."""
    expected = [loaded.classify([path], ["cat", f"label {row}"]) for row, path in enumerate(IMAGES)]
    with ThreadPoolExecutor(4) as pool:
        rows = list(range(len(IMAGES))) * 6
        answers = list(pool.map(lambda row: loaded.classify([IMAGES[row]], ["cat", f"label {row}"]), rows))

    for row, (answer,) in zip(rows, answers, strict=True):
        assert [p.label for p in answer] == [p.label for p in expected[row][0]]
        assert [p.score for p in answer] == pytest.approx([p.score for p in expected[row][0]], abs=1e-5)


def test_remembered_labels_are_bounded(loaded: LoadedVersion, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that asks about ever new names does not fill the memory; the latest are kept."""
    monkeypatch.setattr("deploy.runtime._MAX_REMEMBERED_LABELS", 3)
    loaded.warm_up(labels=["one", "two", "three", "four", "cat"])
    loaded.warm_up(labels=["two"])
    loaded.warm_up(labels=["five"])

    assert loaded.remembered_labels() == ["four", "two", "five"]
