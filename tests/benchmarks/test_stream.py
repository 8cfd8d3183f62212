"""The stream benchmark on miniature packs: every method learns, cells resume, figures add up."""

import dataclasses
import json
import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.stream import __main__ as stream_program
from benchmarks.stream import report
from benchmarks.stream.__main__ import main
from benchmarks.stream.cell import TUNED_BESIDE, TUNED_ON, Setting
from benchmarks.stream.methods import CHANGING, METHODS, Budget, fold_into, method
from benchmarks.stream.packs import PROBES, STREAM, Pack, drops_of, union_names
from daemon.adaptation import to_delta
from deploy.delta import fold
from deploy.preprocess import Preprocessing
from dynlora import Settings, adapt, load_clip
from dynlora.prompts import encode_text, tokenize

SMALL = Budget(steps=10, batch_size=8)


@pytest.fixture(scope="module")
def clip():
    """The bundled CLIP."""
    return load_clip()


@pytest.fixture(scope="module")
def weights(clip):
    """What every test starts from."""
    return {key: value.clone() for key, value in clip.model.state_dict().items()}


@pytest.fixture(autouse=True)
def fresh(clip, weights):
    """No test sees another's weights."""
    clip.model.load_state_dict(weights)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Every pack of the stream and the probes, with two classes of coloured noise each."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number, pack in enumerate((*STREAM, *PROBES)):
        with zipfile.ZipFile(folder / f"{pack}.zip", "w") as archive:
            for label in range(2):
                for split, count in (("train", 6), ("test", 2)):
                    for index in range(count):
                        values = rng.integers(0, 128, (72, 72, 3), dtype=np.uint8)
                        values[..., label] += 127
                        content = BytesIO()
                        Image.fromarray(values).save(content, "JPEG")
                        archive.writestr(f"{split}/thing {number} {label}/{index}.jpg", content.getvalue())
    return folder


@pytest.fixture(scope="module")
def packs(clip, data):
    """The first two packs."""
    preprocessing = Preprocessing.from_open_clip_cfg(clip.preprocess_cfg)
    return [Pack(data / f"{name}.zip", preprocessing) for name in STREAM[:2]]


def _loss(clip, task):
    """Cross-entropy of the whole task among its own names."""
    with torch.no_grad():
        images = clip.model.encode_image(task.pixels, normalize=True)
        texts = encode_text(clip.model, tokenize(clip, [c.name for c in task.classes]))
        return float(torch.nn.functional.cross_entropy(100 * images @ texts.T, task.labels))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("zero-shot", *CHANGING)])
def test_every_method_takes_real_steps_and_the_loss_falls(clip, weights, packs, name):
    """The weights end up elsewhere, the images of the task are told apart better, nothing stays trainable.

    The default leaves the vision tower as it is. What leaves all weights as they are is tested by itself.
    """
    [drop] = drops_of(packs[:1], [packs[0].train(0, shots=4, held_out=0)[0]], one_class=False)
    before = _loss(clip, drop.task)
    learner = method(name)
    lesson = learner.learn(clip, drop.task, SMALL, learner.grid[-1], seed=0)
    moved = [key for key, value in clip.model.state_dict().items() if not torch.equal(value, weights[key])]

    assert _loss(clip, drop.task) < before
    assert any(key.startswith("visual.") for key in moved) == (not name.startswith("default"))
    assert any(key.startswith("transformer.") for key in moved)
    assert "logit_scale" not in moved
    assert np.isfinite(lesson.losses).all()
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())


def test_orthogonal_tuning_keeps_the_length_of_every_column(clip, weights, packs):
    """R is orthogonal: within its block of rows no column gets longer or shorter."""
    [drop] = drops_of(packs[:1], [packs[0].train(0, shots=4, held_out=0)[0]], one_class=False)
    learner = method("orthsr")
    learner.learn(clip, drop.task, SMALL, learner.grid[0], seed=0)
    key = "transformer.resblocks.0.mlp.c_fc.weight"
    now, then = (state[key].view(-1, 32, state[key].shape[1]) for state in (clip.model.state_dict(), weights))

    assert not torch.equal(now, then)
    torch.testing.assert_close(now.norm(dim=1), then.norm(dim=1), rtol=1e-4, atol=1e-5)


def test_weights_gone_half_way_back_are_in_the_middle(clip, weights, packs):
    """WiSE-FT with share 1 is full tuning; with 0.5 it is the mean of that and the start."""
    [drop] = drops_of(packs[:1], [packs[0].train(0, shots=4, held_out=0)[0]], one_class=False)
    ends = []
    for share in (1.0, 0.5):
        clip.model.load_state_dict(weights)
        method("wise-ft").learn(clip, drop.task, SMALL, {"learning_rate": 1e-4, "share": share}, seed=0)
        ends.append({key: value.clone() for key, value in clip.model.state_dict().items()})
    key = "text_projection"

    assert not torch.equal(ends[0][key], weights[key])
    torch.testing.assert_close(ends[1][key], (ends[0][key] + weights[key]) / 2, rtol=1e-3, atol=1e-6)


def test_the_fold_of_the_benchmark_is_that_of_production(clip, weights, packs):
    """Both add the same update; only the order of additions within a matrix may differ."""
    [drop] = drops_of(packs[:1], [packs[0].train(0, shots=4, held_out=0)[0]], one_class=False)
    adaptation = adapt(clip, drop.task, Settings(steps=5, batch_size=8, rank=4), seed=0)
    expected = fold({key: value.numpy() for key, value in weights.items()}, [to_delta(adaptation)])
    fold_into(dict(clip.model.named_parameters()), adaptation)

    assert adaptation.factors
    for key, value in clip.model.state_dict().items():
        np.testing.assert_allclose(value.numpy(), expected[key], rtol=1e-5, atol=1e-6)


def test_shots_and_held_out_images_never_meet_and_follow_the_seed(packs):
    """Tuning sees no image that is learnt; the test split is another folder of the zip."""
    shots, held_out = packs[0].train(3, shots=4, held_out=9)
    again, _ = packs[0].train(3, shots=4, held_out=9)
    other, _ = packs[0].train(4, shots=4, held_out=9)

    assert torch.equal(shots.pixels, again.pixels)
    assert not torch.equal(shots.pixels, other.pixels)
    assert (len(shots.labels), len(held_out.labels)) == (8, 4)
    assert not any(torch.equal(a, b) for a in shots.pixels for b in held_out.pixels)


def test_one_class_drops_bring_every_class_alone_and_know_the_earlier_ones(packs):
    """Four drops for two packs of two classes, in order."""
    train = [pack.train(0, shots=2, held_out=0)[0] for pack in packs]
    drops = drops_of(packs, train, one_class=True)

    assert [[c.name for c in drop.task.classes] for drop in drops] == [
        [name.name] for name in union_names(packs)
    ]
    assert [drop.stage for drop in drops] == [0, 0, 1, 1]
    assert [len(drop.task.known) for drop in drops] == [0, 1, 2, 3]
    assert all(set(drop.task.labels.tolist()) == {0} for drop in drops)


@pytest.fixture
def short_stream(monkeypatch):
    """The four packs that tuning needs, and one probe: the other six would only be more of the same."""
    for module in (stream_program, report):
        monkeypatch.setattr(module, "STREAM", (*TUNED_ON, *TUNED_BESIDE))
        monkeypatch.setattr(module, "PROBES", PROBES[:1])


@pytest.mark.usefixtures("short_stream")
def test_a_stopped_benchmark_goes_on_where_it_was_and_ends_with_the_same_figures(data, tmp_path, capsys):
    """A cell that is there is not run again; one that is missing comes out as before."""
    cells = tmp_path / "results" / "stream"
    methods = ("zero-shot", "lora-4", *CHANGING)
    arguments = ["--data", str(data), "--cells", str(cells), "--quick", "--methods", *methods]
    main(arguments)
    folder = next(cells.iterdir())
    lora, zero_shot = folder / "lora-4-0.json", folder / "zero-shot-0.json"
    first, untouched = json.loads(lora.read_text()), zero_shot.stat().st_mtime_ns
    lora.unlink()
    main(arguments)
    again = json.loads(lora.read_text())

    assert zero_shot.stat().st_mtime_ns == untouched
    assert [again[key] for key in ("own", "union", "drift", "losses")] == [
        first[key] for key in ("own", "union", "drift", "losses")
    ]
    assert np.array(first["union"]).shape == (4, 4)
    text = (cells.parent / f"stream-{folder.name}.md").read_text()
    assert "| lora-4 |" in text
    assert "| zero-shot |" in text
    drift = json.loads(zero_shot.read_text())["drift"]
    assert drift == [0.0] * 4
    for name in CHANGING:
        cell = json.loads((folder / f"{name}-0.json").read_text())
        assert (cell["drift"], cell["delta_norm"]) == ([None] * 4, [None] * 4)
        assert cell["added_parameters"] > 4 * 24_576
        assert f"| {name} (changes the architecture) | 0 |" in text


def test_figures_of_a_cell_are_those_worked_out_by_hand():
    """Two tasks, two spaces; Transfer looks above the diagonal only."""
    cell = {
        "union": [[50.0, 10.0], [40.0, 60.0]], "own": [[60.0, 20.0], [60.0, 70.0]], "negative_flips": [1, 3],
        "probes": {"cifar10": 30.0}, "delta_norm": [1.0, 2.0], "drift": [1.0, 2.5], "kept_rank": [4.0, 6.0],
        "seconds": [1.0, 2.0], "added_parameters": 0,
    }  # fmt: skip
    found = report.figures(cell)

    assert (found["union_transfer"], found["union_average"], found["union_last"]) == (10, 40, 50)
    assert (found["union_forgetting"], found["union_backward"]) == (5, -5)
    assert (found["own_transfer"], found["own_last"]) == (20, 65)
    assert (found["drift"], found["kept_rank"], found["seconds"], found["negative_flips"]) == (2.5, 5, 3, 2)
    without = report.figures(cell | {"delta_norm": [None, None], "drift": [None, None]})
    assert found.keys() - without.keys() == {"delta_norm", "drift"}


@pytest.mark.parametrize("one_class", [False, True])
def test_the_report_says_of_how_many_steps_a_task_was(one_class):
    """Of those that were taken: class by class there are others."""
    setting = Setting(16, 60, 24, 10, one_class=one_class)
    machine = {"date": "2026-11-25", "cpu": "a CPU", "cores": 2, "torch": "2"}
    result = {"machine": machine, "setting": dataclasses.asdict(setting), "seeds": {}, "means": {}}
    text = report.text(result | {"paired": {}, "tuning": {}}, [])

    said = "each class a task of 20 steps on 24 images" if one_class else "ten tasks of 60 steps on 24 images"
    assert said in text
    assert ("60 steps" in text) == (not one_class)


def test_differences_are_paired_by_seed():
    """A seed that only one of the two has does not count."""
    runs = {0: {"union_last": 1.0}, 1: {"union_last": 2.0}, 2: {"union_last": 100.0}}
    reference = {0: {"union_last": 3.0}, 1: {"union_last": 6.0}}

    assert report.paired(runs, reference)["union_last"] == {"mean": 3.0, "error": 1.0, "seeds": 2}


def test_settings_with_other_budgets_have_other_folders():
    """Cells of different budgets are never mixed."""
    names = {Setting(16, steps, 24, 20, one_class=one).name for steps in (40, 60) for one in (False, True)}

    assert len(names) == 4
