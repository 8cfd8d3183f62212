"""Graphs computed in other operators: the answers stay, the patterns that cost time go."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploy.export import export_graphs, state_arrays
from deploy.manifest import VISION_GRAPH_NAME, WEIGHTS_NAME
from deploy.ort import onnxruntime as ort
from deploy.rewriting import rewrite
from deploy.weights import write_weights

SIDE = 4
TOKENS = SIDE * SIDE


class _ConvolvingMlp(nn.Module):
    """PVTv2's: tokens, a wide linear layer, a depthwise convolution between neighbours, and back."""

    def __init__(self, width: int = 8, hidden: int = 32) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.between = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(tokens)
        image = hidden.transpose(1, 2).reshape(tokens.shape[0], -1, SIDE, SIDE)
        hidden = nn.functional.gelu(self.between(image).flatten(2).transpose(1, 2))
        return tokens + self.fc2(hidden)


class _Model(nn.Module):
    """A CLIP as export_graphs takes it: normalised patches as tokens, and the part that is tested."""

    def __init__(self, part: nn.Module, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.part = nn.Conv2d(3, width, 2, stride=2), part
        self.norm, self.words = nn.LayerNorm(width), nn.Embedding(9, 4)

    def encode_image(self, pixels: torch.Tensor, *, normalize: bool) -> torch.Tensor:
        tokens = self.part(self.norm(self.patches(pixels).flatten(2).transpose(1, 2)))
        return nn.functional.normalize(tokens.flatten(1), dim=-1)

    def encode_text(self, tokens: torch.Tensor, *, normalize: bool) -> torch.Tensor:
        return nn.functional.normalize(self.words(tokens).mean(1), dim=-1)


def exported(part: nn.Module, directory: Path) -> Counter[str]:
    """Export, compare with torch for several batches, and count the operators."""
    directory.mkdir(exist_ok=True)
    model = _Model(part).eval()
    export_graphs(model, directory, context_length=5, image_size=2 * SIDE)
    write_weights(directory / WEIGHTS_NAME, state_arrays(model))
    session = ort.InferenceSession(directory / VISION_GRAPH_NAME, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 3, 16):
        pixels = torch.randn(batch, 3, 2 * SIDE, 2 * SIDE)
        with torch.no_grad():
            expected = model.encode_image(pixels, normalize=True)
        (found,) = session.run(None, {"pixel_values": pixels.numpy()})
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    graph = onnx.load(str(directory / VISION_GRAPH_NAME), load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def test_an_mlp_with_a_convolution_inside_is_convolutions_from_end_to_end(tmp_path: Path) -> None:
    """Its two linear layers run in the convolution's layout; what is transposed is the narrow side."""
    count = exported(_ConvolvingMlp(), tmp_path)
    assert (count["Conv"], count["MatMul"], count["Gemm"]) == (4, 0, 0)
    assert count["Transpose"] == 3  # patches to tokens, into the MLP, out of it


def test_a_linear_layer_on_tokens_is_one_gemm(tmp_path: Path) -> None:
    """Also where there are more dimensions than batch and tokens; between two, no shape is made anew."""
    count = exported(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), tmp_path / "tokens")
    assert (count["Gemm"], count["MatMul"], count["Add"]) == (2, 0, 0)

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.linear(tokens.unflatten(1, (SIDE, SIDE))).flatten(1, 2)

    count = exported(Windows(), tmp_path / "windows")
    assert (count["Gemm"], count["MatMul"], count["Add"]) == (1, 0, 0)


def test_layers_on_more_and_on_fewer_tokens_do_not_share_memory(tmp_path: Path) -> None:
    """ONNX Runtime plans memory by the names of sizes: other numbers of rows need other names."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            for index, linear in enumerate(self.linears):
                tokens = linear(tokens if index != 3 else tokens.unflatten(1, (2, TOKENS // 2)).mean(1))
            return tokens

    assert exported(Pooled(), tmp_path)["Gemm"] == 6


def test_a_linear_layer_that_others_look_at_stays_on_tokens(tmp_path: Path) -> None:
    """Its result is needed as tokens, too: computing it twice would cost more than it saves."""

    class Looked(_ConvolvingMlp):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            hidden = self.fc1(tokens)
            image = self.between(hidden.transpose(1, 2).reshape(tokens.shape[0], -1, SIDE, SIDE))
            return self.fc2(image.flatten(2).transpose(1, 2) + hidden)

    count = exported(Looked(), tmp_path)
    assert (count["Conv"], count["Gemm"], count["MatMul"]) == (2, 2, 0)


def test_a_linear_layer_that_makes_a_finer_image_stays_on_tokens(tmp_path: Path) -> None:
    """Its rows become several pixels each: that is no convolution of one pixel."""

    class Finer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expand, self.conv = nn.Linear(8, 32), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            image = self.expand(tokens).reshape(tokens.shape[0], 2 * SIDE, 2 * SIDE, 8)
            return self.conv(image.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)

    count = exported(Finer(), tmp_path)
    assert (count["Conv"], count["Gemm"], count["MatMul"]) == (2, 1, 0)


def test_weights_keep_their_names_and_nothing_of_theirs_is_inside_the_graph(tmp_path: Path) -> None:
    """One tensor in the file for each in the state dict, whatever form the operators take it in."""
    exported(_ConvolvingMlp(), tmp_path)
    graph = onnx.load(str(tmp_path / VISION_GRAPH_NAME), load_external_data=False).graph
    outside = {t.name for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert outside == {name for name in _Model(_ConvolvingMlp()).state_dict() if name != "words.weight"}
    inside = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert all(tensor.ByteSize() < 200 for tensor in inside)


class _Writer:
    """Writes a graph as torch's exporter does, of layers drawn at random."""

    def __init__(
        self, dtype: ir.DataType = ir.DataType.FLOAT, sizes: tuple[object, ...] = ("batch", 4, 6)
    ) -> None:
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self.dtype, self.pixels = dtype, ir.val("pixels", dtype, list(sizes))
        self.rng = np.random.default_rng(0)
        shape = self.add("Shape", [self.pixels], None, start=0, end=1)
        self.batch = self.add("Squeeze", [shape], None)

    def add(
        self, op_type: str, inputs: list[ir.Value], shape: list[object] | None, **attributes: object
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes)
        self.nodes.append(node)
        (made,) = node.outputs
        made.name = f"v{len(self.nodes)}"
        if shape is not None:
            made.dtype, made.shape = self.dtype, ir.Shape(shape)
        return made

    def weight(self, *shape: int) -> ir.Value:
        values = self.rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))
        name = f"w{len(self.weights)}"
        value = ir.val(name, const_value=ir.tensor(values.astype(self.dtype.numpy()), name=name))
        self.weights.append(value)
        return value

    def numbers(self, *numbers: int) -> ir.Value:
        return self.add("Constant", [], None, value=ir.tensor(np.array(numbers, np.int64)))

    def reshape(self, value: ir.Value, *sizes: int) -> ir.Value:
        batch = self.add("Reshape", [self.batch, self.numbers(-1)], None, allowzero=0)
        shape = self.add("Concat", [batch, *(self.numbers(size) for size in sizes)], None, axis=0)
        return self.add("Reshape", [value, shape], ["batch", *sizes], allowzero=1)

    def linear(self, value: ir.Value, out: int) -> ir.Value:
        *leading, width = dims(value)
        turned = self.add("Transpose", [self.weight(out, width)], None, perm=[1, 0])
        product = self.add("MatMul", [value, turned], None)
        return self.add("Add", [product, self.weight(out)], [*leading, out])

    def conv(self, image: ir.Value) -> ir.Value:
        batch, channels, height, width = dims(image)
        inputs = [image, self.weight(channels, 1, 3, 3), self.weight(channels)]
        shape = [batch, channels, height, width]
        return self.add("Conv", inputs, shape, group=channels, pads=[1, 1, 1, 1], kernel_shape=[3, 3])

    def to_image(self, tokens: ir.Value) -> ir.Value:
        batch, count, channels = dims(tokens)
        turned = self.add("Transpose", [tokens], [batch, channels, count], perm=[0, 2, 1])
        return self.reshape(turned, channels, 2, count // 2)

    def to_other_image(self, tokens: ir.Value) -> ir.Value:
        """What looks like to_image, and takes half of a row for a channel."""
        batch, count, channels = dims(tokens)
        turned = self.add("Transpose", [tokens], [batch, channels, count], perm=[0, 2, 1])
        return self.reshape(turned, 2 * channels, 1, count // 2)

    def to_tokens(self, image: ir.Value) -> ir.Value:
        batch, channels, height, width = dims(image)
        flat = self.reshape(image, channels, height * width)
        return self.add("Transpose", [flat], [batch, height * width, channels], perm=[0, 2, 1])

    def model(self, outputs: list[ir.Value]) -> ir.Model:
        whole = [self.add("Flatten", [value], None, axis=1) for value in outputs]
        joined = self.add("Concat", whole, ["batch", None], axis=1)
        graph = ir.Graph(
            [self.pixels],
            [joined],
            nodes=self.nodes,
            initializers=self.weights,
            opset_imports={"": 23},
            name="drawn",
        )
        return ir.Model(graph, ir_version=10)


def dims(value: ir.Value) -> list[object]:
    """The sizes, the batch's as its name."""
    assert value.shape is not None
    return [size if isinstance(size, int) else str(size.value) for size in value.shape]


TOKEN_STEPS = ("linear", "linear", "Gelu", "Relu", "look", "to_image", "to_other_image", "reshape")
IMAGE_STEPS = ("conv", "conv", "Gelu", "look", "to_tokens", "to_tokens")


def drawn_model(choose: Callable[[tuple[str, ...]], str], steps: int) -> ir.Model:
    """A chain of layers; `look` lets the output have what there is at that place, too."""
    writer = _Writer()
    value, looked = writer.pixels, []
    for _ in range(steps):
        step = choose(TOKEN_STEPS if len(dims(value)) == 3 else IMAGE_STEPS)
        if step in ("to_image", "to_other_image") and dims(value)[1] % 2:
            continue  # no two rows
        if step == "look":
            looked.append(value)
        elif step == "linear":
            value = writer.linear(value, (4, 6, 8)[len(writer.weights) % 3])
        elif step == "reshape":  # there and back, as code that splits heads does
            _, count, width = dims(value)
            value = writer.reshape(writer.reshape(value, count, 2, width // 2), count, width)
        elif step in ("Gelu", "Relu"):
            value = writer.add(step, [value], dims(value))
        else:
            value = getattr(writer, step)(value)
    return writer.model([*looked, value])


def run(model: ir.Model, batch: int, dtype: type = np.float32) -> np.ndarray:
    """The output for seeded noise, without ONNX Runtime's own rewriting."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(batch).standard_normal((batch, 4, 6), dtype=np.float32)
    return np.asarray(session.run(None, {"pixels": pixels.astype(dtype)})[0])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_chain_of_layers_answers_as_before(data: st.DataObject) -> None:
    """Whatever matches, or nearly does: every batch gets what it got before, and the graph is valid."""
    steps = data.draw(st.integers(1, 12))
    model = drawn_model(lambda names: data.draw(st.sampled_from(names)), steps)
    before = {batch: run(model, batch) for batch in (1, 3)}
    rewrite(model)
    onnx.checker.check_model(ir.to_proto(model))
    for batch, expected in before.items():
        np.testing.assert_allclose(run(model, batch), expected, rtol=1e-4, atol=1e-5)
    names = [node.name for node in model.graph if node.name]
    assert len(names) == len(set(names))


def one_reshape(writer: _Writer, numbers: list[int], made: list[object] | None) -> ir.Model:
    """The pixels in another shape, as they are."""
    reshaped = writer.add("Reshape", [writer.pixels, writer.numbers(*numbers)], made, allowzero=1)
    return writer.model([writer.add("Relu", [reshaped], made)])


def two_reshapes(writer: _Writer) -> ir.Model:
    """Two shapes in a row, the second with the batch first; a 0 in it means nothing."""
    flat = writer.add("Reshape", [writer.pixels, writer.numbers(-1, 6)], None, allowzero=1)
    return writer.model([writer.reshape(flat, 24)])


def before_a_conv(writer: _Writer, *, is_stated: bool) -> ir.Model:
    """A linear layer whose rows become an image by a Reshape, whose shape may not be stated."""
    made = ["batch", 2, 2, 8] if is_stated else None
    tokens = writer.linear(writer.pixels, 8)
    nhwc = writer.add("Reshape", [tokens, writer.numbers(-1, 2, 2, 8)], made, allowzero=1)
    image = writer.add("Transpose", [nhwc], ["batch", 8, 2, 2], perm=[0, 3, 1, 2])
    return writer.model([writer.conv(image)])


def turned(writer: _Writer) -> ir.Model:
    """A Transpose that does not say in which order: the last becomes the first."""
    return writer.model([writer.add("Transpose", [writer.pixels], [6, 4, "batch"])])


FOREIGN = {
    "sizes without names": lambda: one_reshape(_Writer(sizes=(None, 4, 6)), [-1, 2, 6], [None, 2, 6]),
    "a name left out once": lambda: one_reshape(_Writer(sizes=("batch", None, 6)), [-1, 6], [None, 6]),
    "two shapes in a row": lambda: two_reshapes(_Writer()),
    "an image whose shape is stated": lambda: before_a_conv(_Writer(), is_stated=True),
    "an image whose shape is not": lambda: before_a_conv(_Writer(), is_stated=False),
    "a Transpose without an order": lambda: turned(_Writer()),
    "half precision": lambda: before_a_conv(_Writer(ir.DataType.FLOAT16), is_stated=True),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_graphs_that_our_exporter_does_not_write_answer_as_before(name: str) -> None:
    """What is not stated is not guessed, and no other type is made of the values."""
    dtype = np.float16 if name == "half precision" else np.float32
    expected = run(FOREIGN[name](), 2, dtype)
    model = FOREIGN[name]()
    rewrite(model)
    found = run(model, 2, dtype)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, atol=1e-2 if dtype == np.float16 else 1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_same_graph_is_rewritten_to_the_same_bytes(seed: int) -> None:
    """The sha256 of a graph is what proves an architecture."""

    def content() -> bytes:
        rng = np.random.default_rng(seed)
        model = drawn_model(lambda names: str(rng.choice(names)), 12)
        rewrite(model)
        return ir.to_proto(model).SerializeToString(deterministic=True)

    assert content() == content()
