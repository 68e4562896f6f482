"""LPIPS: how different two pictures look, by the features of a network trained to classify (Zhang et al. 2018, The
unreasonable effectiveness of deep features as a perceptual metric, section 3, eq. 1)."""

from __future__ import annotations

import torch
from torch import nn

from var_fast.errors import UserError
from var_fast.training.weight_files import load_frozen, read_weights

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG16's convolutions; a 2x2 max-pooling lies between two stages."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
LEAST_SIDE = 16  # four poolings must leave a pixel

VGG_FILE = "a file with the state dict of VGG16 (vgg16-397923af.pth of torchvision)"
LINEAR_FILE = "a file with the linear layers of LPIPS for VGG16 (weights/v0.1/vgg.pth of the lpips package)"


class Lpips(nn.Module):
    """The distance of pictures (B, 3, H, W) in [-1, 1], H and W at least 16, as (B,); frozen.

    The features of the last ReLU of each VGG16 stage, at unit length per pixel, their squared difference weighted by
    channel, mean over pixels, sum over stages.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = _vgg16()
        self.linear = nn.ParameterList(nn.Parameter(torch.zeros(widths[-1])) for widths in STAGES)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)

    def forward(self, a_B3HW: torch.Tensor, b_B3HW: torch.Tensor) -> torch.Tensor:
        distance_B = a_B3HW.new_zeros(len(a_B3HW))
        for f_BChw, g_BChw, weight_C in zip(self._stages(a_B3HW), self._stages(b_B3HW), self.linear, strict=True):
            difference_BChw = (_unit_length(f_BChw) - _unit_length(g_BChw)).square()
            distance_B = distance_B + (difference_BChw * weight_C.view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return distance_B

    def _stages(self, img_B3HW: torch.Tensor) -> list[torch.Tensor]:
        x_BChw, outputs = (img_B3HW - self.shift) / self.scale, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                outputs.append(x_BChw)
            x_BChw = layer(x_BChw)
        return [*outputs, x_BChw]


def _vgg16() -> nn.Sequential:
    """VGG16's convolutions without the last pooling, numbered as torchvision numbers them."""
    layers: list[nn.Module] = []
    width = 3
    for stage, widths in enumerate(STAGES):
        if stage:
            layers.append(nn.MaxPool2d(2))
        for out in widths:
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
            width = out
    return nn.Sequential(*layers)


def _unit_length(f_BChw: torch.Tensor) -> torch.Tensor:
    # The root of a pixel without features has no finite gradient: the small number goes under it.
    return f_BChw / (f_BChw.square().sum(1, keepdim=True) + 1e-20).sqrt().add(1e-10)


def load_lpips(lpips_weights: str, vgg_weights: str) -> Lpips:
    """LPIPS from the published files: the linear layers, and VGG16's state dict.

    Raises UserError that names the option, and what file it needs, where one is not given, missing or another.
    """
    if not lpips_weights or not vgg_weights:
        raise UserError(
            f"lpips: needs two files, or weight 0: --lpips-weights, {LINEAR_FILE}, and --vgg-weights, {VGG_FILE}"
        )
    lpips = Lpips()
    vgg = read_weights("vgg_weights", vgg_weights, VGG_FILE)
    prefix = "features."
    named = {name.removeprefix(prefix): tensor for name, tensor in vgg.items() if name.startswith(prefix)}
    load_frozen(lpips.features, named, "vgg_weights", vgg_weights)
    found = read_weights("lpips_weights", lpips_weights, LINEAR_FILE)
    linear = {
        str(stage): found[name].flatten()
        for stage in range(len(STAGES))
        for name in (f"lin{stage}.model.1.weight", f"lin{stage}.weight")
        if name in found
    }
    load_frozen(lpips.linear, linear, "lpips_weights", lpips_weights)
    return lpips.eval()
