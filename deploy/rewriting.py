"""An exported graph in operators that ONNX Runtime computes faster: same weights, same names, same answers.

torch's exporter writes one operator for each call in the model's code. With the bundled model a third of a
picture's time went into turning tokens into images and back around convolutions, into adding biases and into
activations in the wrong layout (docs/log.md, 2026-11-28).

Each function here is one rewriting. They know operators but no architecture: what does not look exactly as
they say, or whose shape the exporter did not state, is left alone. Weights stay initializers of their own, so
a new version is still one new weights file.
"""

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass

_TOKENS_SWAPPED = (0, 2, 1)
_TO_CHANNELS_FIRST = (0, 3, 1, 2)
_TO_CHANNELS_LAST = (0, 2, 3, 1)
_ACTIVATIONS = ("Gelu", "Relu")  # the same in any layout

Dims = list[int | str]


class _Linear(NamedTuple):
    """tokens (..., in) times weight (out, in) transposed, plus bias (out,)."""

    tokens: ir.Value
    weight: ir.Value
    bias: ir.Value


def rewrite(model: ir.Model) -> None:
    """Rewrite the model's graph in place."""
    IdentityEliminationPass()(model)
    for rewriting in (
        _state_shape,
        _tokens_to_image,
        _image_to_tokens,
        _convolve_before,
        _convolve_after,
        _use_gemm,
        _join_reshapes,
    ):
        for node in list(model.graph):
            if not node.outputs[0].is_graph_output():
                rewriting(node)
        RemoveUnusedNodesPass()(model)  # what is left over would look like a second user to the next one


def _state_shape(node: ir.Node) -> None:
    """State where a Reshape leads in numbers, instead of joining them with the batch's size in every run."""
    if node.op_type == "Reshape":
        target = _target(_dims(node.inputs[0]), _dims(node.outputs[0]))
        if target is not None:
            node.replace_input_with(1, _numbers(node, "shape", target))
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def _tokens_to_image(node: ir.Node) -> None:
    """Turn tokens into an image by a transpose that ONNX Runtime takes for a change of layout.

    It computes convolutions in a layout of its own, and a transpose from or to channels-last is part of the
    way there; one of tokens, whose height and width are one size, is a step of its own.
    """
    transpose = _producer(node.inputs[0], "Transpose") if node.op_type == "Reshape" else None
    if transpose is not None and _permutation(transpose) == _TOKENS_SWAPPED:
        tokens, made = _first(transpose), node.outputs[0]
        if _is_image_of(_dims(made), _dims(tokens)):
            batch, channels, height, width = _dims(made)
            nhwc = _reshape(node, "nhwc", tokens, [batch, height, width, channels])
            _replace(made, _transpose(node, "nchw", nhwc, _TO_CHANNELS_FIRST))


def _image_to_tokens(node: ir.Node) -> None:
    """The way back."""
    reshape = _producer(node.inputs[0], "Reshape") if _permutation(node) == _TOKENS_SWAPPED else None
    if reshape is not None and _is_image_of(_dims(reshape.inputs[0]), _dims(node.outputs[0])):
        nhwc = _transpose(node, "nhwc", _first(reshape), _TO_CHANNELS_LAST)
        _replace(node.outputs[0], _reshape(node, "tokens", nhwc, _dims(node.outputs[0])))


def _convolve_before(node: ir.Node) -> None:
    """Compute a linear layer whose result only goes into convolutions as a convolution of one pixel.

    Then what changes its layout is its input, which is several times narrower where an MLP has a convolution
    inside (PVTv2, arXiv 2106.13797), and nothing does between the two.
    """
    made = node.outputs[0]
    if _permutation(node) != _TO_CHANNELS_FIRST or {user.op_type for user, _ in made.uses()} != {"Conv"}:
        return
    nhwc = _first(node)
    reshape = _producer(nhwc, "Reshape")
    linear = _linear(_first(reshape)) if reshape is not None else None
    if reshape is None or linear is None or not _is_image_of(_dims(made), _dims(_first(reshape))):
        return
    if _is_used_once(nhwc) and _is_used_once(_first(reshape)):
        batch, _, height, width = _dims(made)
        narrow = _reshape(node, "nhwc", linear.tokens, [batch, height, width, *_dims(linear.tokens)[-1:]])
        _replace(made, _pointwise(node, _transpose(node, "nchw", narrow, _TO_CHANNELS_FIRST), linear))


def _convolve_after(node: ir.Node) -> None:
    """The same for a linear layer whose input only comes from a convolution, maybe through an activation."""
    linear = _linear(node.outputs[0])
    if linear is None:
        return
    tokens, activation = linear.tokens, linear.tokens.producer()
    if activation is not None and activation.op_type in _ACTIVATIONS:
        tokens = _first(activation)
    reshape = _producer(tokens, "Reshape")
    transpose = _producer(_first(reshape), "Transpose") if reshape is not None else None
    if transpose is None or _permutation(transpose) != _TO_CHANNELS_LAST:
        return
    image, dims = _first(transpose), _dims(node.outputs[0])
    if _producer(image, "Conv") is None or not _is_image_of(
        _dims(image), [*dims[:-1], *_dims(linear.weight)[1:]]
    ):
        return
    if tokens is not linear.tokens:
        assert activation is not None, "tokens differ by the activation"
        image = _insert(node, "activated", activation.op_type, [image], activation.attributes.values())
        image.shape = _first(transpose).shape
    nhwc = _transpose(node, "nhwc", _pointwise(node, image, linear), _TO_CHANNELS_LAST)
    _replace(node.outputs[0], _reshape(node, "tokens", nhwc, dims))


def _use_gemm(node: ir.Node) -> None:
    """Compute a linear layer on tokens as one Gemm, which adds the bias and takes the weight as it lies."""
    linear = _linear(node.outputs[0])
    if linear is None:
        return
    *leading, width = _dims(linear.tokens)
    symbols = [f"({size})" for size in leading if isinstance(size, str)]
    if len(leading) < 2 or len(symbols) > 1:
        return
    # A name for each number of rows: ONNX Runtime takes sizes of one name for the same, and shares memory.
    rows = "*".join([str(prod(size for size in leading if isinstance(size, int))), *symbols])
    flat = _reshape(node, "rows", linear.tokens, [rows, width])
    product = _insert(node, "gemm", "Gemm", [flat, linear.weight, linear.bias], [ir.AttrInt64("transB", 1)])
    product.shape = ir.Shape([rows, *_dims(linear.bias)])
    _replace(node.outputs[0], _reshape(node, "tokens", product, _dims(node.outputs[0])))


def _join_reshapes(node: ir.Node) -> None:
    """Go to the second of two shapes at once, and nowhere where the second is what was there before."""
    if node.op_type != "Reshape":
        return
    inner, dims = _producer(node.inputs[0], "Reshape"), _dims(node.outputs[0])
    if inner is not None:
        target = _target(_dims(inner.inputs[0]), dims)
        if target is None:
            return
        node.replace_input_with(0, _first(inner))
        node.replace_input_with(1, _numbers(node, "joined", target))
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
    if dims and dims == _dims(node.inputs[0]):
        _replace(node.outputs[0], _first(node))


def _linear(value: ir.Value) -> _Linear | None:
    """The linear layer, as the exporter writes it, whose result the value is."""
    add = _producer(value, "Add")
    matmul = _producer(add.inputs[0], "MatMul") if add is not None else None
    transpose = _producer(matmul.inputs[1], "Transpose") if matmul is not None else None
    if add is None or matmul is None or transpose is None or _permutation(transpose) != (1, 0):
        return None
    tokens, weight, bias = _first(matmul), _first(transpose), add.inputs[1]
    if bias is None or not (weight.is_initializer() and bias.is_initializer()):
        return None
    is_whole = _dims(bias) == _dims(weight)[:1] and _dims(tokens)[-1:] == _dims(weight)[1:]
    return _Linear(tokens, weight, bias) if is_whole and _is_used_once(matmul.outputs[0]) else None


def _pointwise(anchor: ir.Node, image: ir.Value, linear: _Linear) -> ir.Value:
    """The linear layer on (batch, in, height, width)."""
    out, width = _dims(linear.weight)
    kernel = _reshape(anchor, "kernel", linear.weight, [out, width, 1, 1])
    inputs = [image, kernel, linear.bias]
    made = _insert(anchor, "pointwise", "Conv", inputs, [ir.AttrInt64s("kernel_shape", [1, 1])])
    batch, _, *size = _dims(image)
    made.shape = ir.Shape([batch, out, *size])
    return made


def _reshape(anchor: ir.Node, role: str, value: ir.Value, dims: Dims) -> ir.Value:
    target = _target(_dims(value), dims)
    assert target is not None, f"{value.name}: {_dims(value)} cannot be stated as {dims}"
    made = _insert(anchor, role, "Reshape", [value, _numbers(anchor, f"{role}_shape", target)])
    made.shape = ir.Shape(dims)
    return made


def _transpose(anchor: ir.Node, role: str, value: ir.Value, permutation: tuple[int, ...]) -> ir.Value:
    made = _insert(anchor, role, "Transpose", [value], [ir.AttrInt64s("perm", permutation)])
    dims = _dims(value)
    made.shape = ir.Shape([dims[axis] for axis in permutation])
    return made


def _numbers(anchor: ir.Node, role: str, numbers: list[int]) -> ir.Value:
    tensor = ir.tensor(np.array(numbers, np.int64))
    made = _insert(anchor, role, "Constant", [], [ir.AttrTensor("value", tensor)])
    made.dtype, made.shape = ir.DataType.INT64, ir.Shape([len(numbers)])
    return made


def _insert(
    anchor: ir.Node, role: str, op_type: str, inputs: list[ir.Value], attributes: Iterable[ir.Attr] = ()
) -> ir.Value:
    """Put a node before the anchor, named by the anchor and by what it is there for."""
    node = ir.Node("", op_type, inputs, attributes)
    made = node.outputs[0]
    node.name = made.name = f"{anchor.outputs[0].name}.{role}"
    if inputs and inputs[0].dtype is not None:
        made.dtype = inputs[0].dtype
    assert anchor.graph is not None, "the anchor stands in no graph"
    anchor.graph.insert_before(anchor, node)
    return made


def _replace(value: ir.Value, by: ir.Value) -> None:
    ir.convenience.replace_all_uses_with(value, by)


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None, f"{node.op_type} without its first input"
    return value


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that the value comes from, if it is of this type."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _dims(value: ir.Value | None) -> Dims:
    """The sizes, names for those that depend on the batch; nothing where one is not stated, or is 0."""
    if value is None or value.shape is None:
        return []
    sizes = [size if isinstance(size, int) else size.value for size in value.shape]
    return [size for size in sizes if size] if all(sizes) else []


def _target(given: Dims, made: Dims) -> list[int] | None:
    """`made` in numbers, for a Reshape of `given`; None where numbers cannot say it.

    The one size that may depend on the batch is 0, *as it was*, where it comes first in both, and else -1,
    *the rest*.
    """
    named = [index for index, size in enumerate(made) if isinstance(size, str)]
    if not given or not made or len(named) > 1:
        return None
    numbers = [size if isinstance(size, int) else -1 for size in made]
    if named == [0] and given[0] == made[0]:
        numbers[0] = 0
    return numbers


def _permutation(node: ir.Node) -> tuple[int, ...] | None:
    perm = node.attributes.get("perm") if node.op_type == "Transpose" else None
    return tuple(perm.as_ints()) if perm is not None else None


def _is_image_of(image: Dims, tokens: Dims) -> bool:
    """Whether (batch, channels, height, width) has a place for each of (batch, height * width, channels)."""
    if len(image) != 4 or len(tokens) != 3:
        return False
    batch, channels, height, width = image
    if isinstance(height, str) or isinstance(width, str):
        return False
    return tokens == [batch, height * width, channels]


def _is_used_once(value: ir.Value) -> bool:
    return not value.is_graph_output() and len(value.uses()) == 1
