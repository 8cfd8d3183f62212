"""What a worker opens ahead of its order: used where it is the version that the order names, else let go."""

import fcntl
import gc
import os
import shutil
import weakref

import numpy as np
import pytest

from daemon import live as live_module
from daemon.exam_embeddings import EMBEDDINGS_NAME
from daemon.examine import Examiner
from daemon.exams import keep_exam
from daemon.live import fitting_live, open_ahead, open_live, take_live
from daemon.staging import write_beside_weights
from deploy.arrays import read_arrays
from deploy.delta import Delta, Factor, write_folded
from deploy.errors import VerifyError
from deploy.manifest import (
    CLASS_EMBEDDINGS_NAME,
    MANIFEST_NAME,
    REFERENCE_NAME,
    WEIGHTS_NAME,
    load_classes,
)
from deploy.store import VersionStore
from deploy.verify import measure_parity
from deploy.vision_digest import vision_digest
from deploy.weights import read_weights
from tests.daemon.test_examine import make_batch


@pytest.fixture
def home(serving_dir):
    """A home whose live version is 0."""
    return serving_dir.parent


def always():
    """There is no order yet."""
    return True


def is_held(directory):
    """Whether somebody keeps a version from being pruned."""
    with (directory / MANIFEST_NAME).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def rot(directory, name):
    """Another last byte of a file, and nothing about the file that tells of it."""
    path = directory / name
    was = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def keep_exam_of(home):
    """An exam of two images is kept; returns where."""
    work = home / "work-1"
    keep_exam(home, make_batch(1, work), work, max_images_per_class=9)
    return home / "exams" / "000001-cat"


def examiner_of(home, directory):
    """For all exams that are kept."""
    return Examiner(home, None, home, load_classes(directory).classes, threads=1)


def test_what_was_opened_ahead_is_the_live_version_with_what_every_order_begins_with(home):
    """Both halves, the tower's digest, and what torch answered when the version was made."""
    store = VersionStore(home / "serving")
    live = open_ahead(home, is_wanted=always)

    assert take_live(live, store.path(0)) is live
    assert live.tower == vision_digest(store.path(0))
    assert np.allclose(live.reference_embeds, read_arrays(store.path(0) / REFERENCE_NAME)["image_embeds"])
    assert is_held(store.path(0))
    live.check_again()


def test_an_order_for_another_version_opens_that_one_and_lets_go_of_the_other(home, publish_random_version):
    """Published or rolled back meanwhile: nothing of what was opened ahead is used."""
    store = VersionStore(home / "serving")
    ahead = open_ahead(home, is_wanted=always)
    publish_random_version(home / "serving", 3)

    live = take_live(ahead, store.path(1))

    assert live is not ahead
    assert (live.loaded.version, live.tower, live.reference_embeds) == (1, None, None)
    assert not is_held(store.path(0))
    weights = read_weights(store.path(1) / WEIGHTS_NAME)
    assert all(np.array_equal(tensor, weights[key]) for key, tensor in live.clip.model.state_dict().items())


def test_a_version_of_the_same_number_with_another_manifest_is_not_the_same(home):
    """As where a store was restored from a copy while a worker stood by."""
    directory = VersionStore(home / "serving").path(0)
    ahead = open_ahead(home, is_wanted=always)
    path = directory / MANIFEST_NAME
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b"\n")

    assert fitting_live(ahead, directory) is None
    assert not is_held(directory)


def test_weights_that_rotted_since_they_were_opened_are_found_and_no_answer_of_theirs_is_kept(home):
    """A worker may stand by for days, and ONNX Runtime reads the file as it is needed."""
    directory, exam = VersionStore(home / "serving").path(0), keep_exam_of(home)
    ahead, now = open_ahead(home, is_wanted=always), open_live(directory)
    rot(directory, WEIGHTS_NAME)

    assert ahead.fits(directory)
    with pytest.raises(VerifyError, match=r"weights\.safetensors has other content than was published"):
        ahead.ask(examiner_of(home, directory), runs_at_once=1)
    assert not (exam / EMBEDDINGS_NAME).exists()
    now.ask(examiner_of(home, directory), runs_at_once=1)  # opened for the order: its files were read then
    assert (exam / EMBEDDINGS_NAME).exists()


def test_a_good_file_put_in_the_place_of_one_that_is_open_is_not_what_is_open(home):
    """As a rebuild does, under the same number and manifest: the open one may be damaged."""
    directory = VersionStore(home / "serving").path(0)
    ahead = open_ahead(home, is_wanted=always)
    path = directory / WEIGHTS_NAME
    shutil.copy2(path, home / "copy")
    (home / "copy").replace(path)

    assert fitting_live(ahead, directory) is None
    assert not is_held(directory)


def test_what_is_let_go_leaves_no_second_model_in_memory(home, publish_random_version):
    """Though whoever started the order still has the object."""
    store = VersionStore(home / "serving")
    ahead = open_ahead(home, is_wanted=always)
    model = weakref.ref(ahead.clip.model)
    publish_random_version(home / "serving", 3)

    assert fitting_live(ahead, store.path(1)) is None
    gc.collect()
    assert model() is None


def test_a_version_that_cannot_be_prepared_is_not_held(home, monkeypatch):
    """A standby that failed half way keeps nobody from pruning."""

    def fail(_live):
        raise RuntimeError("no")

    monkeypatch.setattr(live_module, "_compute_reference", fail)
    with pytest.raises(RuntimeError):
        open_ahead(home, is_wanted=always)
    assert not is_held(VersionStore(home / "serving").path(0))


def test_a_version_that_torch_cannot_load_is_not_held(home, monkeypatch):
    """ONNX Runtime's half, opened beside it, is closed."""

    def fail(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(live_module, "load_version", fail)
    directory = VersionStore(home / "serving").path(0)
    with pytest.raises(RuntimeError):
        open_live(directory)
    assert not is_held(directory)


@pytest.mark.parametrize("short", ["memory", "time"])
def test_nothing_is_opened_ahead_where_memory_is_short_or_an_order_is_there(home, short, monkeypatch):
    """An idle worker takes a quarter of the free memory at most; an order says itself what to open."""
    if short == "memory":
        size = VersionStore(home / "serving").manifest(0).files[WEIGHTS_NAME].bytes
        monkeypatch.setattr(live_module, "free_memory_bytes", lambda: 8 * size - 1)

    assert open_ahead(home, is_wanted=lambda: short != "time") is None
    assert not is_held(VersionStore(home / "serving").path(0))


def test_an_order_that_comes_meanwhile_does_not_wait_for_what_it_can_do_without(home):
    """The version is open, and nothing was warmed up."""
    answers = iter([True, False])

    live = open_ahead(home, is_wanted=lambda: next(answers))

    assert (live.tower, live.reference_embeds) == (None, None)


def test_what_is_staged_from_it_is_the_same(home):
    """Class embeddings, and torch's reference outputs, which an unchanged vision tower does not repeat."""
    store = VersionStore(home / "serving")
    ahead, key = open_ahead(home, is_wanted=always), "transformer.resblocks.0.mlp.c_fc.weight"
    weights = read_weights(store.path(0) / WEIGHTS_NAME)
    rows, columns = weights[key].shape
    one = (
        np.full((rows, 1), 0.01, np.float32),
        np.full((1, columns), 0.01, np.float32),
        np.ones(1, np.float32),
    )
    delta = Delta([Factor(key, 0, rows, *one)])
    found = []
    for live in (None, ahead):
        staging = store.stage("batch", like=0)
        write_folded(staging / WEIGHTS_NAME, weights, [delta])
        classes = load_classes(store.path(0)).classes
        drift = write_beside_weights(staging, store, store.manifest(0), classes, live=live)
        embeddings = (staging / CLASS_EMBEDDINGS_NAME).read_bytes()
        found.append((drift, embeddings, read_arrays(staging / REFERENCE_NAME)))

    assert ahead.reference_of(staging) is ahead.reference_embeds
    assert found[0][0] == found[1][0] > 0
    assert found[0][1] == found[1][1]
    assert all(np.allclose(array, found[1][2][name], atol=1e-6) for name, array in found[0][2].items())
    assert max(measure_parity(staging).values()) < 1e-5


def test_another_vision_tower_is_asked_anew(home):
    """One byte of it is enough."""
    store = VersionStore(home / "serving")
    ahead = open_ahead(home, is_wanted=always)
    other = home / "other"
    shutil.copytree(store.path(0), other)
    assert ahead.reference_of(other) is ahead.reference_embeds
    weights = {key: np.array(tensor) for key, tensor in read_weights(other / WEIGHTS_NAME).items()}
    key = next(key for key in sorted(weights) if key.startswith("visual.") and key.endswith("weight"))
    weights[key].reshape(-1)[0] += 1
    (other / WEIGHTS_NAME).chmod(0o644)
    write_folded(other / WEIGHTS_NAME, weights, [])

    assert ahead.reference_of(other) is None


def test_grades_do_not_depend_on_whether_the_version_was_opened_ahead(home):
    """The digest that was computed ahead is the one that what is remembered of exams goes by."""
    directory, exam = VersionStore(home / "serving").path(0), keep_exam_of(home)
    grades, kept = [], []
    for live in (open_live(directory), open_ahead(home, is_wanted=always)):
        grades.append(live.ask(examiner_of(home, directory), runs_at_once=1))
        kept.append((exam / EMBEDDINGS_NAME).read_bytes())
        (exam / EMBEDDINGS_NAME).unlink()

    assert kept[0] == kept[1]
    assert np.array_equal(grades[0].names, grades[1].names)
    [embeddings] = grades[0].embeddings.values()
    assert np.array_equal(embeddings, *grades[1].embeddings.values())
    assert embeddings.shape == (2, 128)
    assert not is_held(directory)
