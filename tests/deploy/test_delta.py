import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.delta import Delta, Factor, fold, fold_tensor, load_delta, save_delta, write_folded
from deploy.errors import DeltaError
from deploy.weights import Array, write_weights

KEY = "attn.in_proj_weight"


def make_factor(seed: int, *, rows: tuple[int, int] = (0, 6), columns: int = 5, rank: int = 3) -> Factor:
    """A random factor of the one matrix of these tests."""
    rng = np.random.default_rng(seed)
    height = rows[1] - rows[0]
    return Factor(
        KEY,
        *rows,
        lora_B=rng.standard_normal((height, rank), dtype=np.float32),
        lora_A=rng.standard_normal((rank, columns), dtype=np.float32),
        importance=rng.standard_normal(rank, dtype=np.float32),
    )


def make_weights(seed: int, height: int = 12, columns: int = 5) -> dict[str, Array]:
    """Random weights: the matrix, and a vector that no factor changes."""
    rng = np.random.default_rng(seed)
    return {
        KEY: rng.standard_normal((height, columns), dtype=np.float32),
        "bias": rng.standard_normal(columns, dtype=np.float32),
    }


def bits(array: Array) -> bytes:
    """The array's bytes: equal only if every bit is."""
    return np.ascontiguousarray(array).tobytes()


sizes = st.tuples(
    st.integers(0, 2**32), st.integers(1, 70), st.integers(0, 5), st.integers(1, 40), st.integers(0, 9)
)


@given(sizes)
@settings(max_examples=60, deadline=None)
def test_the_fold_is_b_diag_w_a_as_float64_has_it(size: tuple[int, int, int, int, int]) -> None:
    """The weights move by B diag(importance) A, to within float32 rounding, in the named rows only."""
    seed, height, start, columns, rank = size
    weights = make_weights(seed, start + height + 2, columns)
    factor = make_factor(seed, rows=(start, start + height), columns=columns, rank=rank)
    found = fold(weights, [Delta([factor])])
    exact = weights[KEY].astype(np.float64)
    wide = [part.astype(np.float64) for part in (factor.lora_B, factor.importance, factor.lora_A)]
    exact[start : start + height] += wide[0] @ np.diag(wide[1]) @ wide[2]
    size_of_terms = np.abs(weights[KEY]).max() + (
        np.abs(wide[0]) @ np.diag(np.abs(wide[1])) @ np.abs(wide[2])
    ).max(initial=0)
    assert np.abs(found[KEY] - exact).max() <= (rank + 3) * np.finfo(np.float32).eps * size_of_terms
    untouched = np.r_[0:start, start + height : len(exact)]
    assert bits(found[KEY][untouched]) == bits(weights[KEY][untouched])
    assert found["bias"] is weights["bias"]


@given(sizes, st.integers(1, 4096))
@settings(max_examples=60, deadline=None)
def test_the_block_size_does_not_change_a_bit(size: tuple[int, int, int, int, int], block_bytes: int) -> None:
    """A machine with another cache ends with the same hash."""
    seed, height, start, columns, rank = size
    weights = make_weights(seed, start + height, columns)
    deltas = [Delta([make_factor(seed, rows=(start, start + height), columns=columns, rank=rank)])]
    assert bits(fold(weights, deltas)[KEY]) == bits(fold(weights, deltas, block_bytes=block_bytes)[KEY])


def test_every_bit_follows_from_the_stated_order_of_operations() -> None:
    """Rank ascending, multiply then add, one addition to the weight: the same by scalar arithmetic."""
    weights, factor = make_weights(1), make_factor(2)
    found = fold(weights, [Delta([factor])])[KEY]
    for row in range(6):
        for column in range(5):
            total = np.float32(0)
            for index in range(factor.rank):
                scaled = np.float32(factor.lora_B[row, index] * factor.importance[index])
                total = np.float32(total + np.float32(scaled * factor.lora_A[index, column]))
            assert found[row, column] == np.float32(weights[KEY][row, column] + total)


@given(st.lists(st.integers(0, 2**32), min_size=2, max_size=5))
@settings(max_examples=20, deadline=None)
def test_deltas_fold_in_order_as_if_one_after_the_other(seeds: list[int]) -> None:
    """Folding a lineage onto version 0 gives the bits of folding each delta onto its parent."""
    weights = make_weights(0)
    deltas = [Delta([make_factor(seed), make_factor(seed + 1, rows=(6, 12))]) for seed in seeds]
    step_by_step = weights
    for delta in deltas:
        step_by_step = fold(step_by_step, [delta])
    assert bits(fold(weights, deltas)[KEY]) == bits(step_by_step[KEY])


def test_folding_leaves_the_base_as_it_was() -> None:
    """Version 0 is folded from again and again."""
    weights = make_weights(0)
    before = bits(weights[KEY])
    fold(weights, [Delta([make_factor(1)])])
    assert bits(weights[KEY]) == before


def test_weights_folded_while_writing_have_the_bytes_of_weights_folded_in_memory(tmp_path: Path) -> None:
    """There is one fold, whichever way memory is spent."""
    weights, deltas = make_weights(0), [Delta([make_factor(1)]), Delta([make_factor(2, rows=(3, 9))])]
    streamed = write_folded(tmp_path / "a", weights, deltas)
    assert streamed == write_weights(tmp_path / "b", fold(weights, deltas))
    assert streamed != write_weights(tmp_path / "c", weights)


def test_a_delta_file_reads_back_bit_for_bit_and_is_the_same_file_every_time(tmp_path: Path) -> None:
    """Same factors, same sha256, whatever order they came in."""
    factors = [make_factor(1, rows=(6, 12)), make_factor(2), make_factor(3, rows=(12, 13), rank=0)]
    record = save_delta(tmp_path / "a", Delta(factors))
    assert record == save_delta(tmp_path / "b", Delta(reversed(factors)))
    loaded = load_delta(tmp_path / "a").factors
    assert [factor.place for factor in loaded] == [f"{KEY}[0:6]", f"{KEY}[6:12]"]
    for found, expected in zip(loaded, (factors[1], factors[0]), strict=True):
        for part in ("lora_A", "lora_B", "importance"):
            assert bits(getattr(found, part)) == bits(getattr(expected, part))


def test_an_empty_delta_is_a_delta(tmp_path: Path) -> None:
    """Learning that nothing needs to change is a result."""
    save_delta(tmp_path / "a", Delta([]))
    assert load_delta(tmp_path / "a").factors == ()
    weights = make_weights(0)
    assert fold(weights, [load_delta(tmp_path / "a")])[KEY] is weights[KEY]


def test_the_norm_is_that_of_the_update() -> None:
    """The reported norm is the Frobenius norm of what the fold adds."""
    delta = Delta([make_factor(1), make_factor(2, rows=(6, 12))])
    zeros = {KEY: np.zeros((12, 5), np.float32)}
    assert delta.norm == pytest.approx(float(np.linalg.norm(fold(zeros, [delta])[KEY])), rel=1e-6)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "importance"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_factor_with_a_value_that_is_not_finite_is_refused(part: str, value: float) -> None:
    """A diverged run must not reach the weights."""
    factor = make_factor(1)
    broken = getattr(factor, part).copy()
    broken.flat[-1] = value
    with pytest.raises(DeltaError, match=rf"{part}: a value is not finite"):
        dataclasses.replace(factor, **{part: broken})


def test_a_factor_whose_parts_do_not_fit_is_refused() -> None:
    """Shapes and dtype are checked where the factor is made, and the message names both."""
    factor = make_factor(1)
    with pytest.raises(DeltaError, match=r"lora_B: expected shape \(5, 3\) float32, found \(6, 3\)"):
        dataclasses.replace(factor, row_stop=5)
    with pytest.raises(DeltaError, match=r"lora_A: expected .* found \(3, 5\) float64"):
        dataclasses.replace(factor, lora_A=factor.lora_A.astype(np.float64))
    with pytest.raises(DeltaError, match="row range"):
        dataclasses.replace(factor, row_start=6)


def test_a_delta_of_another_model_is_refused_before_anything_is_folded() -> None:
    """Unknown keys, other widths, rows past the end and other dtypes name the place."""
    weights = make_weights(0)
    for other, said in (
        ({"other": weights[KEY]}, "no tensor attn.in_proj_weight"),
        ({KEY: weights[KEY][:5]}, r"does not fit a matrix of \(5, 5\)"),
        ({KEY: weights[KEY][:, :4]}, r"with 5 columns does not fit a matrix of \(12, 4\)"),
        ({KEY: weights[KEY].astype(np.float16)}, "only float32 matrices"),
        ({KEY: weights[KEY].reshape(-1)}, "only float32 matrices"),
    ):
        with pytest.raises(DeltaError, match=said):
            fold(other, [Delta([make_factor(1)])])


def test_two_factors_for_the_same_rows_are_refused() -> None:
    """The order within one delta would otherwise matter."""
    with pytest.raises(DeltaError, match=r"\[0:6\] and attn.in_proj_weight\[5:11\] change the same rows"):
        Delta([make_factor(1, rows=(5, 11)), make_factor(2)])


def test_a_fold_that_overflows_is_refused() -> None:
    """Finite factors can still make weights that are not."""
    factor = dataclasses.replace(make_factor(1), importance=np.full(3, 3e38, np.float32))
    with pytest.raises(DeltaError, match="not finite"):
        fold_tensor(KEY, make_weights(0)[KEY], [Delta([factor])])


def test_a_delta_file_that_is_damaged_or_something_else_says_so(tmp_path: Path) -> None:
    """Cut short, without schema, with a part missing, with a foreign tensor: each has its sentence."""
    path, factor = tmp_path / "delta.safetensors", make_factor(1)
    save_delta(path, Delta([factor]))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DeltaError, match="is cut short"):
        load_delta(path)
    write_weights(path, make_weights(0))
    with pytest.raises(DeltaError, match="expected a delta of schema 1, found 'no schema'"):
        load_delta(path)
    write_weights(path, make_weights(0), metadata={"schema": "1"})
    with pytest.raises(DeltaError, match="is not a factor"):
        load_delta(path)
    write_weights(path, {f"{factor.place}.lora_A": factor.lora_A}, metadata={"schema": "1"})
    with pytest.raises(DeltaError, match=r"lacks \['importance', 'lora_B'\]"):
        load_delta(path)
