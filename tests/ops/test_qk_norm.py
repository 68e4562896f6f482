"""qk_norm: unit keys, queries as long as their head's scale, values untouched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from var_fast.ops import qk_norm


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(1, 16), st.integers(0, 2**16))
def test_lengths_and_directions(B, L, H, D, seed):
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, L, 3, H, D, generator=g, dtype=torch.float64)
    scale_H = torch.rand(H, generator=g, dtype=torch.float64) * 10 + 0.1
    q, k, v = qk_norm(qkv, scale_H)
    torch.testing.assert_close(q.norm(dim=-1), scale_H.expand(B, L, H))
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(B, L, H, dtype=torch.float64))
    torch.testing.assert_close(q / scale_H[:, None] * qkv[:, :, 0].norm(dim=-1, keepdim=True), qkv[:, :, 0])
    torch.testing.assert_close(k * qkv[:, :, 1].norm(dim=-1, keepdim=True), qkv[:, :, 1])
    assert torch.equal(v, qkv[:, :, 2])


def test_no_scale_only_splits():
    qkv = torch.randn(2, 3, 3, 2, 4)
    assert all(torch.equal(out, qkv[:, :, i]) for i, out in enumerate(qk_norm(qkv, None)))


def test_gradients():
    qkv = torch.randn(1, 2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    scale_H = torch.rand(2, dtype=torch.float64).add_(1).requires_grad_()
    assert torch.autograd.gradcheck(qk_norm, (qkv, scale_H))


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="qkv_BL3HD"):
        qk_norm(torch.zeros(1, 2, 6), None)
    with pytest.raises(ValueError, match="scale_H"):
        qk_norm(torch.zeros(1, 2, 3, 2, 4), torch.ones(3))
