"""PatchGAN: says of every patch of a picture whether it is real (Isola et al. 2017, Image-to-image translation with
conditional adversarial networks, section 3.2.2 and appendix 6.1.2)."""

from __future__ import annotations

import torch
from torch import nn

from var_fast.errors import UserError

LEAST_SIZE = 8


class PatchGan(nn.Module):
    """Pictures (B, 3, size, size) -> logits (B, patches).

    As published: 4x4 convolutions, the first `layers` of stride 2, twice the channels after each, leaky ReLU. The
    patch of a logit is 70 pixels wide with 3 layers; smaller pictures get fewer. Groups are normalised in place of
    batches, so that no logit depends on how a batch is dealt out to ranks.
    """

    def __init__(self, size: int, width: int = 64) -> None:
        super().__init__()
        if size < LEAST_SIZE:
            raise UserError(f"size: got {size}, expected {LEAST_SIZE} or more for discriminator patchgan")
        layers = min(3, max(1, size.bit_length() - 5))  # 3 from 128 pixels, 2 from 64
        made: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for layer in range(1, layers + 1):
            out = width * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            made.append(nn.Conv2d(channels, out, 4, stride=stride, padding=1, bias=False))
            made += [nn.GroupNorm(32, out), nn.LeakyReLU(0.2)]
            channels = out
        made.append(nn.Conv2d(channels, 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*made)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, img_B3HW: torch.Tensor) -> torch.Tensor:
        return self.layers(img_B3HW).flatten(1)
