"""One training step against the published recipe done straightforwardly, and peft: gradients, then time.

    python -m benchmarks.step [--model ViT-B-32|ViT-B-16|bundled] [--repeats 5] [--quick]

The published loss, batch 16, 40 classes, rank 16, random weights (time does not depend on values), the same
weights and the same batch for all. Gradients of all LoRA tensors of both towers are compared first, as the
relative L2 error over all of them; only then is anything timed, in turn, so that a busy moment meets all
alike; the best counts. CPU time is given, too: other work on the machine lengthens it less.

*reference*  benchmarks/reference_step.py: 77 tokens, plain autograd, float32; below it the same with cut text
*ours*       dynlora's: `Encoders` and `PublishedObjective`, in float32 and in bfloat16
*peft*       peft's LoRA on open_clip's model, where it is installed. It knows no gates; of a fused in_proj it
             makes one update instead of three, by adding it to the weight in every pass
*peak*       the share of the rate of a 2048³ product in the same dtype that useful operations alone make up:
             2 x forward with cut text, as in tools/reference_step.py; and the same of what is really needed,
             where a shared beginning of prompts counts once, and the last block of a tower for one token

A quick run repeats twice and writes no results.
"""

import argparse
import copy
import dataclasses
import importlib.util
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import reporting
from benchmarks.reference_step import ReferenceStep, Weights, useful_flops
from deploy.cpus import usable_cpus
from dynlora import attach
from dynlora.attach import Site
from dynlora.clip import Clip, load_clip, plain_tokenizer
from dynlora.encoders import Dtype
from dynlora.objectives import PublishedObjective
from dynlora.settings import PAPER
from dynlora.task import Name, Task

BATCH, CLASSES, RANK, SEED = 16, 40, 16, 0
NAMES = [f"thing number {number}" for number in range(CLASSES)]
TEMPLATE = "a photo of a {}."
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
GOALS = {
    "gradient error, float32": (1e-4, False),
    "reference / ours, float32": (2.7, True),
    "reference / ours, bfloat16": (4.5, True),
    "share of peak, float32": (0.8, True),
}


def build(architecture: str) -> Clip:
    """The bundled model, or an open_clip architecture with seeded random weights."""
    if architecture == "bundled":
        return load_clip()
    import open_clip

    torch.manual_seed(SEED)
    logging.disable(logging.WARNING)  # open_clip warns that the weights are random, which is meant
    model = open_clip.create_model(architecture, pretrained=None, precision="fp32").eval()
    logging.disable(logging.NOTSET)
    size = model.visual.image_size[0]
    return Clip(model.requires_grad_(False), architecture, {}, {"size": size}, plain_tokenizer(77))


def make_task(clip: Clip) -> Task:
    """One batch: every class has an image, as a task must; the objective draws BATCH of them."""
    pixels = torch.randn(CLASSES, 3, *clip.image_size, generator=torch.Generator().manual_seed(SEED))
    return Task([Name(name, TEMPLATE) for name in NAMES], pixels, torch.arange(CLASSES))


def start(sites: Sequence[Site]) -> None:
    """Random gates and, unlike at the real start, a random lora_B: else A and the gates have no gradient."""
    attach.reset(list(sites), seed=SEED, random_importance=True)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for site in sites:
            site.lora.lora_B.normal_(std=0.01, generator=generator)


def by_key(sites: Sequence[Site]) -> dict[str, list[Weights]]:
    """The same tensors, as the reference takes them."""
    updates: dict[str, list[Weights]] = {}
    for site in sites:
        lora = site.lora
        updates.setdefault(site.key, []).append(Weights(lora.lora_A, lora.lora_B, lora.importance))
    return updates


def relative_error(gradients: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Relative L2 error over all tensors together."""
    difference = torch.cat([(a - b).flatten() for a, b in zip(gradients, reference, strict=True)])
    return float(difference.norm() / torch.cat([b.flatten() for b in reference]).norm())


def large_product(dtype: Dtype) -> Callable[[], object]:
    """A 2048³ product, whose rate counts as the machine's peak: timed in turn with the steps, as they are."""
    a, b = (torch.randn(2048, 2048).to(getattr(torch, dtype)) for _ in range(2))
    return lambda: a @ b


def seconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock time and CPU time, of all threads, of one call."""
    started, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - used


def peft_step(
    plain: torch.nn.Module, task: Task, index: Tensor, tokens: Tensor
) -> Callable[[], object] | None:
    """A step with peft's LoRA on every linear layer of the blocks; None where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        return None
    import peft

    targets = r".*(resblocks|blocks)\.\d+\.(attn|attn\.(q|kv|qkv|proj)|mlp\.(c_fc|c_proj|fc1|fc2))"
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    model: Any = peft.get_peft_model(copy.deepcopy(plain), config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pixels, labels = task.pixels[index], task.labels[index]

    def run() -> object:
        images, texts = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
        logits = model.logit_scale.exp() * images @ texts.T
        members = torch.nn.functional.one_hot(labels, CLASSES).T.float()
        cross_entropy = torch.nn.functional.cross_entropy
        loss = cross_entropy(logits, labels) + cross_entropy(logits.T, members)
        return torch.autograd.grad(loss, parameters)

    return run


def measure(architecture: str, *, repeats: int) -> dict[str, Any]:
    """Gradient errors, then the best of `repeats` seconds of each."""
    clip = build(architecture)
    task = make_task(clip)
    objectives = {
        dtype: PublishedObjective(
            clip, task, dataclasses.replace(PAPER, batch_size=BATCH, dtype=dtype), seed=SEED
        )
        for dtype in DTYPES
    }
    encoders, cut = objectives["float32"].encoders, objectives["float32"].prompts
    index = objectives["float32"].batches.at(0)
    batch = task.pixels[index], task.labels[index]
    full = clip.tokenizer([TEMPLATE.format(name) for name in NAMES])
    flops = {"useful": useful_flops(lambda: (encoders.images(batch[0]), encoders.texts(cut)))}
    with attach.attached(clip.model, 1) as sites:  # as little update as there can be
        attach.reset(sites, seed=SEED, random_importance=False)
        flops["needed"] = useful_flops(lambda: (encoders.images(batch[0]), encoders.texts(cut)))
    plain = copy.deepcopy(clip.model)
    with attach.attached(clip.model, RANK) as sites:
        start(sites)
        reference = ReferenceStep(plain, by_key(sites))

        def ours(dtype: Dtype) -> tuple[Tensor, ...]:
            return torch.autograd.grad(objectives[dtype].loss(0), reference.parameters)

        works: dict[str, Callable[[], Any]] = {
            "reference, all tokens, float32": lambda: reference.run(*batch, full),
            "reference, cut text, float32": lambda: reference.run(*batch, cut.tokens),
            "reference, cut text, bfloat16": lambda: reference.run(*batch, cut.tokens, bfloat16=True),
            "ours, float32": lambda: ours("float32"),
            "ours, bfloat16": lambda: ours("bfloat16"),
        }
        truth, *others = (work() for work in works.values())
        errors = dict(zip(list(works)[1:], (relative_error(g, truth) for g in others), strict=True))
        if peft_run := peft_step(plain, task, index, full):
            works["peft, all tokens, float32"] = peft_run
            peft_run()
        products = {f"product, {dtype}": large_product(dtype) for dtype in DTYPES}
        took = times_in_turn(works | products, repeats=repeats)
    seconds = {name: min(wall for wall, _ in of) for name, of in took.items()}
    cpu_seconds = {name: min(cpu for _, cpu in of) for name, of in took.items() if name in works}
    rates = {dtype: 2 * 2048**3 / seconds.pop(f"product, {dtype}") for dtype in DTYPES}
    return {
        "gradient_errors": errors,
        "seconds": seconds,
        "median_seconds": {name: statistics.median(wall for wall, _ in took[name]) for name in works},
        "cpu_seconds": cpu_seconds,
        "flops": flops,
        "gemm_rates": rates,
    }


def times_in_turn(
    works: dict[str, Callable[[], object]], *, repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Wall-clock and CPU time of every call of each."""
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            # A product is over in a moment: several, so that its best is as good a moment as the steps' best.
            times = 8 if name.startswith("product") else 1
            took[name] += [seconds_of(work) for _ in range(times)]
    return took


def figures_of(result: dict[str, Any]) -> dict[str, float]:
    """What goals speak of."""
    seconds, errors = result["seconds"], result["gradient_errors"]
    figures = {f"gradient error, {dtype}": errors[f"ours, {dtype}"] for dtype in DTYPES}
    whole = seconds["reference, all tokens, float32"]
    figures |= {f"reference / ours, {dtype}": whole / seconds[f"ours, {dtype}"] for dtype in DTYPES}
    cpu = result["cpu_seconds"]
    whole_cpu = cpu["reference, all tokens, float32"]
    figures |= {f"the same in CPU time, {dtype}": whole_cpu / cpu[f"ours, {dtype}"] for dtype in DTYPES}
    if "peft, all tokens, float32" in seconds:
        figures["peft / ours, float32"] = seconds["peft, all tokens, float32"] / seconds["ours, float32"]
    for name, flops in result["flops"].items():
        label = "share of peak" if name == "useful" else f"share of peak, {name} operations"
        for dtype, rate in result["gemm_rates"].items():
            figures[f"{label}, {dtype}"] = flops / seconds[f"ours, {dtype}"] / rate
    return figures


def describe(result: dict[str, Any]) -> str:
    """Tables of seconds and of figures with their goals, which are set for ViT-B/32."""
    rows = [
        [
            name,
            f"{took:.3f}",
            f"{result['median_seconds'][name]:.3f}",
            f"{result['cpu_seconds'][name]:.3f}",
            f"{result['gradient_errors'].get(name, 0):.1e}" if "peft" not in name else "",
        ]
        for name, took in result["seconds"].items()
    ]
    goals = GOALS if result["model"] == "ViT-B-32" else {}
    figures = [
        [name, f"{value:.3g}",
         reporting.verdict(value, goal=goals[name][0], at_least=goals[name][1]) if name in goals else ""]
        for name, value in result["figures"].items()
    ]  # fmt: skip
    rates = ", ".join(f"{rate / 1e9:.0f} G/s in {dtype}" for dtype, rate in result["gemm_rates"].items())
    return (
        f"{result['model']}, batch {BATCH}, {CLASSES} classes, rank {RANK}, {result['threads']} threads; "
        f"{result['flops']['useful'] / 1e9:.1f} G useful operations, {result['flops']['needed'] / 1e9:.1f} G "
        f"of them needed; a 2048³ product runs at {rates}.\n\n"
        + reporting.table(["step", "seconds", "median", "CPU seconds", "gradient error"], rows)
        + "\n\n"
        + reporting.table(["figure", "value", "goal"], figures)
    )


def main() -> None:
    """Run, print, and write results/step-<model>.json and .md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    where, threads = reporting.machine(), usable_cpus()
    torch.set_num_threads(threads)
    result = measure(options.model, repeats=2 if options.quick else options.repeats)
    result |= {"model": options.model, "threads": threads, "seed": SEED, "machine": where}
    result["figures"] = figures_of(result)
    text = describe(result)
    if options.quick:
        print(text)
    else:
        reporting.save(f"step-{options.model}", result, text)


if __name__ == "__main__":
    main()
