"""SSIM against the paper's formula written out window by window in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from var_fast.evaluation.ssim import ssim_B


def by_the_formula(a_CHW: np.ndarray, b_CHW: np.ndarray, peak: float) -> float:
    """Equation 13 of Wang et al. at every window that lies in the picture, float64."""
    height, width = a_CHW.shape[1:]
    side = min(11, height, width)
    side -= 1 - side % 2
    x = np.arange(side) - side // 2
    window = np.exp(-(x[:, None] ** 2 + x[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    values = []
    for a_HW, b_HW in zip(a_CHW.astype(np.float64), b_CHW.astype(np.float64)):
        for top in range(height - side + 1):
            for left in range(width - side + 1):
                a, b = (m[top : top + side, left : left + side] for m in (a_HW, b_HW))
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                covariance = (window * (a - mean_a) * (b - mean_b)).sum()
                above = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                values.append(above / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(values))


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 16), st.integers(1, 16), st.sampled_from([1.0, 2.0, 255.0]), st.integers(0, 99)
)
def test_equals_the_formula(batch, height, width, peak, seed):
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(batch, 3, height, width, generator=g) * peak
    b = (a + 0.1 * peak * torch.randn(a.shape, generator=g)).clamp(0, peak)
    expected = [by_the_formula(x.numpy(), y.numpy(), peak) for x, y in zip(a, b)]
    np.testing.assert_allclose(ssim_B(a, b, peak).numpy(), expected, rtol=0, atol=1e-10)


def test_known_values():
    picture = torch.rand(2, 3, 20, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ssim_B(picture, picture), torch.ones(2, dtype=torch.float64), atol=1e-12, rtol=0)
    # flat pictures have no variance: what is left is the luminance term
    low, high = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.8)
    expected = (2 * 0.2 * 0.8 + 1e-4) / (0.2**2 + 0.8**2 + 1e-4)
    assert float(ssim_B(low, high)) == pytest.approx(expected, abs=1e-7)  # 0.2 and 0.8 are float32
    # an inverted pattern of mean 1/2 is nearly -1
    g = torch.Generator().manual_seed(1)
    noise = torch.rand(1, 3, 64, 64, generator=g)
    assert float(ssim_B(noise, 1 - noise)) < -0.9


def test_a_change_of_scale_of_both_values_and_peak_changes_nothing():
    a, b = torch.rand(2, 2, 3, 15, 15, generator=torch.Generator().manual_seed(2)).unbind(0)
    torch.testing.assert_close(ssim_B(a.double() * 255, b.double() * 255, 255.0), ssim_B(a.double(), b.double()))


@pytest.mark.parametrize("other", [(1, 3, 8, 9), (2, 3, 8, 8), (3, 8, 8)])
def test_refuses_shapes(other):
    with pytest.raises(ValueError, match="expected \\(B, C, H, W\\)"):
        ssim_B(torch.zeros(1, 3, 8, 8), torch.zeros(other))
