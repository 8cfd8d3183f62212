"""Gates as singular values: the same update, ordered by what each rank carries."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deploy.preprocess import Preprocessing, decode_image
from dynlora.clip import load_clip
from dynlora.learner import adapt
from dynlora.lora import LoRA
from dynlora.rank import soft_threshold
from dynlora.settings import DEFAULT
from dynlora.spectrum import respan
from dynlora.task import Name, Task

IMAGES = Path(__file__).parents[2] / "examples" / "demo" / "images"


def random_lora(rows, columns, rank, seed):
    """Dense factors."""
    lora = LoRA(columns, rows, rank)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_(generator=generator)
    return lora


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 10_000))
def test_respanning_changes_no_update_and_makes_gates_its_singular_values(rows, columns, rank, seed):
    """Up to one factor that all matrices share."""
    loras = [random_lora(rows, columns, rank, seed), random_lora(1, columns, 1, seed + 1)]
    before = [lora.delta().detach().clone() for lora in loras]
    respan(loras, 0.1, 0.6)
    values = []
    for delta, lora in zip(before, loras, strict=True):
        padded = torch.cat(
            [torch.linalg.svdvals(delta), torch.zeros(rank)]
        )  # a rank may be above the matrix's
        values.append(padded[: len(lora.importance)])
    unit = float(values[0][0] / loras[0].importance.detach()[0])

    for lora, delta, expected in zip(loras, before, values, strict=True):
        assert torch.allclose(lora.delta(), delta, atol=1e-4 * float(delta.abs().max() + 1))
        assert torch.allclose(lora.importance * unit, expected, rtol=1e-3, atol=1e-3)


@given(st.integers(0, 10_000), st.floats(0.001, 0.5))
def test_thresholds_take_away_as_many_of_the_smallest_as_the_energy_asked_for_allows(seed, energy):
    """Over all matrices together: those that carry more keep more."""
    loras = [random_lora(7, 5, 3, seed), random_lora(4, 6, 3, seed + 1)]
    values = torch.cat([torch.linalg.svdvals(lora.delta().detach())[:3] for lora in loras]).sort().values
    allowed = values.square().cumsum(0) <= energy * values.square().sum()
    respan(loras, energy, 0.6)
    gates = torch.cat([lora.importance for lora in loras]).detach()
    dead = soft_threshold(gates, 0.6 * 1.0001) == 0

    assert int(dead.sum()) == int(allowed.sum())


def test_an_update_of_zero_stays_zero():
    """Nothing was learnt: no division by it."""
    lora = LoRA(5, 4, 2)
    lora.reset(torch.Generator().manual_seed(0), random_importance=False)
    respan([lora], 0.1, 0.6)

    assert math.isfinite(float(lora.importance.detach().abs().sum()))
    assert not lora.delta().any()


@pytest.mark.nightly
def test_which_matrices_get_rank_is_decided_by_the_data_not_by_the_seed():
    """Rank correlation of the kept ranks over three seeds; the published gates have none (docs/log.md)."""
    clip = load_clip()
    preprocessing = Preprocessing.from_open_clip_cfg(clip.preprocess_cfg)
    folders = sorted((IMAGES / "drop" / "clothing").iterdir())
    images = [[decode_image(path) for path in sorted(folder.iterdir())] for folder in folders]
    labels = torch.cat([torch.full((len(of),), number) for number, of in enumerate(images)])
    pixels = torch.from_numpy(preprocessing(list(itertools.chain(*images))))
    task = Task([Name(folder.name) for folder in folders], pixels, labels)
    ranks = []
    for seed in range(3):
        found = adapt(clip, task, DEFAULT, seed=seed).ranks
        ranks.append(_places(torch.tensor([found[name] for name in sorted(found)])))
    pairs = itertools.combinations(ranks, 2)
    correlations = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs]

    assert min(correlations) > 0.7
    assert sum(correlations) / 3 > 0.8


def _places(values):
    """Ranks of values, equal ones sharing the mean of theirs."""
    below = (values[:, None] > values).sum(1)
    alike = (values[:, None] == values).sum(1)
    return below + (alike - 1) / 2
