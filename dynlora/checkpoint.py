"""A learning run as bytes: safetensors, never pickle.

Holds parameters and Adam's two moments, with the step, its loss, the seed and the settings they belong to.
Random numbers need no state: every step derives its own from the seed and its number.
"""

import json
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from dynlora.errors import CheckpointError
from dynlora.settings import Settings

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # Adam's, with the number of steps that a parameter took part in
_META = "meta"  # a uint8 tensor of JSON


def pack(
    parameters: Sequence[nn.Parameter],
    state: MutableMapping[Tensor, Any],
    *,
    step: int,
    loss: float,
    seed: int,
    settings: Settings,
) -> bytes:
    """The run after `step` steps, the last one's `loss` with it. `state` is the optimiser's, by parameter."""
    meta = json.dumps({"step": step, "loss": loss, "seed": seed, "settings": settings.as_dict()}).encode()
    tensors = {_META: torch.frombuffer(bytearray(meta), dtype=torch.uint8)}
    for index, parameter in enumerate(parameters):
        tensors[f"{index}.value"] = parameter.detach().contiguous()
        for name in _MOMENTS if parameter in state else ():
            tensors[f"{index}.{name}"] = state[parameter][name].contiguous()
    return save(tensors, {"step": str(step)})  # for those who read the header alone


def unpack(
    content: bytes,
    parameters: Sequence[nn.Parameter],
    state: MutableMapping[Tensor, Any],
    *,
    seed: int,
    settings: Settings,
) -> tuple[int, float]:
    """Put a packed run back in place; returns the number of steps it had done and the loss of the last one.

    Raises:
        CheckpointError: damaged, or of another seed, other settings or another architecture.
    """
    try:
        tensors = load(content)
        meta = json.loads(bytes(tensors.pop(_META).tolist()))
        step, loss = int(meta["step"]), float(meta["loss"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint cannot be read ({error}); delete it to start over") from error
    expected = json.loads(json.dumps({"seed": seed, "settings": settings.as_dict()}))
    found = {key: meta.get(key) for key in expected}
    if found != expected:
        raise CheckpointError(f"the checkpoint is of another run: expected {expected}, found {found}")
    shapes = [tuple(parameter.shape) for parameter in parameters]
    if shapes != [tuple(tensors.get(f"{i}.value", torch.empty(0)).shape) for i in range(len(shapes))]:
        raise CheckpointError("the checkpoint is of another architecture; delete it to start over")
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            parameter.copy_(tensors[f"{index}.value"])
            if f"{index}.exp_avg" in tensors:
                state[parameter] = {name: tensors[f"{index}.{name}"] for name in _MOMENTS}
    return step, loss
