"""group_norm_silu against its formula written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from var_fast.ops import group_norm_silu


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(2, 6), st.booleans(), st.integers(0, 2**16))
def test_formula(B, groups, per_group, side, channels_last, seed):
    g = torch.Generator().manual_seed(seed)
    C = groups * per_group
    x = torch.randn(B, C, side, side, generator=g, dtype=torch.float64)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, C, generator=g, dtype=torch.float64)
    grouped = x.reshape(B, groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    normed = (centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)).view(B, C, side, side)
    y = normed * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
    torch.testing.assert_close(group_norm_silu(x, weight, bias, groups), y / (1 + torch.exp(-y)))


def test_gradients():
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *a: group_norm_silu(*a, groups=2), (x, weight, bias))


def test_channels_must_divide():
    with pytest.raises(ValueError, match="48 channels"):
        group_norm_silu(torch.zeros(1, 48, 2, 2), torch.ones(48), torch.zeros(48))
