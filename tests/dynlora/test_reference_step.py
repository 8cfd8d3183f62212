"""The step that is timed is the right one: its gradients are those of the recipe done straightforwardly."""

import dataclasses

import open_clip
import torch

from benchmarks import step
from benchmarks.reference_step import ReferenceStep, useful_flops
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


def test_useful_operations_are_all_matrix_products_of_both_towers_twice_over():
    """By hand: four times the multiply-adds of every matrix, attention's too, and of the convolution."""
    vision = {"image_size": 64, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()
    pixels, tokens = torch.zeros(5, 3, 64, 64), torch.zeros(2, 77, dtype=torch.int64)
    found = useful_flops(lambda: (model.encode_image(pixels), model.encode_text(tokens)))
    images = 5 * (17 * 3 * 12 * 64**2 + 16 * 64 * 3 * 16**2 + 64 * 16)
    texts = 2 * (77 * 2 * 12 * 32**2 + 32 * 16)
    attention = (
        5 * 3 * 2 * 17**2 * 64 + 2 * 2 * 2 * 77**2 * 32
    )  # torch counts it where it has an operator of its own

    assert 4 * (images + texts) <= found <= 4 * (images + texts + attention)
