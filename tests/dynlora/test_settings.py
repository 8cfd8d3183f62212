"""What is recorded of settings is what was read, and all of it."""

import json
from dataclasses import replace

import pytest
import torch

from dynlora import Settings, Task, adapt, load_clip, preset
from dynlora.task import Name

PRESETS = ("paper", "reference", "default")
UNREAD = {"default": {"batch_size": 3, "kappa_max": 0.1}, "paper": {"hold": 1.0, "views": 7, "guard": 0.5}}


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_recorded_of_a_preset_gives_it_back(name: str) -> None:
    """Also through JSON; what was left out is what it is by default."""
    recorded = json.loads(json.dumps(preset(name).as_dict()))

    assert Settings.from_dict(recorded) == preset(name)
    assert ("kappa_max" in recorded) == (recorded["kappa_total"] is None)
    assert ("batch_size" in recorded) == (name != "default")
    assert ("hold" in recorded) == (name == "default")


def test_records_with_all_settings_are_still_read() -> None:
    """Of manifests from before some were left out."""
    whole = preset("default").as_dict() | {"batch_size": 64, "kappa_max": 0.005}

    assert Settings.from_dict(whole) == preset("default")


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_recorded_changes_nothing_that_is_learnt(name: str) -> None:
    """Two steps with other values of it give the same bits."""
    generator = torch.Generator().manual_seed(0)
    task = Task([Name("red thing")], torch.randn(4, 3, 64, 64, generator=generator), torch.zeros(4).long())
    settings = replace(preset(name), steps=2, rank=2, gates="ones", names_per_step=4)
    settings = replace(settings, **({} if name == "default" else {"batch_size": 4}))
    clip = load_clip()
    one, other = (adapt(clip, task, s, seed=0) for s in (settings, replace(settings, **UNREAD[name])))

    assert set(UNREAD[name]).isdisjoint(settings.as_dict())
    assert one.factors
    for a, b in zip(one.factors, other.factors, strict=True):
        assert all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("lora_A", "lora_B", "importance"))
