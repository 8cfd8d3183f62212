"""Both towers in both dtypes: near each other, chosen by a trial, and the same bits for the same settings."""

import dataclasses

import pytest
import torch

from dynlora import encoders, prompts
from dynlora.attach import attached, reset
from dynlora.clip import load_clip
from dynlora.encoders import Encoders, fastest_dtype
from dynlora.errors import CheckpointError, Interrupted
from dynlora.learner import Hooks, adapt
from dynlora.objectives import PublishedObjective
from dynlora.settings import Settings, SettingsError
from dynlora.task import Name, Task

SHORT = Settings(steps=4, batch_size=8, rank=4, kappa_max=0.1, dtype="bfloat16")


@pytest.fixture(scope="module")
def clip():
    """The bundled CLIP."""
    return load_clip()


@pytest.fixture(scope="module")
def task():
    """Two classes of coloured noise."""
    pixels = torch.randn(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 2
    pixels[labels == 1, 0] += 2
    return Task([Name("red thing"), Name("a blue thing")], pixels, labels)


def test_bfloat16_embeddings_are_float32_and_point_where_float32_ones_do(clip, task):
    """Images and texts alike; cosines, measured, above 0.999."""
    of = prompts.tokenize(clip, ["cat", "a long name of a thing"])
    exact, rounded = Encoders(clip.model), Encoders(clip.model, "bfloat16")
    with torch.no_grad():
        pairs = (
            (exact.images(task.pixels), rounded.images(task.pixels)),
            (exact.texts(of), rounded.texts(of)),
        )
    for one, other in pairs:
        assert other.dtype == torch.float32
        assert 0.999 < (one * other).sum(-1).min() < 1.0001
        assert not torch.equal(one, other)


def test_bfloat16_gradients_stay_near_those_of_float32(clip, task):
    """Over all LoRA tensors of both towers, of the published loss; all of them float32."""
    gradients = []
    with attached(clip.model, rank=4) as sites:
        reset(sites, seed=0, random_importance=True)
        for site in sites:
            torch.nn.init.normal_(site.lora.lora_B, std=0.02, generator=torch.Generator().manual_seed(1))
        parameters = [p for site in sites for p in site.lora.parameters()]
        for dtype in ("float32", "bfloat16"):
            objective = PublishedObjective(clip, task, dataclasses.replace(SHORT, dtype=dtype), seed=0)
            gradients.append(torch.autograd.grad(objective.loss(0), parameters))
    exact, rounded = (torch.cat([g.flatten() for g in of]) for of in gradients)
    error = float((rounded - exact).norm() / exact.norm())
    print(f"relative error {error:.3f}")

    assert rounded.dtype == torch.float32
    assert error < 0.1


def test_a_bfloat16_run_stopped_and_resumed_ends_with_the_same_float32_bits(clip, task):
    """What learns, and so the checkpoint and the update, is float32."""
    whole = adapt(clip, task, SHORT, seed=3)
    saved = []
    with pytest.raises(Interrupted):
        adapt(clip, task, SHORT, seed=3, hooks=Hooks(should_stop=lambda: True, save=saved.append))
    resumed = adapt(clip, task, SHORT, seed=3, hooks=Hooks(resume_from=saved[-1]))

    assert len(whole.factors) == len(resumed.factors) > 0
    for one, other in zip(whole.factors, resumed.factors, strict=True):
        assert one.lora_A.dtype == one.lora_B.dtype == one.importance.dtype == torch.float32
        assert torch.equal(one.delta(), other.delta())
    with pytest.raises(CheckpointError):
        adapt(
            clip,
            task,
            dataclasses.replace(SHORT, dtype="float32"),
            seed=3,
            hooks=Hooks(resume_from=saved[-1]),
        )


@pytest.mark.parametrize(("slow", "chosen"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_dtype_follows_the_trial_and_the_model_comes_back_as_it_was(clip, monkeypatch, slow, chosen):
    """One dtype's passes are really run, and made to look ten times as long."""
    before = {key: value.clone() for key, value in clip.model.state_dict().items()}
    runs = iter(("float32", "bfloat16") * 100)

    def seconds_of(work):
        work()
        return 10.0 if next(runs) == slow else 1.0

    monkeypatch.setattr(encoders, "_seconds_of", seconds_of)

    assert fastest_dtype(clip, rank=4) == chosen
    assert all(torch.equal(value, before[key]) for key, value in clip.model.state_dict().items())


def test_a_gain_that_is_not_clear_keeps_float32(clip, monkeypatch):
    """Equal times decide nothing for bfloat16."""
    monkeypatch.setattr(encoders, "_seconds_of", lambda work: work() and 1.0)

    assert fastest_dtype(clip, rank=4) == "float32"


def test_another_dtype_is_refused():
    """The message says what is expected."""
    with pytest.raises(SettingsError, match="float32 or bfloat16"):
        Settings(dtype="float16")
