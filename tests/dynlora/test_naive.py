"""The learner against deliberately naive implementations, written from the equations in float64 and loops.

Nothing here uses a layer, loss, threshold, schedule or fold of the project, but for what is being tested.
"""

import math

import numpy as np
import open_clip
import pytest
import torch
from torch import nn

from dynlora import learner
from dynlora.attach import attached, reset
from dynlora.clip import Clip, plain_tokenizer
from dynlora.learner import adapt
from dynlora.lora import LoRAAttention, LoRAFusedLinear, LoRALinear
from dynlora.rank import Schedule, soft_threshold
from dynlora.settings import Settings, preset
from dynlora.task import Name, Task


def _fill(lora, seed):
    generator = torch.Generator().manual_seed(seed)
    lora.reset(generator, random_importance=True)
    lora.lora_B.data.normal_(0, 0.3, generator=generator)


def _naive_delta(lora):
    """ΔW = Σ_i w_i B[:, i] A[i, :], element by element, in float64."""
    b, a, w = (p.detach().double().numpy() for p in (lora.lora_B, lora.lora_A, lora.importance))
    delta = np.zeros((b.shape[0], a.shape[1]))
    for row in range(delta.shape[0]):
        for column in range(delta.shape[1]):
            for i in range(len(w)):
                delta[row, column] += w[i] * b[row, i] * a[i, column]
    return delta


def _naive_linear(x, weight, bias):
    return x.detach().double().numpy() @ weight.T + bias.detach().double().numpy()


def test_a_linear_layer_is_the_equation():
    """Y = x (W + Σ w_i B_i A_i)ᵀ + b."""
    base = nn.Linear(5, 7)
    layer = LoRALinear(base, rank=3)
    _fill(layer.lora, 1)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    weight = base.weight.detach().double().numpy() + _naive_delta(layer.lora)

    assert np.abs(layer(x).detach().numpy() - _naive_linear(x, weight, base.bias)).max() < 1e-5


def test_a_fused_linear_layer_is_the_equation_for_each_of_its_parts():
    """Rows of part i of W get the update of part i, as in timm's qkv."""
    base = nn.Linear(5, 12)
    layer = LoRAFusedLinear(base, rank=2, parts=3)
    weight = base.weight.detach().double().numpy().copy()
    for part, lora in enumerate(layer.loras):
        _fill(lora, part)
        weight[4 * part : 4 * part + 4] += _naive_delta(lora)
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(2))

    assert np.abs(layer(x).detach().numpy() - _naive_linear(x, weight, base.bias)).max() < 1e-5


def _softmax(scores):
    e = np.exp(scores - scores.max())
    return e / e.sum()


@pytest.mark.parametrize("is_causal", [False, True])
def test_native_attention_is_the_equation_head_by_head_and_token_by_token(is_causal):
    """softmax(q kᵀ / √d) v with updated q, k, v and out, in loops over everything."""
    width, heads, length = 8, 2, 4
    base = nn.MultiheadAttention(width, heads, batch_first=True)
    nn.init.normal_(base.in_proj_bias, generator=torch.Generator().manual_seed(5))
    layer = LoRAAttention(base, rank=2)
    loras = (layer.q, layer.k, layer.v, layer.out.lora)
    for seed, lora in enumerate(loras):
        _fill(lora, seed)
    x = torch.randn(2, length, width, generator=torch.Generator().manual_seed(9))
    mask = torch.full((length, length), float("-inf")).triu(1) if is_causal else None
    found, _ = layer(x, x, x, need_weights=False, attn_mask=mask)
    fused, bias = base.in_proj_weight.detach().double().numpy(), base.in_proj_bias.detach().double().numpy()
    size = width // heads
    for n in range(2):
        tokens = x[n].double().numpy()
        q, k, v = (
            tokens @ (fused.reshape(3, width, width)[i] + _naive_delta(lora)).T + bias.reshape(3, width)[i]
            for i, lora in enumerate(loras[:3])
        )
        mixed = np.zeros((length, width))
        for head in range(heads):
            of = slice(head * size, (head + 1) * size)
            for t in range(length):
                seen = t + 1 if is_causal else length
                share = _softmax(np.array([q[t, of] @ k[s, of] / math.sqrt(size) for s in range(seen)]))
                mixed[t, of] = sum(share[s] * v[s, of] for s in range(seen))
        weight = base.out_proj.weight.detach().double().numpy() + _naive_delta(layer.out.lora)
        expected = mixed @ weight.T + base.out_proj.bias.detach().double().numpy()
        assert np.abs(found[n].detach().numpy() - expected).max() < 1e-5


def _naive_reference(values, kappa):
    """What the authors' code does to each gate, in its order."""
    out = []
    for x in values:
        y = x
        if y > kappa:
            y -= kappa
        elif y < -kappa:
            y += kappa
        out.append(0.0 if abs(y) < kappa else y)
    return out


def test_the_reference_operator_does_what_the_authors_code_does_gate_by_gate():
    """Shrink what is outside of κ, then zero what is inside: a dead zone that ends at 2κ."""
    values = np.linspace(-3, 3, 121).tolist()
    found = soft_threshold(torch.tensor(values, dtype=torch.float64), 0.7, operator="reference")

    assert found.tolist() == pytest.approx(_naive_reference(values, 0.7))


def _reference_kappas(steps, dense_fraction, kappa_max, levels):
    """The authors' loop over thresholds, without what it trains."""
    ladder = np.linspace(0, kappa_max, levels)
    dense = dense_fraction * steps
    width, at = int((steps - dense) // levels), 0
    applied = []
    for iteration in range(steps):
        if width > 0 and iteration >= dense and iteration % width == 0:
            at += 1
        applied.append(ladder[min(len(ladder) - 1, at)] if iteration > dense else 0.0)
    return applied


@pytest.mark.parametrize(("steps", "dense"), [(500, 0.5), (501, 0.5), (333, 0.4), (120, 0.25), (60, 0.5)])
def test_the_reference_ramp_counts_as_the_authors_code_does(steps, dense):
    """Step for step, where the number of steps does not divide evenly as well."""
    schedule = Schedule(steps, dense, 0.005, 50, stairs="reference")

    assert [schedule.kappa(step) for step in range(steps)] == pytest.approx(
        _reference_kappas(steps, dense, 0.005, 50)
    )


def test_the_presets_say_what_was_published():
    """Every number of the published recipe; the reference preset differs in dead zone and ramp only."""
    paper, reference = preset("paper").as_dict(), preset("reference").as_dict()
    expected = {
        "objective": "published", "rank": 16, "steps": 500, "batch_size": 64, "learning_rate": 5e-4,
        "betas": (0.9, 0.9999), "weight_decay": 0.0, "dense_fraction": 0.5, "kappa_max": 0.005,
        "kappa_levels": 50, "kappa_total": None, "settle_fraction": 0.0, "threshold": "paper",
        "stairs": "equal", "gates": "random",
    }  # fmt: skip

    assert {key: paper[key] for key in expected} == expected
    assert {key for key in paper if paper[key] != reference[key]} == {"threshold", "stairs"}
    total = sum(preset("reference").schedule_for(500).kappa(step) for step in range(500))
    assert total == pytest.approx(0.65, abs=1e-3)


def test_vit_b_16_has_as_many_trainable_parameters_as_published():
    """2,654,208 in the vision tower, 1,769,472 in the text tower, 2,304 gates."""
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16"))
        with attached(model, rank=preset("paper").rank) as sites:
            counts = {"vision": 0, "text": 0, "gates": 0}
            for site in sites:
                counts[site.tower] += site.lora.lora_A.numel() + site.lora.lora_B.numel()
                counts["gates"] += site.lora.importance.numel()
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)

    assert counts == {"vision": 2_654_208, "text": 1_769_472, "gates": 2_304}
    assert trainable == sum(counts.values()) == 4_425_984


@pytest.fixture(scope="module")
def tiny():
    """A small native CLIP with random weights."""
    torch.manual_seed(11)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    model = open_clip.CLIP(**config).eval().requires_grad_(False)
    return Clip(model, "tiny", config, {"size": 16}, plain_tokenizer(77))


class _Naive:
    """Algorithm 1 of the paper on merged weights: ΔW added in plain matrices, autograd, AdamW by hand."""

    def __init__(self, clip, task, settings, seed):
        self.clip, self.task, self.s = clip, task, settings
        with attached(clip.model, settings.rank) as sites:
            reset(sites, seed=seed, random_importance=settings.gates == "random")
            self.places = [(s.key, s.row_start, s.row_stop) for s in sites]
            parts = [(s.lora.lora_A, s.lora.lora_B, s.lora.importance) for s in sites]
            self.values = [[p.detach().clone().double().requires_grad_() for p in part] for part in parts]
        self.model = open_clip.CLIP(**clip.model_cfg).double().eval()
        self.base = {k: v.double() for k, v in clip.model.state_dict().items()}
        self.moments = [[(torch.zeros_like(p), torch.zeros_like(p)) for p in group] for group in self.values]
        self.tokens = clip.tokenizer([f"a photo of a {c.name}." for c in task.classes])

    def weights(self):
        state = {k: v.clone() for k, v in self.base.items()}
        for (key, start, stop), (a, b, w) in zip(self.places, self.values, strict=True):
            delta = sum(w[i] * torch.outer(b[:, i], a[i]) for i in range(len(w)))
            rows = torch.zeros_like(state[key])
            rows[start:stop] = delta
            state[key] = state[key] + rows
        return state

    def loss(self, index):
        """The published loss, full-length prompts, term by term."""
        state, pixels = self.weights(), self.task.pixels[index].double()
        images, texts, scale = torch.func.functional_call(self.model, state, (pixels, self.tokens))
        logits, labels = scale * images @ texts.T, self.task.labels[index]
        n, classes = logits.shape
        to_text = -sum(logits[i, labels[i]] - torch.logsumexp(logits[i], 0) for i in range(n)) / n
        to_image = torch.zeros((), dtype=torch.float64)
        for c in range(classes):
            for i in range(n):
                if labels[i] == c:
                    to_image = to_image - (logits[i, c] - torch.logsumexp(logits[:, c], 0))
        return to_text + to_image / (classes + len(self.task.known))

    def step(self, number, index):
        loss = self.loss(index)
        flat = [p for group in self.values for p in group]
        gradients = iter(torch.autograd.grad(loss, flat))
        rate = self.s.learning_rate * 0.5 * (1 + math.cos(math.pi * number / self.s.steps))
        beta1, beta2 = self.s.betas
        kappas = _reference_kappas(self.s.steps, self.s.dense_fraction, self.s.kappa_max, self.s.kappa_levels)
        kappa = kappas[number]
        with torch.no_grad():
            for group, moments in zip(self.values, self.moments, strict=True):
                for p, (m, v) in zip(group, moments, strict=True):
                    g = next(gradients)
                    m.mul_(beta1).add_((1 - beta1) * g)
                    v.mul_(beta2).add_((1 - beta2) * g * g)
                    mean, square = m / (1 - beta1 ** (number + 1)), v / (1 - beta2 ** (number + 1))
                    p.sub_(rate * (mean / (square.sqrt() + 1e-8) + self.s.weight_decay * p))
                w = group[2]
                w.copy_(torch.tensor(_naive_reference(w.tolist(), kappa), dtype=torch.float64))
        return float(loss.detach())


def test_whole_training_steps_follow_the_naive_trajectory(tiny):
    """Six steps of AdamW on A, B and w, then the authors' threshold: losses, gates and ΔW agree."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(9) % 3
    pixels = torch.randn(9, 3, 16, 16, generator=generator) + labels.view(-1, 1, 1, 1)
    classes = [Name("cat"), Name("a longer thing"), Name("ox")]
    task = Task(classes, pixels, labels, known=[Name("dog")])
    settings = Settings(
        steps=6, batch_size=9, rank=3, kappa_max=0.2, kappa_levels=3, learning_rate=2e-2,
        threshold="reference", stairs="reference",
    )  # fmt: skip
    naive = _Naive(tiny, task, settings, seed=4)
    losses = []
    everything = torch.arange(9)  # one batch holds all images, so their order does not matter
    expected_losses = [naive.step(number, everything) for number in range(6)]
    hooks = learner.Hooks(on_progress=lambda progress: losses.append(progress.loss))
    found = adapt(tiny, task, settings, seed=4, hooks=hooks)
    deltas = {(f.key, f.row_start): f.delta() for f in found.factors}
    ranks = []
    for (key, start, _), (a, b, w) in zip(naive.places, naive.values, strict=True):
        ranks.append(int((w != 0).sum()))
        if ranks[-1]:
            expected = ((b * w) @ a).detach()
            difference = (deltas[key, start].double() - expected).norm() / expected.norm()
            assert difference < 2e-3, (key, start, float(difference))

    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert list(found.ranks.values()) == ranks
    assert 0 < sum(ranks) < 3 * len(ranks)


def test_the_sigmoid_loss_is_siglips_pair_by_pair(tiny, monkeypatch):
    """−(1/B) Σ_image Σ_class log σ(±(s·cos + bias)), + for the image's own class."""
    from dynlora.objectives import PublishedObjective

    labels = torch.arange(5) % 2
    task = Task([Name("cat"), Name("ox")], torch.randn(5, 3, 16, 16), labels)
    monkeypatch.setattr(tiny.model, "logit_bias", nn.Parameter(torch.tensor(-3.0)))
    with torch.no_grad():
        found = float(PublishedObjective(tiny, task, Settings(batch_size=5), seed=0).loss(0))
        images = tiny.model.encode_image(task.pixels, normalize=True).double()
        tokens = tiny.tokenizer(["a photo of a cat.", "a photo of a ox."])
        texts = tiny.model.encode_text(tokens, normalize=True).double()
        scale = math.exp(float(tiny.model.logit_scale))
    total = 0.0
    for b in range(5):
        for c in range(2):
            z = 1 if labels[b] == c else -1
            total -= math.log(1 / (1 + math.exp(-z * (scale * float(images[b] @ texts[c]) - 3))))

    assert found == pytest.approx(total / 5, rel=1e-5)


def test_the_numpy_fold_is_the_sum_in_float64_to_rounding():
    """W + Σ_i w_i B_i A_iᵀ, in loops, on rows in the middle of a matrix."""
    from deploy.delta import Delta, Factor, fold

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((9, 6)).astype(np.float32)
    b, a, w = (rng.standard_normal(s).astype(np.float32) for s in ((4, 3), (3, 6), (3,)))
    folded = fold({"m": weight}, [Delta([Factor("m", 2, 6, b, a, w)])])["m"]
    expected = weight.astype(np.float64)
    for row in range(4):
        for column in range(6):
            for i in range(3):
                expected[2 + row, column] += float(w[i]) * float(b[row, i]) * float(a[i, column])

    assert np.abs(folded - expected).max() < 2e-6
    assert np.array_equal(folded[[0, 1, 6, 7, 8]], weight[[0, 1, 6, 7, 8]])
