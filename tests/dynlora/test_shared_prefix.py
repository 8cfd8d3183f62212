"""Packed prompts with a shared beginning see exactly what each prompt alone would let them see."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dynlora.shared_prefix import attend_causally, attend_from_last, lay_out

WIDTH, HEADS, EOT = 4, 2, 9


@st.composite
def _prompts(draw):
    """Tokens (N, L) below EOT, EOT, zeros: any number of prompts, of any lengths, that may begin alike."""
    common = draw(st.lists(st.integers(1, 3), min_size=0, max_size=4))
    ends = draw(st.lists(st.lists(st.integers(1, 3), max_size=4), min_size=1, max_size=5))
    prompts = [[*common, *end, EOT] for end in ends]
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    return tokens, torch.tensor([len(prompt) - 1 for prompt in prompts])


def _rows_of(prompt, layout):
    """Which rows hold the tokens of prompt number `prompt`, in order."""
    after = layout.prefix + layout.row_of[prompt]
    count = int(layout.last[prompt] - after[0]) + 1
    return torch.cat([torch.arange(layout.prefix), after[:count]])


@given(_prompts())
@settings(deadline=None, max_examples=60)
def test_every_prompt_is_found_again_among_the_rows_and_no_token_twice(example):
    """The rows of a prompt spell it up to its EOT, at positions 0, 1, 2 …; all rows together are used."""
    tokens, eot = example
    layout = lay_out(tokens, eot)
    used = set()
    for prompt, end in enumerate(eot.tolist()):
        rows = _rows_of(prompt, layout)
        used |= set(rows.tolist())
        assert layout.tokens[rows].tolist() == tokens[prompt, : end + 1].tolist()
        assert layout.positions[rows].tolist() == list(range(end + 1))
        assert layout.tokens[layout.last[prompt]] == EOT
    shared = layout.prefix * (len(tokens) - 1)

    assert used == set(range(len(layout.tokens)))
    assert len(layout.tokens) == int((eot + 1).sum()) - shared
    assert len({tuple(tokens[prompt, : layout.prefix].tolist()) for prompt in range(len(tokens))}) == 1


@given(_prompts())
@settings(deadline=None, max_examples=40)
def test_rows_attend_as_each_prompt_alone_would_forward_and_backward(example):
    """Every row of every prompt, and the pooled rows by the shorter way; gradients of rows add up."""
    tokens, eot = example
    layout = lay_out(tokens, eot)
    generator = torch.Generator().manual_seed(int(eot.sum()))
    fused = torch.randn(len(layout.tokens), 3 * WIDTH, generator=generator, dtype=torch.float64)
    weights = torch.randn(len(tokens), int(eot.max()) + 1, WIDTH, generator=generator, dtype=torch.float64)
    fused.requires_grad_()

    packed = attend_causally(fused, layout, HEADS)
    pooled = attend_from_last(fused[layout.last, :WIDTH], fused[:, WIDTH:], layout, HEADS)
    ours = theirs = torch.zeros((), dtype=torch.float64)
    for prompt in range(len(tokens)):
        rows = _rows_of(prompt, layout)
        q, k, v = fused[rows].view(len(rows), 3, HEADS, -1).permute(1, 2, 0, 3)
        alone = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
        torch.testing.assert_close(packed[rows], alone)
        torch.testing.assert_close(pooled[prompt], alone[-1])
        of = weights[prompt, : len(rows)]
        ours = ours + (packed[rows] * of).sum() + (pooled[prompt] * of[0]).sum()
        theirs = theirs + (alone * of).sum() + (alone[-1] * of[0]).sum()
    (mine,), (other,) = torch.autograd.grad(ours, fused), torch.autograd.grad(theirs, fused)

    torch.testing.assert_close(mine, other)
