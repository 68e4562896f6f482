"""phi: the convolutions that mend what interpolation loses, by range of scales (VAR section 3.1, algorithm 1)."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


class Phi(nn.Conv2d):
    """phi(h) = (1 - ratio) h + ratio conv3x3(h)."""

    def __init__(self, embed_dim: int, quant_resi: float):
        super().__init__(embed_dim, embed_dim, kernel_size=3, padding=1)
        self.resi_ratio = abs(quant_resi)

    def forward(self, h_BChw: torch.Tensor) -> torch.Tensor:
        return h_BChw * (1 - self.resi_ratio) + super().forward(h_BChw) * self.resi_ratio


def nearest_layer(num_layers: int, position: float) -> int:
    """Which of `num_layers` evenly spread layers lies nearest to a scale at `position` in [0, 1].

    Scales often lie exactly half way between two layers, so the last bit of numpy's linspace decides, as it does in
    the published code: computed in any other way, published checkpoints would be read with wrong layers.
    """
    edge = 1 / 3 / num_layers if num_layers == 4 else 1 / 2 / num_layers
    ticks = np.linspace(edge, 1 - edge, num_layers)
    return int(np.argmin(np.abs(ticks - position)))


class PhiShared(nn.Module):
    """One layer for all scales."""

    def __init__(self, qresi: nn.Module):
        super().__init__()
        self.qresi = qresi

    def __getitem__(self, position: float) -> nn.Module:
        return self.qresi


class PhiPartiallyShared(nn.Module):
    """A few layers, each for the scales nearest to it."""

    def __init__(self, qresi_ls: nn.ModuleList):
        super().__init__()
        self.qresi_ls = qresi_ls

    def __getitem__(self, position: float) -> nn.Module:
        return self.qresi_ls[nearest_layer(len(self.qresi_ls), position)]


class PhiNonShared(nn.ModuleList):
    """One layer a scale; indexed, like the others, by the scale's position in [0, 1]."""

    def __getitem__(self, position: float) -> nn.Module:
        return super().__getitem__(nearest_layer(len(self), position))


def build_phi(
    Cvae: int, quant_resi: float, share_quant_resi: int, num_scales: int
) -> PhiShared | PhiPartiallyShared | PhiNonShared:
    """share_quant_resi 0: a layer per scale; 1: one for all; n: n layers. |quant_resi| < 1e-6: no layer at all."""

    def layer() -> nn.Module:
        return Phi(Cvae, quant_resi) if abs(quant_resi) > 1e-6 else nn.Identity()

    if share_quant_resi == 0:
        return PhiNonShared(layer() for _ in range(num_scales))
    if share_quant_resi == 1:
        return PhiShared(layer())
    return PhiPartiallyShared(nn.ModuleList(layer() for _ in range(share_quant_resi)))
