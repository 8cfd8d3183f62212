"""The worker's side of learning: when it saves, what it loads."""

import hashlib
import os

import numpy as np
import pytest
import torch
from PIL import Image

from daemon.adaptation import _hooks, _readable, _settings, _with_trials
from daemon.analysing import _task
from daemon.batch import Batch, BatchClass, BatchImage
from daemon.config import Config
from daemon.errors import BatchError
from daemon.plan import settle_plan, stored_plan
from daemon.tasks import load_task
from deploy.manifest import ClassEntry
from deploy.preprocess import Preprocessing
from dynlora.clip import load_clip
from dynlora.learner import Progress
from dynlora.settings import preset
from dynlora.task import Name, Task
from tests.daemon.plans import PLAN


class Outlet:
    """Keeps what was said."""

    def __init__(self):
        self.said = []

    def step(self, **fields):
        """One training step."""
        self.said.append(fields)


class Stop:
    """Nobody asked to stop."""

    is_set = False


def test_the_last_step_is_always_kept(tmp_path):
    """Folding, verifying and examining can be done again without learning again."""
    outlet = Outlet()
    hooks = _hooks(outlet, Stop(), tmp_path / "checkpoint", 1e9)
    saves = []
    for step in (1, 2, 3):
        hooks.on_progress(Progress(step, 3, 0.5, 4.0))
        saves.append(hooks.should_save())

    assert saves == [False, False, True]
    assert [said["step"] for said in outlet.said] == [1, 2, 3]
    assert not any("resumed_at" in said for said in outlet.said)


def test_a_worker_that_goes_on_says_from_where(tmp_path):
    """So that nobody takes what was learnt before for its work."""
    outlet = Outlet()
    hooks = _hooks(outlet, Stop(), tmp_path / "checkpoint", 1e9)
    for step in (301, 302):
        hooks.on_progress(Progress(step, 500, 0.5, 4.0))

    assert [(said["step"], said["resumed_at"]) for said in outlet.said] == [(301, 300), (302, 300)]


@pytest.fixture
def batch(tmp_path):
    """Two images of one class, one to train and one to tune on."""
    images = []
    for number, split in enumerate(("train", "tune")):
        path = tmp_path / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((24, 24, 3), 100 * number, np.uint8)).save(path)
        images.append(
            BatchImage(
                file=f"images/{number}.png",
                origin=f"cups/{number}.png",
                class_key="cups",
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                width=24,
                height=24,
                split=split,
            )
        )
    cups = BatchClass(name="cups", key="cups", template="a {}", folder="cups", is_new=True)
    return Batch(
        id="000001-cups",
        seq=1,
        slug="cups",
        kind="folders",
        received_at="2026-01-01T00:00:00+00:00",
        content_sha256="0" * 64,
        classes=[cups],
        images=images,
    )


def load(batch, work_dir):
    """As the worker does it."""
    preprocessing = Preprocessing((16, 16), (0.5,) * 3, (0.5,) * 3)
    return load_task(batch, work_dir, preprocessing, (ClassEntry(name="cups", key="cups", template="a {}"),))


def test_images_are_learnt_as_they_were_taken_in(batch, tmp_path):
    """One to train, one to tune on, each in its place."""
    task = load(batch, tmp_path)

    assert (len(task.pixels), len(task.tune_pixels)) == (1, 1)


def test_an_analysis_asks_about_a_known_class_once_however_the_folder_spells_it(batch, tmp_path):
    """Otherwise the right answer under another spelling would count as a wrong one."""
    known = [ClassEntry(name=name, key=name.lower(), template="a {}") for name in ("Cups", "plates")]
    task, held_out = _task(batch, tmp_path, Preprocessing((16, 16), (0.5,) * 3, (0.5,) * 3), known)

    assert [name.name for name in task.known] == ["plates"]
    assert (len(task.labels), len(held_out.labels)) == (1, 1)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("spoil", ["other", "link", "gone", "pipe"])
def test_an_image_that_is_not_what_was_taken_in_is_never_learnt(batch, tmp_path, number, spoil):
    """Swapped, linked to the very same content, lost, or a pipe that never ends: the file is named."""
    path = tmp_path / "images" / f"{number}.png"
    content = path.read_bytes()
    path.unlink()
    if spoil == "other":
        Image.fromarray(np.full((24, 24, 3), 7, np.uint8)).save(path)
    elif spoil == "link":
        (tmp_path / "elsewhere.png").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere.png")
    elif spoil == "pipe":
        os.mkfifo(path)

    with pytest.raises(BatchError, match=rf"images/{number}\.png cannot be used"):
        load(batch, tmp_path)


@pytest.mark.parametrize("settings", [{"stand_ins": 64}, {"kappa_levels": 1}])
def test_a_plan_whose_settings_this_release_does_not_have_is_made_anew(settings):
    """After an upgrade in the middle of a batch: not a batch that fails."""
    plan = PLAN.model_copy(update={"settings": preset("default").as_dict()})

    assert _readable(plan) is plan
    assert _readable(plan.model_copy(update={"settings": plan.settings | settings})) is None
    assert _readable(None) is None


@pytest.mark.parametrize(("memory_bytes", "at_once"), [(1, 1), (1 << 60, None)])
def test_how_much_is_computed_at_once_follows_the_memory_and_a_resume_obeys_it(
    tmp_path, memory_bytes, at_once
):
    """With next to none one image at a time, with plenty all; the plan carries it to the next attempt."""
    learning = {"dtype": "float32", "memory_bytes": memory_bytes}
    plan = PLAN.model_copy(update={"settings": preset("default").as_dict()})
    task = Task([Name("cup")], torch.zeros(3, 3, 64, 64), torch.zeros(3, dtype=torch.int64))
    tried = _with_trials(plan, load_clip(), task, Config.model_validate({"learning": learning}))
    settle_plan(tmp_path, tried)

    resumed = stored_plan(tmp_path, plan)

    assert (tried.images_at_once, tried.prompts_at_once, tried.dtype) == (at_once, at_once, "float32")
    assert resumed is not None
    assert _settings(resumed) == _settings(tried)
    assert _settings(resumed).images_at_once == at_once
