"""The sweep over update locations: only what was chosen is updated, and nothing is left behind."""

import pytest
import torch

from dynlora.analysis import Probe, Sweep, analyze, folded, locations
from dynlora.attach import attached
from dynlora.clip import load_clip
from dynlora.errors import ModelError, TaskError
from dynlora.learner import adapt
from dynlora.settings import Settings
from dynlora.task import Name, Task

SHORT = Settings(steps=3, batch_size=6, rank=2, learning_rate=5e-3, gates="ones", dense_fraction=1.0)
CLASSES = [Name("red thing"), Name("blue thing")]


@pytest.fixture(scope="module")
def clip():
    """The bundled CLIP."""
    return load_clip()


@pytest.fixture(scope="module")
def weights(clip):
    """What it came with."""
    return {key: value.clone() for key, value in clip.model.state_dict().items()}


@pytest.fixture(scope="module")
def task():
    """Two classes of coloured noise."""
    pixels, labels = _noise(6, seed=0)
    return Task(CLASSES, pixels, labels, known=[Name("dog")])


def _noise(count, *, seed):
    pixels = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(count) % 2
    pixels[labels == 1, 0] += 2
    return pixels, labels


@pytest.fixture(scope="module")
def trials(clip, weights, task):
    """One sweep at rank 2, with a probe."""
    del weights  # taken before anything is learnt
    told = []
    probe = Probe([Name("dog"), Name("tree")], *_noise(4, seed=2))
    found = analyze(
        clip,
        task,
        Probe(CLASSES, *_noise(4, seed=1)),
        sweep=Sweep(SHORT, ranks=(2,)),
        probe=probe,
        told=lambda done, count: told.append((done, count)),
    )
    assert told == [(n, len(found)) for n in range(1, len(found) + 1)]
    return found


def test_the_locations_of_an_axis_cover_every_matrix_once(clip):
    """Towers, kinds of matrix and thirds of depth each divide the whole model."""
    found = locations(clip)
    with attached(clip.model, 1) as sites:
        for axis in ("all", "tower", "module", "depth"):
            places = [place for place in found if place.axis == axis]
            holders = [[place.name for place in places if place.holds(site)] for site in sites]

            assert all(len(names) == 1 for names in holders), axis
            assert {name for names in holders for name in names} == {place.name for place in places}


def test_the_model_as_it_is_comes_first_and_keeps_everything(trials):
    """Rank 0 changes nothing: cosines of 1, norm 0."""
    first = trials[0]

    assert (first.location, first.rank, first.delta_norm) == ("none", 0, 0.0)
    assert first.names_kept == pytest.approx(1, abs=1e-5)
    assert first.images_kept == pytest.approx(1, abs=1e-5)
    assert first.retention == first.probe_accuracy


def test_a_tower_that_is_not_updated_stays_where_it_was(trials):
    """Updates of the vision tower alone leave every name; those of the text tower alone every image."""
    by_name = {trial.location: trial for trial in trials}

    assert by_name["vision"].names_kept == pytest.approx(1, abs=1e-5)
    assert by_name["vision"].images_kept < 1 - 1e-5
    assert by_name["text"].images_kept == pytest.approx(1, abs=1e-5)
    assert by_name["text"].names_kept < 1 - 1e-5
    assert {name.split(".")[0] for name in by_name["text"].kept_ranks} == {"text"}
    assert {name.split(".")[2] for name in by_name["mlp_in"].kept_ranks} == {"mlp_in"}
    assert all(trial.delta_norm > 0 for trial in trials[1:])


def test_a_sweep_leaves_the_model_bit_for_bit_as_it_came(clip, weights, trials):
    """Every update is taken out again."""
    assert len(trials) > 10
    for key, value in clip.model.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_a_folded_update_is_taken_out_also_after_an_error(clip, weights, task):
    """The weights inside are other ones; afterwards they are the old ones."""
    update = adapt(clip, task, SHORT, only=lambda site: site.kind == "v")

    def learn_and_fail():
        with folded(clip.model, update):
            assert any(not torch.equal(v, weights[k]) for k, v in clip.model.state_dict().items())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_and_fail()

    assert all(torch.equal(v, weights[k]) for k, v in clip.model.state_dict().items())


def test_learning_without_any_matrix_and_measuring_without_an_image_are_refused(clip, task):
    """Both would give figures that mean nothing."""
    with pytest.raises(ModelError, match="at least one"):
        adapt(clip, task, SHORT, only=lambda _: False)
    empty = Probe(CLASSES, torch.empty(0, 3, 64, 64), torch.empty(0, dtype=torch.int64))
    with pytest.raises(TaskError, match="held out"):
        analyze(clip, task, empty, sweep=Sweep(SHORT))
