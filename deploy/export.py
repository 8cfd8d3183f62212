"""A torch model becomes two ONNX graphs whose weights stay outside, in one safetensors file.

The graphs are exported once per architecture. Their initializers keep their state-dict names and
point into weights.safetensors, at the places that deploy.weights.layout gives for the model's
state dict, so a new version is one new weights file under the same graph bytes.

The only file of deploy that imports torch: nothing that serves may import it. Works for any
open_clip model with encode_image and encode_text; knows no architecture and no sizes.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deploy import atomic
from deploy.errors import ExportError
from deploy.manifest import (
    REFERENCE_NAME,
    TEXT_GRAPH_NAME,
    VISION_GRAPH_NAME,
    WEIGHTS_NAME,
    FileRecord,
    record_of,
)
from deploy.weights import Array, TensorSpec, layout, spec_of

if TYPE_CHECKING:  # takes half a second to import, and only a new architecture is exported
    import onnx_ir as ir

OPSET = 23  # the first with Attention and Gelu as operators of their own
EXAMPLE_BATCH = 2  # torch.export takes a size of 1 for a constant
REFERENCE_TEXTS = (
    "a photo of a cat.",
    "an aerial photograph of a harbour with many small boats",
    "",
    "a close-up, taken at night, of handwriting on lined paper " * 12,  # longer than any context
)
_INLINE_BYTES = 1 << 16
_CONSTANT_BYTES = 1 << 24  # of one buffer; the largest known is below 5 MB
_SEED = 20

Float32 = NDArray[np.float32]


class _ImageEncoder(nn.Module):
    """pixel_values (batch, 3, H, W) to L2-normalised image_embeds (batch, dim)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return _encoded(self.model, "encode_image", pixel_values)


class _TextEncoder(nn.Module):
    """input_ids (batch, context) to L2-normalised text_embeds (batch, dim)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return _encoded(self.model, "encode_text", input_ids)


def state_arrays(model: nn.Module) -> dict[str, Array]:
    """Return the model's state dict as numpy views; what write_weights takes.

    Raises:
        ExportError: a tensor is not float32 (integer buffers apart) or not on the CPU.
    """
    arrays: dict[str, Array] = {}
    for name, tensor in model.state_dict().items():
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise ExportError(
                f"{name} is {tensor.dtype} on {tensor.device}; versions hold float32 weights: "
                "call model.float().cpu() first"
            )
        arrays[name] = tensor.detach().numpy()
    return arrays


def export_graphs(
    model: nn.Module, directory: Path, *, context_length: int, image_size: int | tuple[int, int]
) -> dict[str, FileRecord]:
    """Write vision_model.onnx and text_model.onnx, and return their records.

    The bytes depend on the architecture and on the releases of torch, onnxscript and this program, not on
    the values of the weights. The weights file itself is not written.

    Args:
        image_size: side, or (height, width), in pixels.

    Raises:
        ExportError: the exporter failed, or did not leave every weight outside of the graphs.
    """
    import onnx_ir as ir

    from deploy.rewriting import rewrite

    specs = spec_of(state_arrays(model))
    places = layout(specs)
    # Masks and tables of positions: not in the state dict, so the same whatever is learnt. They stay inside.
    constants = frozenset(name for name, _ in model.named_buffers()) - set(specs)
    pixels = torch.zeros(EXAMPLE_BATCH, 3, *_height_width(image_size))
    tokens = torch.zeros(EXAMPLE_BATCH, context_length, dtype=torch.int64)
    graphs = (
        (VISION_GRAPH_NAME, _ImageEncoder(model), "pixel_values", pixels, "image_embeds"),
        (TEXT_GRAPH_NAME, _TextEncoder(model), "input_ids", tokens, "text_embeds"),
    )
    records = {}
    for name, encoder, input_name, example, output_name in graphs:
        with _as_exported(model):
            exported = _export(encoder, input_name, example, output_name)
        _strip(exported)
        rewrite(exported)
        _move_weights_out(exported.graph, specs, places, constants)
        content = ir.to_proto(exported).SerializeToString(deterministic=True)
        atomic.write_file(directory / name, content)
        records[name] = record_of((content,))
    return records


def reference_outputs(
    model: nn.Module,
    directory: Path,
    *,
    input_ids: NDArray[np.int64],
    image_size: int | tuple[int, int],
    image_embeds: Float32 | None = None,
) -> None:
    """Write reference.npz: fixed inputs and torch's outputs, so that parity can be checked without torch.

    Into a staging directory, which is flushed when it is published.

    Args:
        input_ids: (texts, context_length), as the model's tokenizer gives for REFERENCE_TEXTS.
        image_size: side, or (height, width), in pixels.
        image_embeds: of `reference_image_embeds`, where it has been called for the same vision tower.
    """
    if image_embeds is None:
        image_embeds = reference_image_embeds(model, image_size)
    with _as_exported(model), torch.no_grad():
        text_embeds = _encoded(model, "encode_text", torch.from_numpy(np.ascontiguousarray(input_ids)))
    buffer = io.BytesIO()
    np.savez(
        buffer,
        pixel_values=_reference_pixels(image_size),
        image_embeds=image_embeds,
        input_ids=input_ids,
        text_embeds=text_embeds.numpy(),
    )
    atomic.write_file(directory / REFERENCE_NAME, buffer.getvalue(), is_flushed=False)


def reference_image_embeds(model: nn.Module, image_size: int | tuple[int, int]) -> Float32:
    """What torch answers to the fixed pixels of reference.npz, (images, dim)."""
    with _as_exported(model), torch.no_grad():
        answer = _encoded(model, "encode_image", torch.from_numpy(_reference_pixels(image_size)))
    embeds: Float32 = answer.numpy()
    return embeds


def _reference_pixels(image_size: int | tuple[int, int]) -> Float32:
    shape = (len(REFERENCE_TEXTS), 3, *_height_width(image_size))
    return np.random.default_rng(_SEED).standard_normal(shape, dtype=np.float32)


def _encoded(model: nn.Module, method: str, inputs: Tensor) -> Tensor:
    encode: Callable[..., Tensor] = getattr(model, method)
    return encode(inputs, normalize=True)


def _height_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    return (image_size, image_size) if isinstance(image_size, int) else image_size


@contextlib.contextmanager
def _as_exported(model: nn.Module) -> Iterator[None]:
    """Hold the model in evaluation mode with MultiheadAttention's fast path off, which has no ONNX form."""
    was_training, was_fast = model.training, torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)
        model.train(was_training)


def _export(encoder: nn.Module, input_name: str, example: Tensor, output_name: str) -> "ir.Model":
    """Run torch's exporter quietly; it logs and warns about its own inner workings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                encoder,
                (example,),
                dynamo=True,
                optimize=False,  # optimisation would fold weights into new, unnamed constants
                opset_version=OPSET,
                input_names=[input_name],
                output_names=[output_name],
                dynamic_shapes={input_name: {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    except Exception as error:
        raise ExportError(f"torch could not export the encoder of {input_name}: {error}") from error
    finally:
        logger.setLevel(level)
    if program is None:
        raise ExportError(f"torch returned no graph for the encoder of {input_name}")
    return program.model


def _strip(model: "ir.Model") -> None:
    """Remove what tells of the exporting machine and process rather than of the architecture."""
    model.producer_name, model.producer_version, model.doc_string = "dynlora", None, None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None


def _move_weights_out(
    graph: "ir.Graph",
    specs: Mapping[str, TensorSpec],
    places: Mapping[str, tuple[int, int]],
    constants: frozenset[str],
) -> None:
    """Point every weight of the graph, under its state-dict name, into the weights file.

    Raises:
        ExportError: an initializer of a weight's size that is not a tensor of the state dict.
    """
    import onnx_ir as ir

    for value in list(graph.initializers.values()):
        name, tensor = str(value.name).removeprefix("model."), value.const_value
        assert tensor is not None, f"initializer {name} without a value"
        value.name = name
        if name not in specs:
            limit_bytes = _CONSTANT_BYTES if name in constants else _INLINE_BYTES
            if tensor.nbytes > limit_bytes:
                raise ExportError(
                    f"the exporter left {tensor.nbytes} bytes of {name} inside the graph; expected at most "
                    f"{limit_bytes} bytes that are not weights. This architecture cannot be served."
                )
            continue
        if tuple(tensor.shape) != specs[name].shape or tensor.dtype.numpy() != specs[name].dtype:
            raise ExportError(
                f"the exporter changed {name} from {specs[name]} to {tensor.shape} {tensor.dtype}"
            )
        offset, length = places[name]
        value.const_value = ir.ExternalTensor(
            WEIGHTS_NAME, offset, length, tensor.dtype, shape=ir.Shape(specs[name].shape), name=name
        )
