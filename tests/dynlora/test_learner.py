"""Learning on the bundled CLIP: determinism, resuming, truncation, and the published loss written naively."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dynlora import prompts
from dynlora.attach import attached, reset
from dynlora.clip import load_clip
from dynlora.errors import CheckpointError, Interrupted, TaskError
from dynlora.learner import Hooks, adapt
from dynlora.objectives import PublishedObjective
from dynlora.sampling import BatchSampler
from dynlora.settings import Settings
from dynlora.task import Name, Task

SHORT = Settings(steps=6, batch_size=8, rank=4, kappa_max=0.3)


@pytest.fixture(scope="module")
def clip():
    """The bundled CLIP."""
    return load_clip()


@pytest.fixture(scope="module")
def task():
    """Two classes of coloured noise."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(12, 3, 64, 64, generator=generator)
    labels = torch.arange(12) % 2
    pixels[labels == 1, 0] += 2
    return Task(
        [Name("red thing"), Name("a much longer name of a thing")], pixels, labels, known=[Name("dog")]
    )


def _equal(one, other):
    return len(one.factors) == len(other.factors) and all(
        torch.equal(getattr(a, field), getattr(b, field))
        for a, b in zip(one.factors, other.factors, strict=True)
        for field in ("lora_A", "lora_B", "importance")
    )


def test_the_same_seed_teaches_the_same_bits_and_another_seed_others(clip, task):
    """An update is a function of task, settings and seed."""
    first, again, other = (adapt(clip, task, SHORT, seed=seed) for seed in (1, 1, 2))

    assert _equal(first, again)
    assert not _equal(first, other)


def test_a_run_stopped_at_any_step_and_resumed_ends_with_the_same_bits(clip, task):
    """The checkpoint holds everything the next step depends on."""
    whole = adapt(clip, task, SHORT, seed=3)
    for stop_after in range(1, 6):
        saved = []
        with pytest.raises(Interrupted, match=f"after step {stop_after} of 6"):
            adapt(
                clip, task, SHORT, seed=3, hooks=Hooks(should_stop=_countdown(stop_after), save=saved.append)
            )
        resumed = adapt(clip, task, SHORT, seed=3, hooks=Hooks(resume_from=saved[-1]))
        assert _equal(whole, resumed)


def test_a_run_resumed_after_its_last_step_reports_the_loss_of_that_step(clip, task):
    """There is nothing left to do, and what is told is what was."""
    saved = []
    whole = adapt(clip, task, SHORT, seed=3, hooks=Hooks(should_save=lambda: True, save=saved.append))
    resumed = adapt(clip, task, SHORT, seed=3, hooks=Hooks(resume_from=saved[-1]))

    assert resumed.loss == whole.loss
    assert _equal(whole, resumed)


def _countdown(steps):
    asked = iter(range(1, 100))
    return lambda: next(asked) >= steps


def test_a_checkpoint_of_another_run_is_refused(clip, task):
    """Another seed, other settings, and damage are each told apart from a usable checkpoint."""
    saved = []
    with pytest.raises(Interrupted):
        adapt(clip, task, SHORT, seed=3, hooks=Hooks(should_stop=lambda: True, save=saved.append))
    for content, settings, seed in (
        (saved[0], SHORT, 4),
        (saved[0], dataclasses.replace(SHORT, rank=2), 3),
        (saved[0][:200], SHORT, 3),
    ):
        with pytest.raises(CheckpointError):
            adapt(clip, task, settings, seed=seed, hooks=Hooks(resume_from=content))


def test_pruned_ranks_are_counted_and_left_out_of_the_factors(clip, task):
    """Kept ranks add up to the factors' sizes, and some gates did die."""
    with attached(clip.model, rank=4) as sites:
        matrices = len(sites)
    result = adapt(clip, task, SHORT, seed=1)

    assert len(result.ranks) == matrices
    assert sum(result.ranks.values()) == sum(len(factor.importance) for factor in result.factors)
    assert 0 < sum(result.ranks.values()) < matrices * 4
    assert all((factor.importance != 0).all() for factor in result.factors)


def test_the_model_comes_back_bit_for_bit(clip, task):
    """Learning writes nothing into the model it was given."""
    before = {key: value.clone() for key, value in clip.model.state_dict().items()}
    adapt(clip, task, SHORT, seed=1)

    assert all(torch.equal(value, before[key]) for key, value in clip.model.state_dict().items())


def test_cutting_prompts_at_the_last_eot_changes_neither_embeddings_nor_gradients(clip):
    """Causal attention: tokens after EOT are never seen (measured, relative L2 below 1e-5)."""
    names = ["cat", "a very long name of a thing, with commas", "ox"]
    cut = prompts.tokenize(clip, names)
    full = clip.tokenizer([f"a photo of a {name}." for name in names])
    assert cut.tokens.shape[1] < full.shape[1]
    gradients = []
    with attached(clip.model, rank=4) as sites:
        reset(sites, seed=0, random_importance=True)
        for site in sites:
            torch.nn.init.normal_(site.lora.lora_B, std=0.02, generator=torch.Generator().manual_seed(1))
        parameters = [p for site in sites if site.tower == "text" for p in site.lora.parameters()]
        for embeds in (prompts.encode_text(clip.model, cut), clip.model.encode_text(full, normalize=True)):
            gradients.append((embeds, torch.autograd.grad(embeds[:, :7].sum(), parameters)))
    (ours, our_grads), (theirs, their_grads) = gradients
    difference = torch.cat([(a - b).flatten() for a, b in zip(our_grads, their_grads, strict=True)]).norm()
    size = torch.cat([b.flatten() for b in their_grads]).norm()
    print(f"embeddings max|Δ| {(ours - theirs).abs().max():.2e}, gradients relative {difference / size:.2e}")

    assert (ours - theirs).abs().max() < 1e-5
    assert difference / size < 1e-5


def test_the_published_loss_equals_its_equation_written_out(clip, task):
    """Cross-entropies summed by hand, seen names included as rows with an all-zero target."""
    objective = PublishedObjective(clip, task, Settings(batch_size=8), seed=5)
    index = objective.batches.at(0)
    with torch.no_grad():
        ours = objective.loss(0)
        images = F.normalize(clip.model.encode_image(task.pixels[index]), dim=-1)
        names = [c.name for c in task.classes] + [k.name for k in task.known]
        texts = clip.model.encode_text(clip.tokenizer([f"a photo of a {n}." for n in names]), normalize=True)
        logits = clip.model.logit_scale.exp() * images @ texts.T
        labels = task.labels[index]
        image_to_text = (
            -sum(float(logits[b, labels[b]] - torch.logsumexp(logits[b, :2], 0)) for b in range(8)) / 8
        )
        text_to_image = (
            -sum(
                float(logits[b, c] - torch.logsumexp(logits[:, c], 0))
                for c in range(2)
                for b in range(8)
                if labels[b] == c
            )
            / 3
        )

    assert float(ours) == pytest.approx(image_to_text + text_to_image, rel=1e-4)


def test_every_image_is_drawn_once_per_epoch(task):
    """The sampler's stream is a chain of shuffles of the whole task."""
    sampler = BatchSampler(12, 5, seed=9)
    stream = torch.cat([sampler.at(step) for step in range(12)])

    for epoch in range(5):
        assert sorted(stream[epoch * 12 : epoch * 12 + 12].tolist()) == list(range(12))


def test_a_task_with_a_class_without_images_is_refused_by_name():
    """The message names the class."""
    with pytest.raises(TaskError, match="no training image for 'b'"):
        Task([Name("a"), Name("b")], torch.zeros(2, 3, 64, 64), torch.tensor([0, 0]))
