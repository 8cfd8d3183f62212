"""The three models that every version is: vision, text, classifier. Their tensors, and what they compute."""

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.runtime import DEFAULT_TOP, LoadedVersion, Prediction
from deploy.server.engine import Call, Engine
from deploy.server.problems import Problem
from deploy.server.settings import Limits
from deploy.server.tensors import InferRequest, Spec, Tensor

Outputs = dict[str, NDArray[Any]]
Compute = Callable[[Engine, Call, InferRequest], Awaitable[Outputs]]
PLATFORM = "onnxruntime_onnx"


@dataclass(frozen=True)
class Model:
    """A name on the wire, its tensors (they depend on the architecture), and its computation.

    Where several inputs are listed, ``alternatives`` says of which exactly one must come.
    """

    name: str
    inputs: Callable[[LoadedVersion], tuple[Spec, ...]]
    outputs: Callable[[LoadedVersion], tuple[Spec, ...]]
    alternatives: tuple[str, ...]
    compute: Compute

    def metadata(self, loaded: LoadedVersion, versions: list[int]) -> dict[str, Any]:
        """The answer to GET /v2/models/NAME."""
        return {
            "name": self.name,
            "versions": [str(version) for version in versions],
            "platform": PLATFORM,
            "inputs": [spec.document() for spec in self.inputs(loaded)],
            "outputs": [spec.document() for spec in self.outputs(loaded)],
        }

    def wanted(self, loaded: LoadedVersion, request: InferRequest) -> dict[str, bool]:
        """Return which outputs to send, and which of them in binary.

        Raises:
            Problem: an output that this model does not have.
        """
        names = [spec.name for spec in self.outputs(loaded)]
        if request.outputs is None:
            return dict.fromkeys(names, request.is_binary)
        for name in request.outputs:
            if name not in names:
                raise Problem(400, f"there is no output {name!r}; there are: {', '.join(names)}")
        return request.outputs

    def check_inputs(self, request: InferRequest, limits: Limits) -> None:
        """Check that exactly one of the alternatives came, and not too much of it.

        Raises:
            Problem: says what is wrong.
        """
        given = [name for name in self.alternatives if name in request.inputs]
        if len(given) != 1:
            raise Problem(400, f"expected exactly one of the inputs {', '.join(self.alternatives)}")
        if len(request.inputs[given[0]]) > limits.images:
            raise Problem(413, f"{given[0]} holds more than {limits.images} rows")


def _pixel_spec(loaded: LoadedVersion) -> Spec:
    return Spec("pixel_values", "FP32", (-1, 3, *loaded.preprocessing.size))


def _vision_outputs(loaded: LoadedVersion) -> tuple[Spec, ...]:
    return (Spec("image_embeds", "FP32", (-1, loaded.manifest.embed_dim)),)


def _text_inputs(loaded: LoadedVersion) -> tuple[Spec, ...]:
    ids = Spec("input_ids", "INT64", (-1, loaded.manifest.context_length))
    return (ids, Spec("texts", "BYTES", (-1,)))


def _text_outputs(loaded: LoadedVersion) -> tuple[Spec, ...]:
    return (Spec("text_embeds", "FP32", (-1, loaded.manifest.embed_dim)),)


def _classifier_inputs(loaded: LoadedVersion) -> tuple[Spec, ...]:
    return (Spec("image", "BYTES", (-1,), is_file=True), _pixel_spec(loaded), Spec("labels", "BYTES", (-1,)))


def _classifier_outputs(_: LoadedVersion) -> tuple[Spec, ...]:
    return (Spec("labels", "BYTES", (-1, -1)), Spec("scores", "FP32", (-1, -1)))


async def _compute_vision(engine: Engine, call: Call, request: InferRequest) -> Outputs:
    return {"image_embeds": await engine.embed_pixels(call, _array(request.inputs["pixel_values"]))}


async def _compute_text(engine: Engine, call: Call, request: InferRequest) -> Outputs:
    ids = request.inputs.get("input_ids")
    if ids is None:
        texts = checked_labels(_texts(request.inputs["texts"]), engine.limits, what="text")
        ids = await engine.tokenize(call, texts)
    return {"text_embeds": await engine.embed_ids(call, _array(ids))}


async def _compute_classes(engine: Engine, call: Call, request: InferRequest) -> Outputs:
    labels: list[str] | None = None
    if "labels" in request.inputs:
        labels = checked_labels(_texts(request.inputs["labels"]), engine.limits)
    top = checked_top(request.parameters.get("top", DEFAULT_TOP))
    if "image" in request.inputs:
        embeds = await engine.embed_images(call, _files(request.inputs["image"]))
    else:
        embeds = await engine.embed_pixels(call, _array(request.inputs["pixel_values"]))
    answers = await engine.rank(call, embeds, labels, top)
    return _as_tensors(answers)


def _as_tensors(answers: list[list[Prediction]]) -> Outputs:
    return {
        "labels": np.array([[best.label for best in answer] for answer in answers], object),
        "scores": np.array([[best.score for best in answer] for answer in answers], np.float32),
    }


def checked_labels(labels: list[str], limits: Limits, *, what: str = "label") -> list[str]:
    """Return the labels, if there are some and not too many.

    Raises:
        Problem: says what is wrong.
    """
    if not labels:
        raise Problem(400, f"there is no {what}")
    if len(labels) > limits.labels:
        raise Problem(413, f"{len(labels)} {what}s, at most {limits.labels} are allowed")
    for label in labels:
        if not label.strip():
            raise Problem(400, f"a {what} is empty")
        if len(label) > limits.label_characters:
            raise Problem(413, f"a {what} has more than {limits.label_characters} characters")
    return labels


def checked_top(top: Any) -> int:
    """Return how many labels are wanted.

    Raises:
        Problem: it is no such number.
    """
    most = 1 << 20
    is_number = isinstance(top, int | float) and not isinstance(top, bool)
    if not is_number or not top >= 1 or top == math.inf:  # comparing is safe for integers of any length
        shown = f"{top!r}" if isinstance(top, float | str) else type(top).__name__
        raise Problem(400, f"top must be a whole number from 1, found {shown[:80]}")
    return most if top > most else int(top)


def _array(tensor: Tensor) -> NDArray[Any]:
    if isinstance(tensor, list):
        raise TypeError("the specification of this input says numbers")
    return tensor


def _texts(tensor: Tensor) -> list[str]:
    try:
        return [bytes(element).decode() for element in tensor]
    except UnicodeDecodeError as error:
        raise Problem(400, f"a text is not UTF-8: {error}") from error


def _files(tensor: Tensor) -> list[bytes]:
    return [bytes(element) for element in tensor]


MODELS = {
    model.name: model
    for model in (
        Model("vision", lambda loaded: (_pixel_spec(loaded),), _vision_outputs, ("pixel_values",),
              _compute_vision),
        Model("text", _text_inputs, _text_outputs, ("input_ids", "texts"), _compute_text),
        Model("classifier", _classifier_inputs, _classifier_outputs, ("image", "pixel_values"),
              _compute_classes),
    )
}  # fmt: skip
