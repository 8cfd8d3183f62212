"""The hand-written gradients of adapted products, against plain autograd and finite differences."""

import pytest
import torch
import torch.nn.functional as F

from dynlora import packed, products
from dynlora.products import Beside, Frozen, Merged, adapted_product, merging_pays

WAYS = (Beside, Merged)
EXAMPLES = [(way, parts) for way in WAYS for parts in (1, 2, 3)]


def _example(parts, *, dtype=torch.float64, columns=5, rows=6, rank=2):
    """Vectors (2, 4, in), a frozen matrix, and factors that require gradients."""
    generator = torch.Generator().manual_seed(parts)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    factors = [draw(rank, columns) for _ in range(parts)]
    factors += [draw(rank) for _ in range(parts)]
    factors += [draw(rows // parts, rank) for _ in range(parts)]
    x = draw(2, 4, columns).requires_grad_()
    return x, Frozen(draw(rows, columns), draw(rows)), [factor.requires_grad_() for factor in factors]


def _plain(x, frozen, factors):
    """The equation, part by part, left to autograd."""
    parts = len(factors) // 3
    updates = [
        F.linear(F.linear(x, factors[p]) * factors[parts + p], factors[2 * parts + p]) for p in range(parts)
    ]
    return F.linear(x, frozen.weight, frozen.bias) + torch.cat(updates, dim=-1)


@pytest.mark.parametrize(("way", "parts"), EXAMPLES)
def test_gradients_agree_with_finite_differences(way, parts):
    """In float64, for x and every factor."""
    x, frozen, factors = _example(parts)

    assert torch.autograd.gradcheck(lambda x, *factors: way.apply(x, frozen, *factors), (x, *factors))


@pytest.mark.parametrize(("way", "parts"), EXAMPLES)
def test_result_and_gradients_are_those_of_plain_autograd(way, parts):
    """In float32 and at the size of a real layer."""
    x, frozen, factors = _example(parts, dtype=torch.float32, columns=96, rows=192, rank=16)
    weights = torch.randn(2, 4, 192, generator=torch.Generator().manual_seed(0))
    ours, theirs = way.apply(x, frozen, *factors), _plain(x, frozen, factors)
    pairs = zip(
        torch.autograd.grad((ours * weights).sum(), (x, *factors)),
        torch.autograd.grad((theirs * weights).sum(), (x, *factors)),
        strict=True,
    )

    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for mine, other in pairs:
        assert (mine - other).norm() < 1e-5 * other.norm()


@pytest.mark.parametrize("way", WAYS)
def test_vectors_that_need_no_gradient_get_none_and_the_factors_theirs(way):
    """The first block's input costs no backward product."""
    x, frozen, factors = _example(3)
    way.apply(x.detach().requires_grad_(False), frozen, *factors).sum().backward()

    assert all(factor.grad is not None for factor in factors)
    assert frozen.weight.grad is None


def test_the_way_follows_from_the_shapes_alone():
    """Narrow with many vectors is merged, wide with few is not: the same plan takes the same way."""
    assert merging_pays(8192, torch.empty(256, 32), parts=1, rank=16)
    assert merging_pays(700, torch.empty(384, 128), parts=3, rank=16)
    assert not merging_pays(800, torch.empty(3072, 768), parts=1, rank=16)
    assert not merging_pays(4, torch.empty(256, 32), parts=1, rank=16)


@pytest.mark.parametrize("vectors", [4, 4096])
def test_under_autocast_bfloat16_stays_near_float32_and_factors_keep_float32_gradients(vectors):
    """Whichever way is taken."""
    x, frozen, factors = _example(1, dtype=torch.float32, columns=64, rows=64, rank=4)
    x = x.detach().repeat(1, vectors // 4, 1)
    exact = torch.autograd.grad(adapted_product(x, frozen, factors).square().mean(), factors)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted_product(x, frozen, factors)
    rounded = torch.autograd.grad(y.float().square().mean(), factors)

    assert y.dtype == torch.bfloat16
    for one, other in zip(rounded, exact, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("packs", [True, False])
def test_a_frozen_matrix_multiplies_alike_packed_and_plain_from_either_side(monkeypatch, dtype, packs):
    """With and without bias; packed where this machine can, and kept from the first product on."""
    if not packs:
        monkeypatch.setattr(products, "can_pack", lambda *_: False)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, 32, generator=generator), torch.randn(48, generator=generator)
    x, y = torch.randn(7, 32, generator=generator), torch.randn(7, 48, generator=generator)
    tolerance = 1e-5 if dtype != torch.bfloat16 else 2e-2
    for of in (bias, None):
        frozen = Frozen(weight, of)
        first, again = (frozen.multiply(x.to(dtype)) for _ in range(2))
        expected = F.linear(x, weight, of)

        assert first.dtype == dtype
        assert torch.equal(first, again)
        assert (first - expected).norm() < tolerance * expected.norm()
        assert (frozen.multiply_transposed(y.to(dtype)) - y @ weight).norm() < tolerance * (y @ weight).norm()


def test_an_operator_that_torch_no_longer_has_is_done_without(monkeypatch):
    """Torch promises nothing about oneDNN's operators: absent, or computing something else."""

    class Other:
        def _reorder_linear_weight(self, weight, _):
            return weight

        def _linear_pointwise(self, x, weight, bias, *_):
            return F.linear(x, weight, bias) * 2

    for operators in (object(), Other()):
        monkeypatch.setattr(packed, "_operators", lambda operators=operators: operators)
        packed.can_pack.cache_clear()
        assert not packed.can_pack("cpu", torch.float32)
    packed.can_pack.cache_clear()
