"""adaln_modulate and residual_adaln_modulate against the formula of layer norm written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from var_fast.ops import adaln_modulate, residual_adaln_modulate


def written_out(x_BLC, scale_BC, shift_BC, eps):
    mean = x_BLC.mean(-1, keepdim=True)
    variance = ((x_BLC - mean) ** 2).mean(-1, keepdim=True)
    return (x_BLC - mean) / torch.sqrt(variance + eps) * (1 + scale_BC[:, None]) + shift_BC[:, None]


sizes = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 40))


@settings(deadline=None, max_examples=25)
@given(sizes, st.sampled_from([1e-6, 1e-3]), st.integers(0, 2**16))
def test_formula(BLC, eps, seed):
    g = torch.Generator().manual_seed(seed)
    B, L, C = BLC
    x, branch = (torch.randn(B, L, C, generator=g, dtype=torch.float64) for _ in range(2))
    gate, scale, shift = (torch.randn(B, C, generator=g, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(adaln_modulate(x, scale, shift, eps), written_out(x, scale, shift, eps))
    x_new, y = residual_adaln_modulate(x, branch, gate, scale, shift, eps)
    torch.testing.assert_close(x_new, x + gate[:, None] * branch)
    torch.testing.assert_close(y, written_out(x + gate[:, None] * branch, scale, shift, eps))


def test_gradients():
    x, branch = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gate, scale, shift = (torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(adaln_modulate, (x, scale, shift))
    assert torch.autograd.gradcheck(residual_adaln_modulate, (x, branch, gate, scale, shift))


def test_wrong_shapes_are_named():
    x, per_image = torch.zeros(2, 3, 4), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="scale_BC"):
        adaln_modulate(x, torch.zeros(3, 4), per_image)
    with pytest.raises(ValueError, match="x_BLC"):
        adaln_modulate(x[0], per_image, per_image)
    with pytest.raises(ValueError, match="branch_BLC"):
        residual_adaln_modulate(x, x[:, :2], per_image, per_image, per_image)
    with pytest.raises(ValueError, match="gate_BC"):
        residual_adaln_modulate(x, x, per_image[:, :1], per_image, per_image)
