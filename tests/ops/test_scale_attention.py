"""scale_attention against one softmax over all tokens with the block-causal mask written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from var_fast.ops import scale_attention


def masked_softmax(q, k, v, patch_nums, softmax_scale):
    scale_of_token = torch.cat([torch.full((pn * pn,), si) for si, pn in enumerate(patch_nums)])[: q.shape[1]]
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * softmax_scale
    scores = scores.masked_fill(scale_of_token[:, None] < scale_of_token[None], -torch.inf)
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)


pyramids = st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True).map(sorted)


@settings(deadline=None, max_examples=20)
@given(pyramids, st.data(), st.integers(0, 2**16))
def test_masked_softmax(patch_nums, data, seed):
    g = torch.Generator().manual_seed(seed)
    scales = data.draw(st.integers(1, len(patch_nums)))  # a prefix: progressive training
    L, B, H, D = sum(pn * pn for pn in patch_nums[:scales]), *data.draw(st.tuples(*[st.integers(1, 3)] * 3))
    q, k, v = torch.randn(3, B, L, H, 4 * D, generator=g, dtype=torch.float64)
    out = scale_attention(q, k, v, patch_nums, 0.7)
    torch.testing.assert_close(out, masked_softmax(q, k, v, patch_nums, 0.7))


def test_later_scales_change_nothing_earlier():
    q, k, v = torch.randn(3, 1, 14, 2, 8)
    before = scale_attention(q, k, v, (1, 2, 3), 1.0)
    k[:, 5:], v[:, 5:] = 9.0, 9.0
    after = scale_attention(q, k, v, (1, 2, 3), 1.0)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().max() > 0.1


def test_gradients():
    q, k, v = (torch.randn(1, 5, 1, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda q, k, v: scale_attention(q, k, v, (1, 2), 0.5), (q, k, v))


def test_length_inside_a_scale_is_refused():
    q = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match=r"L = 4 tokens.*\[1, 5, 14\]"):
        scale_attention(q, q, q, (1, 2, 3), 1.0)
    with pytest.raises(ValueError, match="expected the same"):
        scale_attention(torch.zeros(1, 5, 1, 8), q, q, (1, 2, 3), 1.0)
