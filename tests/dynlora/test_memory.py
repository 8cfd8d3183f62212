"""Bounded memory: fewer at once, the same step."""

import dataclasses

import pytest
import torch

from dynlora.attach import attached, reset
from dynlora.clip import load_clip
from dynlora.encoders import Encoders
from dynlora.learner import adapt
from dynlora.memory import bound, kept_bytes
from dynlora.objectives import build_objective
from dynlora.settings import DEFAULT, PAPER, Settings, SettingsError
from dynlora.task import Name, Task

SMALL = {"steps": 2, "batch_size": 10, "rank": 4}


@pytest.fixture(scope="module")
def clip():
    """The bundled CLIP."""
    return load_clip()


@pytest.fixture(scope="module")
def task():
    """Five classes of coloured noise, and names known before."""
    pixels = torch.randn(20, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 5
    pixels[labels == 1, 0] += 2
    names = [Name(name) for name in ("red thing", "a blue thing", "cat", "long and winding road", "dog")]
    return Task(names, pixels, labels, known=[Name("shoe"), Name("tree")])


@pytest.mark.parametrize(("preset", "dtype"), [(PAPER, "float32"), (PAPER, "bfloat16"), (DEFAULT, "float32")])
def test_a_step_in_parts_has_the_loss_and_gradients_of_the_whole_step(clip, task, preset, dtype):
    """Every image meets every name, whatever is computed at once: the loss does not split, embedding does."""
    whole = dataclasses.replace(preset, **SMALL, dtype=dtype)
    parts = dataclasses.replace(whole, images_at_once=3, prompts_at_once=2)
    found = []
    objective = build_objective(clip, task, whole, seed=0)
    with attached(clip.model, 4, only=objective.wants, tokens=objective.tokens) as sites:
        reset(sites, seed=0, random_importance=True)
        objective.begin(sites)
        for number, site in enumerate(sites):
            generator = torch.Generator().manual_seed(number)
            torch.nn.init.normal_(site.lora.lora_B, std=0.02, generator=generator)
        parameters = [p for site in sites for p in site.lora.parameters() if p.requires_grad]
        for settings in (whole, parts):
            objective.encoders = Encoders.by(settings, clip.model)
            loss = objective.loss(1)
            gradients = torch.autograd.grad(loss, parameters)
            found.append((loss.detach(), torch.cat([g.flatten() for g in gradients])))
    (loss, gradient), (loss_of_parts, gradient_of_parts) = found
    tolerance = 1e-5 if dtype == "float32" else 3e-2

    assert loss_of_parts == pytest.approx(float(loss), rel=tolerance)
    assert (gradient_of_parts - gradient).norm() < tolerance * gradient.norm()


def test_what_is_kept_for_the_backward_pass_is_that_of_the_last_part(clip, task):
    """Ten images, two at once: less than a third of what ten take."""
    with attached(clip.model, rank=4) as sites:
        reset(sites, seed=0, random_importance=False)
        whole, parts = (
            kept_bytes(lambda e=encoders: e.images(task.pixels[:10]))
            for encoders in (Encoders(clip.model), Encoders(clip.model, images_at_once=2))
        )

    assert parts < whole / 3


@pytest.mark.parametrize("preset", [PAPER, DEFAULT])
def test_the_bound_follows_the_limit_and_leaves_the_model_as_it_was(clip, task, preset):
    """None with plenty of memory; less and less with less; one with next to none."""
    before = {key: value.clone() for key, value in clip.model.state_dict().items()}
    settings = dataclasses.replace(preset, **SMALL)
    limits = (1 << 40, 400_000_000, 150_000_000, 0)
    found = [bound(clip, task, settings, limit_bytes=limit) for limit in limits]
    at_once = [s.images_at_once or settings.batch_size + 8 for s in found]

    assert (found[0].images_at_once, found[0].prompts_at_once) == (None, None)
    assert at_once == sorted(at_once, reverse=True)
    assert (found[-1].images_at_once, found[-1].prompts_at_once) == (1, 1)
    assert all(dataclasses.replace(s, images_at_once=None, prompts_at_once=None) == settings for s in found)
    assert all(torch.equal(value, before[key]) for key, value in clip.model.state_dict().items())


def test_learning_one_image_at_a_time_ends_near_learning_all_at_once(clip, task):
    """The whole way through the optimiser, in float32."""
    settings = Settings(**SMALL)
    whole = adapt(clip, task, settings, seed=0)
    single = adapt(clip, task, dataclasses.replace(settings, images_at_once=1, prompts_at_once=1), seed=0)

    assert single.ranks == whole.ranks
    assert single.loss == pytest.approx(whole.loss, rel=1e-4)


@pytest.mark.parametrize("name", ["images_at_once", "prompts_at_once"])
def test_none_at_once_is_refused(name):
    """The message says what is expected."""
    with pytest.raises(SettingsError, match=f"{name} is 0; expected at least 1"):
        Settings(**{name: 0})
