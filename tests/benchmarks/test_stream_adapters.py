"""DIKI- and C-ADA-style: what is put beside the model learns, and the model is left as it was."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.stream.adapters import beside, blocks_of
from benchmarks.stream.c_ada import Growing
from benchmarks.stream.diki import attended
from benchmarks.stream.methods import CHANGING, METHODS, Budget, method
from dynlora import Name, Task, load_clip
from dynlora.errors import ModelError
from dynlora.prompts import tokenize

BUDGET = Budget(steps=4, batch_size=8)
# Over the eight blocks of the bundled vision tower and the four of its text tower.
WIDTHS = 2 * (32 + 64 + 160 + 256) + 4 * 128


@pytest.fixture(scope="module")
def clip():
    """The bundled CLIP, which nothing here may change."""
    return load_clip()


@pytest.fixture(scope="module")
def tasks():
    """Two tasks of two classes of coloured noise."""
    return [_task(number) for number in range(2)]


def _task(number):
    generator = torch.Generator().manual_seed(number)
    labels = torch.arange(8) % 2
    pixels = torch.randn(8, 3, 64, 64, generator=generator)
    pixels[range(8), labels + number] += 2
    return Task([Name(f"thing {number} {label}") for label in range(2)], pixels, labels)


@pytest.fixture(scope="module")
def learnt(clip, tasks):
    """Each method after the first task, its lesson, and the model's weights before."""
    before = {key: value.clone() for key, value in clip.model.state_dict().items()}
    found = {}
    for name in CHANGING:
        learner = method(name)
        lesson = learner.learn(clip, tasks[0], BUDGET, learner.grid[-1], seed=0)
        found[name] = (learner, lesson)
    return found, before


def _similar(clip, learner, task):
    prompts = tokenize(clip, [c.name for c in task.classes])
    with torch.inference_mode():
        return learner.similarity(clip, prompts)(task.pixels)


def _parts(learner):
    """Every tensor that inference needs, task by task."""
    if learner.name == "diki":
        return [[*task.pairs, task.images.loc, task.images.scale_tril] for task in learner.tasks]
    return [
        [tensor for adapter in learner.adapters for tensor in (adapter.down[i], adapter.up[i], adapter.scale)]
        for i in range(len(learner.adapters[0].down))
    ]


@pytest.mark.parametrize("name", CHANGING)
def test_what_is_new_changes_no_answer_before_it_learns(clip, tasks, name):
    """New values, and new channels' ways up, are zero."""
    learner, plain = method(name), _similar(clip, method("zero-shot"), tasks[0])
    learner.grown(clip, tasks[0], 0)

    torch.testing.assert_close(_similar(clip, learner, tasks[0]), plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CHANGING)
def test_the_images_of_the_task_are_told_apart_better(clip, tasks, learnt, name):
    """The loss falls from step to step, and is lower when asked afterwards."""
    learner, lesson = learnt[0][name]
    losses = [
        float(F.cross_entropy(100 * _similar(clip, who, tasks[0]), tasks[0].labels))
        for who in (method("zero-shot"), learner)
    ]

    assert lesson.losses[1] < lesson.losses[0]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", CHANGING)
def test_older_parts_stay_as_they_are_while_a_later_task_learns(clip, tasks, learnt, name):
    """Bit for bit, and nothing stays trainable."""
    learner = copy.deepcopy(learnt[0][name][0])
    before = copy.deepcopy(_parts(learner))
    learner.learn(clip, tasks[1], BUDGET, learner.grid[-1], seed=1)
    after = _parts(learner)

    assert len(after) == 2
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert not any(tensor.requires_grad for part in after for tensor in part)


@pytest.mark.parametrize("name", CHANGING)
def test_the_model_is_left_as_it_was_found(clip, tasks, learnt, name):
    """After learning and asking: the same weights, the same answers, no hook, nothing trainable."""
    learner = learnt[0][name][0]
    plain = _similar(clip, method("zero-shot"), tasks[0])
    changed = _similar(clip, learner, tasks[0])
    now = clip.model.state_dict()

    assert not torch.equal(changed, plain)
    assert torch.equal(_similar(clip, method("zero-shot"), tasks[0]), plain)
    assert now.keys() == learnt[1].keys()
    assert all(torch.equal(now[key], value) for key, value in learnt[1].items())
    assert not any(module._forward_hooks for module in clip.model.modules())
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_branch_is_the_attention_over_other_keys_as_written_out_head_by_head(weight):
    """Its softmax is one of its own, and its output goes the way that the heads' own goes."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    x, pair = torch.randn(2, 5, 6), torch.randn(2, 8, 6)
    query = F.linear(x, attention.in_proj_weight[:6], attention.in_proj_bias[:6])
    mixed = torch.cat(
        [
            (query[..., head] @ pair[0, :, head].T / 3**0.5).softmax(-1) @ pair[1, :, head]
            for head in (slice(0, 3), slice(3, 6))
        ],
        dim=-1,
    )

    found = attended(attention, pair, weight, x)
    torch.testing.assert_close(found, weight * mixed @ attention.out_proj.weight.T)


def test_the_report_marks_exactly_the_methods_that_change_the_architecture():
    """The names that it marks, and what the methods say of themselves."""
    assert [name for name in METHODS if method(name).changes_architecture] == [*CHANGING]


def test_a_failure_inside_leaves_no_hook():
    """Whatever happens while a branch is attached, it comes off."""
    layer = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), beside({layer: lambda _: 1 / 0}):
        layer(torch.ones(1, 2))

    assert not layer._forward_hooks


def test_added_parameters_are_those_counted_by_hand(learnt):
    """One task: 8 keys and values a block, and a Gaussian; 4 channels, scale and shift, twice a block."""
    assert method("diki").added_parameters == method("c-ada").added_parameters == 0
    assert method("lora-4").added_parameters == 0
    assert learnt[0]["diki"][0].added_parameters == 2 * 8 * WIDTHS + 128 + 128 * 129 // 2
    assert learnt[0]["c-ada"][0].added_parameters == 2 * (2 * 4 * WIDTHS + 2 * WIDTHS)


def test_an_image_unlike_all_tasks_is_answered_by_the_model_alone(clip, tasks, learnt):
    """Its likelihood, and with it the weight of the branch, is next to nothing; the task's own get more."""
    learner = learnt[0]["diki"][0]
    far = Task(tasks[0].classes, -4 + 0 * tasks[0].pixels, tasks[0].labels)

    assert torch.equal(_similar(clip, learner, far), _similar(clip, method("zero-shot"), far))
    assert not torch.equal(_similar(clip, learner, tasks[0]), _similar(clip, method("zero-shot"), tasks[0]))


def test_the_answer_to_an_image_does_not_depend_on_those_asked_with_it(clip, tasks, learnt):
    """Alone or among others, whatever tasks and weights these get."""
    for name in CHANGING:
        learner = learnt[0][name][0]
        together = _similar(clip, learner, tasks[0])
        alone = Task(tasks[0].classes, tasks[0].pixels[:2], tasks[0].labels[:2])
        torch.testing.assert_close(_similar(clip, learner, alone), together[:2], rtol=0, atol=1e-5)


def test_new_channels_overlap_with_older_ones_as_worked_out_by_hand():
    """The squares of all products; nothing with one task."""
    adapter = Growing(3)
    adapter.down = [torch.tensor([[1.0, 0, 0], [0, 1, 0]])]
    assert float(adapter.overlap()) == 0
    adapter.down.append(torch.tensor([[2.0, 3, 4]]))
    assert float(adapter.overlap()) == 4 + 9


def test_attention_that_cannot_be_followed_is_refused_by_name():
    """A timm ViT has its matrices in one layer, which nothing here reads."""
    trunk = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=6, num_heads=1)
    model = nn.Module()
    model.visual = nn.Module()
    model.visual.trunk = trunk
    model.transformer = nn.Module()
    model.transformer.resblocks = nn.ModuleList()

    with pytest.raises(ModelError, match=r"visual\.trunk\.blocks\.0.*timm\.layers\.attention\.Attention"):
        blocks_of(model)
