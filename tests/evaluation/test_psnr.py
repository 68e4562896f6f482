from __future__ import annotations

import torch

from var_fast.evaluation.psnr import psnr_B


def test_psnr_is_per_picture():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])
    torch.testing.assert_close(psnr_B(a, b), torch.tensor([20.0, 40.0]))
