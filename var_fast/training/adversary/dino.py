"""Heads that judge the features of a frozen vision transformer (Sauer et al. 2023, StyleGAN-T, section 3.2; Sauer et
al. 2021, Projected GANs converge faster)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

KERNEL = 9
"""Tokens that the second convolution of a head sees at once."""


class ConvBlock(nn.Module):
    """Convolution along the tokens, around the ends, with a spectral norm of 1; norm of groups, leaky ReLU."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        convolution = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, padding_mode="circular")
        self.layers = nn.Sequential(spectral_norm(convolution), nn.GroupNorm(32, channels), nn.LeakyReLU(0.2))

    def forward(self, x_BCL: torch.Tensor) -> torch.Tensor:
        return self.layers(x_BCL)


class Residual(nn.Module):
    """(x + block(x)) / sqrt(2): the deviation stays."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_BCL: torch.Tensor) -> torch.Tensor:
        return (x_BCL + self.block(x_BCL)) * 2**-0.5


class DinoHeads(nn.Module):
    """Features, each (B, C, patches) -> logits (B, patches of all), from one head per feature map.

    Groups are normalised in place of (parts of) batches, so that no logit depends on how a batch is dealt out.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                ConvBlock(width, 1), Residual(ConvBlock(width, KERNEL)), spectral_norm(nn.Conv1d(width, 1, 1))
            )
            for width in widths
        )

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([head(x_BCL).flatten(1) for head, x_BCL in zip(self.heads, features, strict=True)], 1)
