"""Attention by plain products, against torch's own and finite differences."""

import pytest
import torch
import torch.nn.functional as F

from dynlora.attention import attend, join_heads, split_heads


def _example(queries, keys, *, dtype=torch.float64):
    """Q, k and v of two sequences with three heads, and a mask of which the first key is always seen."""
    generator = torch.Generator().manual_seed(queries)

    def draw(length):
        return torch.randn(2, 3, length, 4, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.zeros(queries, keys)
    mask[:, 1:][torch.rand(queries, keys - 1, generator=generator) < 0.3] = float("-inf")
    return [draw(length).requires_grad_() for length in (queries, keys, keys)], mask


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 4), (3, 1)])
@pytest.mark.parametrize("is_masked", [False, True])
def test_gradients_of_attention_agree_with_finite_differences(queries, keys, is_masked):
    """In float64, with as many queries as keys and with fewer, with a mask and without."""
    qkv, mask = _example(queries, keys)

    assert torch.autograd.gradcheck(lambda *of: attend(*of, mask.double() if is_masked else None), qkv)


@pytest.mark.parametrize("length", [50, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_torchs_own_whether_a_sequence_is_short_or_long(length, dtype):
    """Values and gradients; bfloat16 within its rounding."""
    qkv, mask = _example(length, length, dtype=dtype)
    weights = torch.randn(2, 3, length, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours = attend(*qkv, mask)
    theirs = F.scaled_dot_product_attention(*qkv, attn_mask=mask.to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2

    assert (ours - theirs).norm() < tolerance * theirs.norm()
    for mine, other in zip(
        torch.autograd.grad((ours * weights).sum(), qkv),
        torch.autograd.grad((theirs * weights).sum(), qkv),
        strict=True,
    ):
        assert mine.dtype == dtype
        assert (mine - other).norm() < tolerance * other.norm()


def test_heads_split_and_joined_again_are_what_they_were():
    """Part by part, in the order of the columns."""
    x = torch.randn(2, 5, 3 * 8, generator=torch.Generator().manual_seed(0))

    assert torch.equal(torch.cat([join_heads(part) for part in split_heads(x, 4, 3)], dim=-1), x)
    assert torch.autograd.gradcheck(lambda x: split_heads(x, 4, 3)[1:], x.double().requires_grad_())
