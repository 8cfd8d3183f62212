"""The step that is timed is the right one: its gradients are those of the recipe done straightforwardly."""

import dataclasses

import torch

from benchmarks import step
from benchmarks.reference_step import ReferenceStep
from dynlora.attach import attached
from dynlora.objectives import PublishedObjective
from dynlora.settings import PAPER


def test_gradients_on_the_bundled_model_equal_those_of_plain_autograd_over_all_tokens():
    """Both towers, every LoRA tensor, cut text against 77 tokens: relative L2 below 1e-4 in float32."""
    clip = step.build("bundled")
    task = step.make_task(clip)
    objective = PublishedObjective(clip, task, dataclasses.replace(PAPER, batch_size=4), seed=step.SEED)
    index = objective.batches.at(0)
    tokens = clip.tokenizer([step.TEMPLATE.format(name) for name in step.NAMES])
    plain = step.build("bundled").model
    with attached(clip.model, rank=4) as sites:
        step.start(sites)
        reference = ReferenceStep(plain, step.by_key(sites))
        ours = torch.autograd.grad(objective.loss(0), reference.parameters)
        theirs = reference.run(task.pixels[index], task.labels[index], tokens)
    error = step.relative_error(ours, theirs)
    print(f"relative error {error:.1e}")

    assert len(ours) == 3 * len(sites)
    assert error < 1e-4
