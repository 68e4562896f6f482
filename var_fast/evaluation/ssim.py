"""SSIM: structural similarity of two pictures (Wang et al. 2004, Image quality assessment: from error visibility to
structural similarity)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def ssim_B(a_B3HW: torch.Tensor, b_B3HW: torch.Tensor, peak: float = 1.0) -> torch.Tensor:
    """(B,) float64 mean structural similarity, 1 for equal pictures, of two batches (B, C, H, W) of values in
    [0, peak]; black must be 0, for the luminance term compares ratios.

    The paper's constants (section III.C): an 11 x 11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, local
    variances that divide by the window's weight. Only windows that lie in the picture whole count; the mean is over
    these and the channels. In a picture of fewer than 11 pixels per side the window is the largest of odd side that
    fits. Raises ValueError for shapes that differ or are not (B, C, H, W).
    """
    if a_B3HW.shape != b_B3HW.shape or a_B3HW.ndim != 4 or a_B3HW.numel() == 0:
        raise ValueError(
            f"ssim_B: shapes are {tuple(a_B3HW.shape)} and {tuple(b_B3HW.shape)}, expected (B, C, H, W) twice"
        )
    # float64: the variances are differences of squares
    a, b = a_B3HW.double().flatten(0, 1).unsqueeze(1), b_B3HW.double().flatten(0, 1).unsqueeze(1)
    shortest = min(a.shape[2:])
    weight_k = _gaussian(min(WINDOW, shortest - 1 + shortest % 2), a.device)

    def smooth(x_N1HW: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(x_N1HW, weight_k.view(1, 1, -1, 1)), weight_k.view(1, 1, 1, -1))

    mean_a, mean_b = smooth(a), smooth(b)
    variance_a, variance_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).view(len(a_B3HW), -1).mean(1)


def _gaussian(side: int, device: torch.device) -> torch.Tensor:
    """(side,) weights whose sum is 1."""
    offset_k = torch.arange(side, dtype=torch.float64, device=device) - side // 2
    weight_k = torch.exp(-0.5 * (offset_k / SIGMA) ** 2)
    return weight_k / weight_k.sum()
