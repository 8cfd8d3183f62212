import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.errors import WeightsError
from deploy.manifest import file_record
from deploy.weights import Array, layout, read_layout, read_metadata, read_weights, spec_of, write_weights

SHAPES = st.lists(st.integers(1, 40), max_size=3).map(tuple)
DTYPES = st.sampled_from(["f4", "f2", "i8", "u1", "?"])
TENSORS = st.dictionaries(st.text("ab.é_", min_size=1, max_size=12), st.tuples(SHAPES, DTYPES), max_size=8)


def small_tensors() -> dict[str, Array]:
    """Tensors that fill pages, tensors that do not, a scalar and integers."""
    rng = np.random.default_rng(0)
    return {
        "b.weight": rng.standard_normal((64, 32), dtype=np.float32),  # 8192 bytes
        "a.bias": rng.standard_normal(3, dtype=np.float32),
        "scale": np.array(4.6, np.float32),
        "count": np.arange(2),
        "a.weight": rng.standard_normal((32, 32), dtype=np.float32),  # 4096 bytes
    }


@given(TENSORS)
@settings(max_examples=40, deadline=None)
def test_any_tensors_read_back_with_ours_and_with_safetensors_own_reader(
    tmp_path_factory: pytest.TempPathFactory, drawn: dict[str, tuple[tuple[int, ...], str]]
) -> None:
    """The file is plain safetensors, and its places are the promised ones."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    rng = np.random.default_rng(1)
    tensors = {name: rng.integers(0, 2, shape).astype(dtype) for name, (shape, dtype) in drawn.items()}
    record = write_weights(path, tensors)
    assert record == file_record(path)
    assert read_layout(path) == layout(spec_of(tensors))
    for found in (read_weights(path), safetensors.numpy.load_file(path)):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            np.testing.assert_array_equal(found[name], tensor)


def test_every_tensor_that_fills_pages_starts_on_a_page() -> None:
    """ONNX Runtime can map the large tensors as they lie; the small rest follows without holes."""
    places = layout(spec_of(small_tensors()))
    assert list(places) == ["a.weight", "b.weight", "count", "a.bias", "scale"]
    assert places["a.weight"] == (4096, 4096)
    assert places["b.weight"] == (8192, 8192)
    assert places["count"] == (16384, 16)
    ends = [offset + length for offset, length in places.values()]
    assert [offset for offset, _ in places.values()][1:] == ends[:-1]


def test_the_places_do_not_depend_on_values_or_order(tmp_path: Path) -> None:
    """Graphs exported once fit every weights file of the architecture; same weights, same bytes."""
    tensors = small_tensors()
    other = {name: np.zeros_like(tensors[name]) for name in reversed(tensors)}
    assert layout(spec_of(tensors)) == layout(spec_of(other))
    first = write_weights(tmp_path / "1", tensors)
    assert first == write_weights(tmp_path / "2", {name: tensors[name] for name in reversed(tensors)})
    assert first != write_weights(tmp_path / "3", other)


def test_a_weights_file_cut_short_anywhere_says_so(tmp_path: Path) -> None:
    """A broken copy is recognised on opening, whatever is missing."""
    path, cut = tmp_path / "weights.safetensors", tmp_path / "cut.safetensors"
    write_weights(path, small_tensors())
    content = path.read_bytes()
    for length in (0, 7, 8, 100, 4095, 4096, 10_000, len(content) - 1):
        cut.write_bytes(content[:length])
        with pytest.raises(
            WeightsError, match=rf"(?s)cut\.safetensors is cut short: expected .* found {length}\."
        ):
            read_weights(cut)


def test_a_file_that_is_not_safetensors_says_so(tmp_path: Path) -> None:
    """A wrong file is not read as weights."""
    path = tmp_path / "w"
    with pytest.raises(WeightsError, match="does not exist"):
        read_weights(path)
    path.write_bytes((20).to_bytes(8, "little") + b"certainly not JSON..")
    with pytest.raises(WeightsError, match="its header is not JSON"):
        read_weights(path)
    path.write_bytes((4).to_bytes(8, "little") + b"[1] ")
    with pytest.raises(WeightsError, match="not a JSON object"):
        read_weights(path)
    write_weights(path, small_tensors())
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(WeightsError, match="longer than its header says"):
        read_weights(path)
    path.write_bytes(path.read_bytes()[:-1].replace(b'"I64"', b'"I65"'))
    with pytest.raises(WeightsError, match="entry of tensor count cannot be used"):
        read_weights(path)
    path.write_bytes(path.read_bytes().replace(b'"I65"', b'"I32"'))
    with pytest.raises(WeightsError, match="tensor count needs 8 bytes, its header entry gives 16"):
        read_weights(path)


def test_metadata_is_kept_and_the_default_is_torchs(tmp_path: Path) -> None:
    """Readers of torch checkpoints look for format: pt."""
    write_weights(tmp_path / "a", {})
    write_weights(tmp_path / "b", {}, metadata={"schema": "1"})
    assert read_metadata(tmp_path / "a") == {"format": "pt"}
    assert read_metadata(tmp_path / "b") == {"schema": "1"}


def test_a_dtype_without_a_place_in_the_format_is_refused(tmp_path: Path) -> None:
    """Nothing is written that could not be read."""
    with pytest.raises(WeightsError, match="tensor z is complex64"):
        write_weights(tmp_path / "a", {"z": np.zeros(2, np.complex64)})
    assert not list(tmp_path.iterdir())


def test_prepare_changes_values_few_tensors_at_a_time_and_nothing_else(tmp_path: Path) -> None:
    """Folding while writing and hashing holds a few changed tensors in memory, not a second model."""
    count, side = 24, 1024  # 96 MiB in all
    base = {f"w{i:02}": np.full((side, side), i, np.float32) for i in range(count)}
    tracemalloc.start()
    write_weights(tmp_path / "a", base, prepare=lambda _, tensor: tensor + 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9 * side * side * 4
    for name, tensor in read_weights(tmp_path / "a").items():
        np.testing.assert_array_equal(tensor, base[name] + 1)
    with pytest.raises(WeightsError, match="w00 must stay"):
        write_weights(tmp_path / "b", base, prepare=lambda _, tensor: tensor.astype(np.float16))
    assert not (tmp_path / "b").exists()
