"""Peak signal-to-noise ratio."""

from __future__ import annotations

import torch


def psnr_B(a_B3HW: torch.Tensor, b_B3HW: torch.Tensor) -> torch.Tensor:
    """(B,) in dB, of pictures in [0, 1]; at most 100, where they are the same."""
    mse_B = (a_B3HW - b_B3HW).square().flatten(1).mean(1)
    return -10.0 * torch.log10(mse_B.clamp(min=1e-10))
