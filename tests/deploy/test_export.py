import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from deploy.errors import ExportError
from deploy.export import export_graphs, state_arrays
from deploy.manifest import GRAPH_NAMES, TEXT_GRAPH_NAME, VISION_GRAPH_NAME, file_record
from deploy.ort import onnxruntime as ort
from deploy.preprocess import Preprocessing, decode_image
from deploy.store import VersionStore
from deploy.weights import Array, read_layout

REPOSITORY = Path(__file__).parent.parent.parent
IO = {
    VISION_GRAPH_NAME: ("pixel_values", "image_embeds", "encode_image"),
    TEXT_GRAPH_NAME: ("input_ids", "text_embeds", "encode_text"),
}
# In a fresh process, with another hash seed, from other weights than the bundled ones.
EXPORT_SCRIPT = """
import sys
from pathlib import Path
import open_clip, torch
from deploy.export import export_graphs
torch.manual_seed(5)
from dynlora.clip import BUNDLED_CONFIG
open_clip.add_model_config(BUNDLED_CONFIG)
model = open_clip.create_model(BUNDLED_CONFIG.stem).train()
export_graphs(model, Path(sys.argv[1]), context_length=model.context_length, image_size=64)
assert model.training and torch.backends.mha.get_fastpath_enabled()
"""


def open_session(path: Path, *, optimise: bool = True) -> ort.InferenceSession:
    """A session with one thread; without optimisation it opens in a few milliseconds."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def inputs_of(directory: Path) -> dict[str, Array]:
    """The fixed inputs that every version carries."""
    with np.load(directory / "reference.npz") as reference:
        return {name: reference[name] for name in ("pixel_values", "input_ids")}


def external_names(directory: Path) -> dict[str, str]:
    """{weight name: graph that reads it}, from the graphs themselves."""
    return {
        tensor.name: name
        for name in GRAPH_NAMES
        for tensor in onnx.load(str(directory / name), load_external_data=False).graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }


@pytest.fixture
def live_dir(serving_dir: Path, publish_random_version: Callable[[Path, int], int]) -> Path:
    """A version that was learnt: version 0's weights with a delta folded in."""
    return VersionStore(serving_dir).path(publish_random_version(serving_dir, 1))


def test_the_graphs_are_the_same_bytes_in_every_version_and_from_another_process(
    serving_dir: Path, tmp_path: Path, publish_random_version: Callable[[Path, int], int]
) -> None:
    """One sha256 for each graph, over versions, processes and weights: the original architecture, proven."""
    for seed in (1, 2):
        publish_random_version(serving_dir, seed)
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXPORT_SCRIPT, str(tmp_path)],
        cwd=REPOSITORY,
        env={"PATH": "", "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=280,
    )
    store = VersionStore(serving_dir)
    for name in GRAPH_NAMES:
        hashes = {file_record(store.path(version) / name).sha256 for version in store.versions()}
        assert store.versions() == [0, 1, 2]
        assert hashes == {file_record(tmp_path / name).sha256}


def test_the_graphs_are_called_and_shaped_as_promised(version_dir: Path) -> None:
    """Input and output names, dtypes and shapes are those that other programs rely on."""
    found = {}
    for name in GRAPH_NAMES:
        session = open_session(version_dir / name)
        (taken,), (given,) = session.get_inputs(), session.get_outputs()
        found[name] = [(io.name, io.type, io.shape) for io in (taken, given)]
    assert found == {
        VISION_GRAPH_NAME: [
            ("pixel_values", "tensor(float)", ["batch", 3, 64, 64]),
            ("image_embeds", "tensor(float)", ["batch", 128]),
        ],
        TEXT_GRAPH_NAME: [
            ("input_ids", "tensor(int64)", ["batch", 77]),
            ("text_embeds", "tensor(float)", ["batch", 128]),
        ],
    }


def test_no_weight_is_inside_a_graph_and_none_is_forgotten(version_dir: Path) -> None:
    """All weights but logit_scale come from the file; the graphs hold the causal mask and scalars only."""
    places = read_layout(version_dir / "weights.safetensors")
    assert set(places) - set(external_names(version_dir)) == {"logit_scale"}
    for name in GRAPH_NAMES:
        model = onnx.load(str(version_dir / name), load_external_data=False)
        inline = {
            tensor.name: tensor.ByteSize()
            for tensor in model.graph.initializer
            if tensor.data_location != onnx.TensorProto.EXTERNAL
        }
        inline |= {n.output[0]: n.ByteSize() for n in model.graph.node if n.op_type == "Constant"}
        assert {key for key, size in inline.items() if size > 256} <= {"attn_mask"}
        assert (version_dir / name).stat().st_size < 120_000


def test_the_graphs_tell_nothing_of_the_machine_that_exported_them(version_dir: Path) -> None:
    """No source path, stack trace or user name is published."""
    for name in GRAPH_NAMES:
        content = (version_dir / name).read_bytes()
        for trace in (b".py", b"/home", b"stack_trace", b"pkg.torch", str(REPOSITORY).encode()):
            assert trace not in content


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_any_batch_size_gives_torchs_embeddings(version_dir: Path, version_maker: Any, name: str) -> None:
    """Batches of 1, 2, 3, 7 and 64 run, and each row is what torch computes for it."""
    import open_clip

    model = open_clip.create_model(
        version_maker.architecture, pretrained=str(version_dir / "weights.safetensors")
    )
    given, returned, method = IO[name]
    session, rows = open_session(version_dir / name), inputs_of(version_dir)[given]
    for batch in (1, 2, 3, 7, 64):
        inputs = np.resize(rows, (batch, *rows.shape[1:]))
        (found,) = session.run([returned], {given: inputs})
        with torch.no_grad():
            expected = getattr(model.eval(), method)(torch.from_numpy(inputs), normalize=True).numpy()
        difference = float(np.abs(found - expected).max())
        print(f"{name}, batch {batch}: max|Δ| {difference:.2g}")
        assert difference < 1e-5
        assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)


def test_a_live_weights_file_loads_strictly_into_plain_open_clip(live_dir: Path, version_maker: Any) -> None:
    """The weights file is a torch checkpoint that embeds as ONNX Runtime does, in both towers."""
    import open_clip

    config = json.loads((live_dir / "open_clip_config.json").read_text())["model_cfg"]
    model = open_clip.CLIP(**config).eval()
    result = open_clip.load_checkpoint(model, str(live_dir / "weights.safetensors"), strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    for name, (given, returned, method) in IO.items():
        inputs = inputs_of(live_dir)[given]
        (found,) = open_session(live_dir / name).run([returned], {given: inputs})
        with torch.no_grad():
            expected = getattr(model, method)(torch.from_numpy(inputs), normalize=True).numpy()
        difference = float(np.abs(found - expected).max())
        print(f"{name}: max|Δ| {difference:.2g}")
        assert difference < 1e-5


@pytest.mark.parametrize(
    "every",
    [pytest.param(False, id="one of a kind"), pytest.param(True, id="all", marks=pytest.mark.nightly)],
)
def test_perturbing_any_weight_in_the_file_moves_an_output(live_dir: Path, every: bool) -> None:
    """Every tensor of weights.safetensors, logit_scale apart, is really read by a graph."""
    path, inputs = live_dir / "weights.safetensors", inputs_of(live_dir)
    path.chmod(0o644)
    # Photographs: in noise all places look alike, and attention among equals finds the same everywhere.
    photographs = sorted((REPOSITORY / "examples/demo/images/heldout").glob("*/*/0000.jpg"))[:4]
    preprocessing = Preprocessing.load(live_dir / "preprocessor_config.json")
    inputs["pixel_values"] = preprocessing([decode_image(photograph) for photograph in photographs])
    readers, rng = external_names(live_dir), np.random.default_rng(0)

    def run(name: str) -> Array:
        given, returned, _ = IO[name]
        return np.asarray(
            open_session(live_dir / name, optimise=False).run([returned], {given: inputs[given]})[0]
        )

    before = {name: run(name) for name in GRAPH_NAMES}
    unmoved, places = [], read_layout(path)
    kinds = {re.sub(r"\d+", "N", key): key for key in places}  # a block for all of them
    wanted = set(places if every else kinds.values())
    for key, (offset, length) in places.items():
        if key == "logit_scale" or key not in wanted:
            continue
        with _changed(path, offset, length, rng):
            moved = float(np.abs(run(readers[key]) - before[readers[key]]).max())
        if not moved > 1e-4:
            unmoved.append((key, moved))
    assert not unmoved
    for name in GRAPH_NAMES:
        np.testing.assert_array_equal(run(name), before[name])


class _changed:  # noqa: N801 - reads as a verb where it is used
    """Adds noise to one float32 tensor in the file, and takes it back."""

    def __init__(self, path: Path, offset: int, length: int, rng: np.random.Generator) -> None:
        self.view = np.memmap(path, np.float32, mode="r+", offset=offset, shape=(length // 4,))
        self.before = self.view.copy()
        self.view += 30.0 * rng.standard_normal(len(self.view), dtype=np.float32)
        self.view.flush()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.view[:] = self.before
        self.view.flush()


def test_weights_that_are_not_float32_are_refused(tmp_path: Path, version_maker: Any) -> None:
    """Half-precision weights would be served in half precision without anybody having asked."""
    with pytest.raises(ExportError, match=r"weight is torch.float16 on cpu; .* call model.float"):
        state_arrays(nn.Linear(2, 2).half())


class _Towers(nn.Module):
    """Two linear encoders with image side and text length of one's own choosing."""

    def __init__(self, *, big_constant: bool = False) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(3 * 6 * 10, 4), nn.Embedding(50, 4)
        self.constant = torch.randn(50, 4000) if big_constant else torch.ones(())  # not in the state dict

    def encode_image(self, pixels: torch.Tensor, *, normalize: bool) -> torch.Tensor:
        return nn.functional.normalize(self.image(pixels.flatten(1)), dim=-1)

    def encode_text(self, tokens: torch.Tensor, *, normalize: bool) -> torch.Tensor:
        return nn.functional.normalize((self.text(tokens) * self.constant.sum()).mean(1), dim=-1)


def test_sizes_are_the_models_own(tmp_path: Path) -> None:
    """Images need not be square, and texts need not be 77 tokens long."""
    export_graphs(_Towers(), tmp_path, context_length=9, image_size=(6, 10))
    shapes = [
        [
            d.dim_value
            for d in onnx.load(str(tmp_path / name), load_external_data=False)
            .graph.input[0]
            .type.tensor_type.shape.dim
        ]
        for name in GRAPH_NAMES
    ]
    assert shapes == [[0, 3, 6, 10], [0, 9]]


def test_a_weight_that_is_not_in_the_state_dict_is_refused(tmp_path: Path) -> None:
    """It would stay in the graph for ever, whatever is learnt."""
    with pytest.raises(ExportError, match=r"left 800000 bytes of .*constant.* inside the graph"):
        export_graphs(_Towers(big_constant=True), tmp_path, context_length=9, image_size=(6, 10))
    assert not (tmp_path / TEXT_GRAPH_NAME).exists()


def test_a_model_that_cannot_be_exported_says_which_encoder(tmp_path: Path) -> None:
    """The exporter's own message is kept, and the process's settings are as before."""

    class Broken(_Towers):
        def encode_image(self, pixels: torch.Tensor, *, normalize: bool) -> torch.Tensor:
            raise RuntimeError("no such tower")

    with pytest.raises(ExportError, match=r"(?s)the encoder of pixel_values: .*no such tower"):
        export_graphs(Broken(), tmp_path, context_length=9, image_size=(6, 10))
    assert torch.backends.mha.get_fastpath_enabled()


def test_exporting_prints_and_warns_of_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """Progress on a terminal is not torn by the exporter's own messages."""
    export_graphs(_Towers(), tmp_path, context_length=9, image_size=(6, 10))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
